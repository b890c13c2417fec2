"""normalize_value in whole experiments: every estimator, absent agents, separate critics, teams, and "none"."""

import pytest
import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.models import GruConfig
from cases import Case, configured
from conftest import scalars
from environments import CrewTask, StandInTask
from problems import RNN
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from benchmarl_trust import HappoConfig, MarsConfig
from benchmarl_trust.functional import Moments, mean_and_std
from benchmarl_trust.functional.value_norm import BETA
from benchmarl_trust.value import NormalizedCritic

RUNNING = {"normalize_value": "running"}
GAMMA, SCALE, SHIFT = 0.9, 250.0, -30.0
#: One of each estimator and each kind of step.
KINDS = {
    "gae": Case("mars", RUNNING),
    "in minibatches": Case("mars", RUNNING | {"minibatch_advantage": True}),
    "natural steps": Case("hatrpow", RUNNING),
    "gpae": Case("gpae", RUNNING),
    "older data": Case("gpae", RUNNING | {"n_rollouts": 2}),
    "older data in sequence": Case("cliphappo", RUNNING | {"estimator": "gpae", "n_rollouts": 2}),
    "preopc, separate critics": Case("a2po", RUNNING),
}
kinds = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


def statistics(experiment, group="agents"):
    """Mean and deviation of a group's critic."""
    params = experiment.losses[group].critic_network_params
    return mean_and_std(Moments(*(params[f"running_{name}"].clone() for name in Moments._fields)))


def settle(experiment, mean, std):
    """As if the statistics had seen a few batches of this mean and deviation."""
    params = experiment.losses["agents"].critic_network_params
    for name, moment in zip(Moments._fields, (mean, mean**2 + std**2, 1.0), strict=True):
        params[f"running_{name}"].fill_(3e-5 * moment)


@pytest.fixture
def seen(monkeypatch):
    """What the statistics have been shown, and what of it counted."""
    shown, update = [], NormalizedCritic.update

    def keep(self, value, mask=None):
        shown.append((value.clone(), None if mask is None else mask.clone()))
        update(self, value, mask)

    monkeypatch.setattr(NormalizedCritic, "update", keep)
    return shown


@kinds
def test_rewards_of_another_scale_train_the_same_policies(case, make_experiment, seen):
    """From statistics that correspond: targets correspond, and with normalised advantages all steps are the same. With
    a shift no trajectory may terminate, since its return would lack the shifts after it; and the order is fixed, since
    the semi-greedy one divides by values.
    """
    from runtime.test_resume import train

    runs, order = [], {"order": "fixed"} if case.sequential and not case.natural else {}
    for scale, shift in ((1.0, 0.0), (SCALE, SHIFT)):
        config = case.config(normalize_advantage="batch", **order)
        experiment = make_experiment(config, gamma=GAMMA, loggers=[], lr=1e-4)
        batches = [batch.clone() for batch in experiment.collector]
        settle(experiment, 2 * scale + shift / (1 - GAMMA), 3 * scale)
        for batch in batches:
            batch["next", "agents", "reward"] = scale * batch["next", "agents", "reward"] + shift
            batch["next", "terminated"].fill_(False)
            torch.manual_seed(0)
            train(experiment, batch)
        (mean, std), targets = statistics(experiment), [value for value, _ in seen]
        runs.append((mean, std, targets, dict(experiment.losses["agents"].named_parameters())))
        seen.clear()
    (mean, std, targets, one), (other_mean, other_std, other_targets, other) = runs
    torch.testing.assert_close(other_mean, SCALE * mean + SHIFT / (1 - GAMMA), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(other_std, SCALE * std, rtol=1e-4, atol=1e-4)
    for target, other_target in zip(targets, other_targets, strict=True):
        torch.testing.assert_close(other_target, SCALE * target + SHIFT / (1 - GAMMA), rtol=1e-4, atol=0.1)
    for name, parameter in one.items():
        torch.testing.assert_close(other[name], parameter, rtol=1e-3, atol=1e-4)


@kinds
def test_the_network_regresses_on_normalised_targets(case, run, seen):
    """What the statistics see are values in units of rewards, whatever the estimator corrected; the loss has v."""
    experiment = run(case.config(), max_n_iters=3, loggers=["csv"])
    assert len(seen) == 3
    mean, std = statistics(experiment)
    shown = torch.stack([value.double().mean((0, 1) if mean.ndim else None) for value, _ in seen])
    torch.testing.assert_close(mean, shown.mean(0), rtol=1e-4, atol=1e-6)
    loss, batch = experiment.losses["agents"], experiment.replay_buffers["agents"].storage[:]
    target = batch["agents", "value_target"]
    torch.testing.assert_close(target.flatten(), ((seen[-1][0] - mean) / std).float().flatten(), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), loss.critic_network_params.to_module(loss.critic_network):
        out = loss.critic_network(batch.clone())
        error = (out["agents", "normalized_value"] - target).square().mean()
        torch.testing.assert_close(loss(batch)["loss_critic"], error)
        value = out["agents", "normalized_value"] * std + mean
        torch.testing.assert_close(out["agents", "state_value"], value.float(), rtol=1e-4, atol=1e-5)
    logged = scalars(experiment)
    assert logged["train_agents_value_norm_mean"][0] == 0  # that of the first iteration's values
    assert logged["train_agents_value_norm_std"][0] == pytest.approx(0.1)
    assert len(logged["train_agents_value_norm_std"]) == 3
    assert ("train_agents_value_norm_std_agent_2" in logged) == (not experiment.algorithm.share_param_critic)


def test_corrected_targets_are_what_is_normalised(make_experiment, seen):
    """preopc sets each agent's target at its turn, in units of rewards."""
    experiment = make_experiment(Case("a2po", RUNNING).config(normalize_advantage="none"), lr=0.05)
    batch = experiment.algorithm.process_batch("agents", next(iter(experiment.collector)))
    ((target, _),) = seen
    plain = batch["agents", "state_value"] + batch["agents", "advantage"]
    changed = (target - plain).abs().flatten(0, 1).amax(0).flatten() > 1e-5
    assert changed.sum() == 2  # of three, all but the first to move
    mean, std = statistics(experiment)
    torch.testing.assert_close(batch["agents", "value_target"].double(), (target - mean) / std, rtol=1e-4, atol=1e-4)


def test_minibatches_of_advantages_are_the_whole_batchs(make_experiment):
    """Environments are apart either way."""
    out = []
    for minibatch in (False, True):
        config = configured(MarsConfig, **RUNNING, minibatch_advantage=minibatch)
        experiment = make_experiment(config)
        batch = experiment.algorithm.process_batch("agents", next(iter(experiment.collector)))
        out.append((*(batch["agents", key] for key in ("advantage", "value_target")), *statistics(experiment)))
    for one, other in zip(*out, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("share", [True, False], ids=["one critic", "separate critics"])
@pytest.mark.parametrize("name", ["mars", "happo"])
def test_absent_agents_do_not_count(name, share, run, seen):
    config = Case(name, RUNNING).config(share_param_critic=share)
    experiment = run(config, task=StandInTask(absent=True), max_n_iters=1)
    ((value, mask),) = seen
    assert 0 < mask.sum() < mask.numel()
    value = value.squeeze(-1).double()
    parts = [value[mask]] if share else [value[..., i][mask[..., i]] for i in range(3)]
    mean, std = (x.flatten() for x in statistics(experiment))
    torch.testing.assert_close(mean, torch.stack([part.mean() for part in parts]))
    expected = torch.stack([part.var(correction=0).clamp(min=1e-2).sqrt() for part in parts])
    torch.testing.assert_close(std, expected)


def test_statistics_belong_to_a_group(run):
    """Also where groups form a team and train their policies with the last one."""
    experiment = run(configured(HappoConfig, **RUNNING, teams=[["scout", "workers"]]), task=CrewTask())
    for group in experiment.group_map:
        weight = experiment.losses[group].critic_network_params["running_weight"]
        assert weight.item() == pytest.approx(1 - BETA**2)
    assert statistics(experiment, "scout") != statistics(experiment, "workers")


def test_in_an_ensemble(run):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    task.config.update(max_steps=5)
    config = {"adversary": configured(MarsConfig, **RUNNING), "agent": MappoConfig.get_from_yaml()}
    experiment = run(EnsembleAlgorithmConfig(config), task=task)
    assert experiment.losses["adversary"].critic_network_params["running_weight"] > 0
    assert "train_agent_value_norm_mean" not in scalars(experiment)


@pytest.mark.parametrize("name", ["mars", "gpae"])
def test_recurrent_critics(name, run):
    model = GruConfig(**RNN)
    experiment = run(Case(name, RUNNING).config(), model=model, critic=model, on_policy_n_envs_per_worker=8)
    assert statistics(experiment)[0] != 0
    assert all(p.isfinite().all() for p in experiment.losses["agents"].parameters())


def test_targets_that_are_not_finite_leave_the_statistics(make_experiment):
    """The loss is not finite either, and its step is dropped; the run goes on from what it had."""
    from runtime.test_resume import train

    experiment = make_experiment(configured(MarsConfig, **RUNNING))
    batch = next(iter(experiment.collector))
    train(experiment, batch.clone())
    before = statistics(experiment)
    bad = batch.clone()
    bad["next", "agents", "reward"].fill_(1e38)
    experiment.algorithm.process_batch("agents", bad)
    for one, other in zip(before, statistics(experiment), strict=True):
        assert torch.equal(one, other)


def test_none_is_the_critic_as_it_was(make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml())
    loss = experiment.losses["agents"]
    assert not isinstance(loss.critic_network, NormalizedCritic)
    assert not [name for name in loss.state_dict() if "running" in name]
    assert loss.tensor_keys.value == ("agents", "state_value")


def test_no_optimizer_has_the_statistics(make_experiment):
    for case in (Case("mars", RUNNING), Case("happo", RUNNING), Case("hatrpo", RUNNING)):
        for optimizer in make_experiment(case.config()).optimizers["agents"].values():
            assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_the_statistics_wait_for_nothing(shape, recorder):
    network = TensorDictModule(torch.nn.Linear(4, 1, device="cuda"), ["observation"], ["state_value"])
    critic = NormalizedCritic(network, "state_value", "normalized_value", shape, "cuda")
    batch = TensorDict(observation=torch.randn(5, 3, 4, device="cuda"), batch_size=(5, 3))
    mask = torch.ones(5, 3, dtype=torch.bool, device="cuda")
    with recorder.recording():
        critic.update(critic(batch)["state_value"], mask)
        critic.normalize(batch["state_value"])
    assert recorder.launches.total() > 0
    assert not recorder.waits


@pytest.mark.gpu
@kinds
def test_on_a_gpu(case, run):
    experiment = run(case.config(), train_device="cuda", buffer_device="cuda", sampling_device="cuda")
    assert statistics(experiment)[0].device.type == "cuda"
    assert all(p.isfinite().all() for p in experiment.losses["agents"].parameters())
