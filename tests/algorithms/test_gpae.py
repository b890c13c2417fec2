"""GPAE in BenchMARL: every critic model without leaks, past batches, what is logged and what is refused."""

import pytest
import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment
from benchmarl.models import CnnConfig, DeepsetsConfig, GruConfig, LstmConfig
from benchmarl.models.common import EnsembleModelConfig
from cases import configured
from conftest import scalars
from environments import StandInTask
from problems import CNN, RNN, SETS, gnn, mlp, sequence
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded

from benchmarl_trust import GpaeConfig, HappoConfig
from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.estimators import counterfactual_critic

N, OBS, KINDS, DIMS = 3, 4, 5, 2

#: name -> (model, shape of an agent's observation, or of the state)
MODELS = {
    "mlp": (lambda: mlp(8), (OBS,)),
    "mlp-2d": (lambda: mlp(8, num_feature_dims=2), (2, OBS)),
    "gru": (lambda: GruConfig(**RNN), (OBS,)),
    "lstm": (lambda: LstmConfig(**RNN), (OBS,)),
    "cnn": (lambda: CnnConfig(**CNN), (8, 8, 3)),
    "gnn": (gnn, (OBS,)),
    "deepsets": (lambda: DeepsetsConfig(**SETS), (OBS,)),
    "deepsets-sets": (lambda: DeepsetsConfig(**SETS), (2, OBS)),
    "gru-mlp": (lambda: sequence(GruConfig(**RNN), mlp(4)), (OBS,)),
    "mlp-gru": (lambda: sequence(mlp(4), GruConfig(**RNN)), (OBS,)),
    "gnn-mlp": (lambda: sequence(gnn(), mlp(4)), (OBS,)),
    "cnn-gru": (lambda: sequence(CnnConfig(**CNN), GruConfig(**RNN)), (8, 8, 3)),
    "deepsets-mlp": (lambda: sequence(DeepsetsConfig(**SETS), mlp(4)), (OBS,)),
    "ensemble": (lambda: EnsembleModelConfig({"agents": sequence(mlp(4), mlp(4))}), (OBS,)),
}
STATE_MODELS = {name: MODELS[name] for name in ("mlp", "mlp-2d", "gru", "lstm", "cnn", "mlp-gru", "ensemble")}
STATE_MODELS["deepsets"] = MODELS["deepsets-sets"]
ALL = [(name, False) for name in MODELS] + [(name, True) for name in STATE_MODELS]


def make_critic(name, state, discrete):
    torch.manual_seed(0)
    model, shape = (STATE_MODELS if state else MODELS)[name]
    action = Categorical(KINDS, (N,)) if discrete else Unbounded((N, DIMS))
    spec = Composite(agents=Composite(observation=Unbounded((N, *shape)), shape=(N,)))
    return counterfactual_critic(
        model(),
        "agents",
        n_agents=N,
        observation_spec=spec,
        state_spec=Composite(state=Unbounded(shape)) if state else None,
        action_spec=Composite(agents=Composite(action=action, shape=(N,))),
        device="cpu",
    )


def make_batch(name, discrete, rows=2, steps=5):
    torch.manual_seed(1)
    shape = MODELS["deepsets-sets" if name == "deepsets" else name][1]
    batch = TensorDict(batch_size=(rows, steps))
    batch["agents", "observation"] = torch.randn(rows, steps, N, *MODELS[name][1])
    batch["state"] = torch.randn(rows, steps, *shape)
    batch["is_init"] = torch.zeros(rows, steps, 1, dtype=torch.bool)
    batch["is_init"][:, 0] = batch["is_init"][0, 3] = True
    if discrete:
        batch["agents", "action"] = torch.randint(KINDS, (rows, steps, N))
        batch["agents", "policy_features"] = torch.rand(rows, steps, N, KINDS).softmax(-1)
    else:
        batch["agents", "action"] = torch.randn(rows, steps, N, DIMS)
        batch["agents", "policy_features"] = torch.randn(rows, steps, N, 2 * DIMS)
    return batch


def values(critic, batch):
    with torch.no_grad():
        return critic(batch.clone())["agents", "state_value"]


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
@pytest.mark.parametrize(("name", "state"), ALL, ids=[f"{n}-state" if s else n for n, s in ALL])
def test_no_model_shows_an_agent_its_own_action(name, state, discrete):
    critic, batch = make_critic(name, state, discrete), make_batch(name, discrete)
    before = values(critic, batch)
    assert before.shape == (2, 5, N, 1)
    for i in range(N):
        changed = batch.clone()
        own = changed["agents", "action"].select(2, i)
        own.copy_((own + 1) % KINDS if discrete else own + 1)
        change = (values(critic, changed) - before).abs().squeeze(-1)
        assert (change[..., i] == 0).all()
        assert (change[..., [j for j in range(N) if j != i]] > 0).all()
        changed = batch.clone()
        changed["agents", "policy_features"][:, :, i] *= 0.5
        change = (values(critic, changed) - before).abs().squeeze(-1)
        assert (change[..., i] > 0).all()
        assert (change[..., [j for j in range(N) if j != i]] == 0).all()


@pytest.mark.parametrize(("name", "state"), ALL, ids=[f"{n}-state" if s else n for n, s in ALL])
def test_permuted_environments_give_permuted_values(name, state):
    critic, batch = make_critic(name, state, True), make_batch(name, True, rows=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(values(critic, batch[order]), values(critic, batch)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gru", "lstm", "gru-mlp", "mlp-gru", "cnn-gru"])
def test_recurrent_critics_start_anew_at_a_reset_and_look_at_the_past_only(name):
    critic, batch = make_critic(name, False, True), make_batch(name, True)
    before = values(critic, batch)
    changed = batch.clone()
    changed["agents", "observation"][:, 2] += 1
    change = (values(critic, changed) - before).abs()
    assert (change[:, :2] == 0).all()
    assert (change[:, 2] > 0).all()
    assert (change[0, 3:] == 0).all(), "environment 0 was reset at step 3"
    assert (change[1, 3:] > 0).all()


def test_a_graph_network_does_not_take_a_state():
    STATE_MODELS["gnn"] = MODELS["gnn"]
    try:
        with pytest.raises(ValueError, match="GNN module is not compatible"):
            make_critic("gnn", True, True)
    finally:
        del STATE_MODELS["gnn"]


def config(kind=GpaeConfig, **settings):
    return configured(kind, **settings)


@pytest.mark.parametrize("model", ["mlp", "gru"])
def test_n_rollouts_keeps_the_newest_batches(model, make_experiment):
    models = {"mlp": lambda: mlp(8), "gru": lambda: GruConfig(**RNN)}
    experiment = make_experiment(config(n_rollouts=3), model=models[model](), critic=models[model](), max_n_iters=5)
    seen, ratios = [], []
    process = experiment.algorithm.process_batch

    def spy(group, batch):
        new = batch["agents", "observation"].clone()
        out = process(group, batch)
        seen.append((new, out["agents", "observation"].clone()))
        ratios.append((out["agents", "old_log_prob"] - out["agents", "log_prob"]).abs().amax((1, 2)))
        return out

    experiment.algorithm.process_batch = spy
    experiment.run()
    new = [batch for batch, _ in seen]
    for k, (_, kept) in enumerate(seen):
        torch.testing.assert_close(kept, torch.cat(new[max(0, k - 2) : k + 1]))
    assert len(experiment.replay_buffers["agents"]) == 3 * (40 if model == "mlp" else 4)  # frames, or sequences
    if model == "gru":
        return  # its ratios are not 1 where training's first state is not collection's
    for ratio in ratios:
        torch.testing.assert_close(ratio[-4:], torch.zeros(4), rtol=0, atol=1e-4)  # the newest is on-policy
        assert (ratio[:-4] > 1e-4).all()


def test_one_rollout_computes_no_ratio(make_experiment, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a ratio was computed")

    monkeypatch.setattr(F, "trace_coefficient", refuse)
    monkeypatch.setattr(F, "importance_weight", refuse)
    experiment = make_experiment(config())
    experiment.run()
    assert "trace_mean" not in " ".join(scalars(experiment))
    assert len(experiment.replay_buffers["agents"]) == 40


@pytest.mark.parametrize("model", ["mlp", "gru", "lstm"])
def test_what_is_stored_is_what_the_loss_computes(model, make_experiment):
    """The estimator runs over longer sequences than the loss, with a slot more behind each of the batch's episodes."""
    models = {"mlp": lambda: mlp(8), "gru": lambda: GruConfig(**RNN), "lstm": lambda: LstmConfig(**RNN)}
    experiment = make_experiment(config(n_rollouts=2), model=models[model](), critic=models[model]())
    batch = next(iter(experiment.collector))
    assert batch["next", "done"][:, :-1].any()
    batch = experiment.algorithm.process_batch("agents", batch)
    loss = experiment.losses["agents"]
    with loss.critic_network_params.to_module(loss.critic_network), torch.no_grad():
        value = loss.critic_network(batch.clone())["agents", "state_value"]
    torch.testing.assert_close(value, batch["agents", "state_value"])
    torch.testing.assert_close(loss.current_log_prob(batch), batch["agents", "old_log_prob"])


@pytest.mark.parametrize("excluded", [False, True])
def test_past_batches_are_in_checkpoints(make_experiment, excluded):
    settings = {"exclude_buffer_from_checkpoint": excluded, "max_n_iters": 3}
    experiment = make_experiment(config(n_rollouts=2), checkpoint_at_end=True, **settings)
    experiment.run()
    file = experiment.folder_name / "checkpoints" / "checkpoint_120.pt"
    other = Experiment.reload_from_file(str(file), experiment_patch={"max_n_iters": 5})
    assert len(other.replay_buffers["agents"]) == (0 if excluded else 80)
    if not excluded:
        ours, theirs = (e.replay_buffers["agents"].storage[:80] for e in (other, experiment))
        torch.testing.assert_close(ours["agents", "log_prob"], theirs["agents", "log_prob"])
    other.run()
    assert len(other.replay_buffers["agents"]) == 80
    if excluded:
        larger = make_experiment(config(n_rollouts=4), max_n_iters=5, restore_file=str(file))
        larger.run()
        assert len(larger.replay_buffers["agents"]) == 80
    else:
        with pytest.raises(ValueError, match=r"algorithm\.n_rollouts=4"):
            make_experiment(config(n_rollouts=4), max_n_iters=5, restore_file=str(file))


def test_what_is_logged(run):
    experiment = run(config(n_rollouts=2))
    logged = scalars(experiment)
    names = ["advantage_correlation", "value_explained_variance", "trace_mean", "data_age", "ratio_not_finite"]
    names += ["ratio_above_one", "joint_ratio_above_one", "teammates_ratio_above_eta", "dt_ratio_above_one"]
    names += [
        f"{name}_agent_{i}" for name in ("advantage_mean", "advantage_std", *names[1:3], *names[4:]) for i in range(3)
    ]
    for name in names:
        assert len(logged[f"train_agents_{name}"]) == 2, name
    assert logged["train_agents_data_age"] == [0, 0.5]
    assert logged["train_agents_trace_mean"][0] == pytest.approx(0.95, abs=1e-4)
    assert logged["train_agents_ratio_above_one"][0] == 0
    assert 0.1 < logged["train_agents_ratio_above_one"][1] < 0.5  # of half of the data


def test_a_sample_counts_with_its_importance_weight(make_experiment):
    """The authors' clipped term, min(r A, clip(r, ρ(1-ε), ρ(1+ε)) A) with r = π_θ/μ, is what the loss computes."""
    experiment = make_experiment(config(n_rollouts=2))
    experiment.run()
    loss, batch = experiment.losses["agents"], experiment.replay_buffers["agents"].storage[:80]
    with torch.no_grad():
        out = loss(batch.clone())["loss_objective"]
        now, advantage = loss.current_log_prob(batch), batch["agents", "advantage"].squeeze(-1)
    ratio = (now - batch["agents", "log_prob"]).exp()
    old = (batch["agents", "old_log_prob"] - batch["agents", "log_prob"]).exp()
    gain = torch.minimum(ratio * advantage, torch.clamp(ratio, old * 0.8, old * 1.2) * advantage)
    assert (old - 1).abs().max() > 1e-3
    torch.testing.assert_close(out, -gain.mean(), rtol=1e-4, atol=1e-6)


class SpoilKept(Callback):
    """Makes ratios of data that is kept not finite: of one agent NaN, of another infinite."""

    def on_train_end(self, training_td, group):
        log_prob = self.experiment.replay_buffers[group].storage[:40][group, "log_prob"]
        log_prob[:10, 1], log_prob[5:20, 2] = torch.nan, -torch.inf


@pytest.mark.parametrize("over", ["batch", "per_agent"])
@pytest.mark.parametrize("kind", [GpaeConfig, HappoConfig])
def test_samples_whose_ratio_is_not_finite_change_neither_loss_nor_normalisation(kind, over, make_experiment):
    settings = {"estimator": "gpae", "n_rollouts": 2, "normalize_advantage": over}
    experiment = make_experiment(config(kind, **settings), task=StandInTask(), callbacks=[SpoilKept()])
    algorithm, seen = experiment.algorithm, {}
    if kind is HappoConfig:  # what the agents are given to learn from
        make_agents = algorithm._agents
        algorithm._agents = lambda team: seen.setdefault(experiment.n_iters_performed, make_agents(team))
    else:
        process = algorithm.process_batch

        def spy(group, batch):
            batch = process(group, batch)
            flat = batch.reshape(-1).clone()
            other = flat.clone()
            for key in ("advantage", "old_log_prob", "importance_weight"):
                other["agents", key][~other["agents", "valid"]] = torch.nan
            losses = [experiment.losses["agents"].actor_loss(td)["loss_objective"].item() for td in (flat, other)]
            seen[experiment.n_iters_performed] = flat["agents"], losses
            return batch

        algorithm.process_batch = spy
    experiment.run()
    assert scalars(experiment)["train_agents_skipped_steps"] == [0, 0]
    if kind is HappoConfig:
        advantage, valid = (torch.stack([a.data[key] for a in seen[1]], -1) for key in ("advantage", "mask"))
    else:
        data, losses = seen[1]
        advantage, valid = data["advantage"].squeeze(-1), data["valid"]
        gain = data["importance_weight"] * advantage  # the policy is still the one of the iteration's start
        assert losses == pytest.approx([-gain[valid].mean().item()] * 2, rel=1e-4)
    assert (~valid).sum(0).tolist() == [0, 10, 15]
    assert (advantage[~valid] == 0).all()
    for values in [advantage[valid]] if over == "batch" else [advantage[valid[:, i], i] for i in range(N)]:
        assert values.mean().item() == pytest.approx(0, abs=1e-6)
        assert values.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("eta", 0.9),
        ("lmbda", 1.5),
        ("n_rollouts", 0),
        ("truncation", "double"),
        ("surrogate", "linear"),
        ("epsilon", 0),
        ("share_param_critic", False),
    ],
)
def test_bad_settings_are_named(make_experiment, setting, value):
    with pytest.raises(ValueError, match=rf"algorithm\.{setting}={value}"):
        make_experiment(config(**{setting: value}))


def test_settings_reach_the_estimator(make_experiment):
    settings = {"n_rollouts": 2, "truncation": "it", "eta": 1.3, "lmbda": 0.7}
    loss = make_experiment(config(**settings), gamma=0.8).losses["agents"]
    estimator = loss.value_estimator
    assert (estimator.truncation, estimator.eta, estimator.lmbda, estimator.gamma) == ("it", 1.3, 0.7, 0.8)
    assert estimator.off_policy
    assert (loss.surrogate, loss.epsilon) == ("clip", (0.2, 0.2))


def test_gamma_is_the_experiments(make_experiment):
    with pytest.raises(ValueError, match=r"experiment\.gamma=1\.5"):
        make_experiment(config(), gamma=1.5)


def test_an_ensemble_keeps_no_past_batches(make_experiment):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    ensemble = EnsembleAlgorithmConfig({"adversary": config(n_rollouts=2), "agent": MappoConfig.get_from_yaml()})
    with pytest.raises(ValueError, match=r"algorithm\.n_rollouts=2"):
        make_experiment(ensemble, task=task)


def test_missing_log_probs_are_named(make_experiment):
    experiment = make_experiment(config(n_rollouts=2))
    batch = next(iter(experiment.collector)).exclude(("agents", "log_prob"))
    with pytest.raises(ValueError, match="log_prob"):
        experiment.algorithm.process_batch("agents", batch)


def test_absent_agents_values_are_trained(make_experiment):
    experiment = make_experiment(config(), task=StandInTask(absent=True))
    assert experiment.losses["agents"].critic_on_absent
