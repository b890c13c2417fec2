"""What is not finite: data is refused before any group trains, a bad step changes nothing."""

import copy
import gc
import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment
from cases import CASES, MAIN, by_family
from conftest import policy_parameters, scalars
from environments import StandInTask

from benchmarl_trust import HappoConfig, Mars, MarsConfig
from benchmarl_trust.runtime.guard import KEY, _norm_limit

family_cases = pytest.mark.parametrize("case", by_family(CASES))
sequential_cases = pytest.mark.parametrize("case", by_family(case for case in MAIN if case.teams))


class Spoil(Callback):
    """Puts a value into one entry of the batch that is collected in one iteration; the user's, so it comes first."""

    def __init__(self, key, value, iteration=1):
        super().__init__()
        self.key, self.value, self.iteration = key, value, iteration

    def on_batch_collected(self, batch):
        if self.experiment.n_iters_performed == self.iteration:
            batch.get(self.key)[1, 2] = self.value
            self.before = everything(self.experiment)


def everything(experiment):
    """Parameters and optimizer states of all groups."""
    state = {f"loss/{g}/{n}": p for g, loss in experiment.losses.items() for n, p in loss.named_parameters()}
    for group, optimizers in experiment.optimizers.items():
        for name, optimizer in optimizers.items():
            for i, moments in optimizer.state_dict()["state"].items():
                state |= {f"{group}/{name}/{i}/{k}": v for k, v in moments.items()}
    return {name: value.detach().clone() for name, value in state.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def speaker_listener():
    """Two groups; listener is trained second."""
    task = VmasTask.SIMPLE_SPEAKER_LISTENER.get_from_yaml()
    task.config.update(max_steps=5)
    return task


@family_cases
def test_bad_data_is_refused_before_any_group_trains(case, make_experiment):
    key = ("next", "listener", "reward")
    spoil = Spoil(key, float("nan"))
    experiment = make_experiment(
        case.config(), task=speaker_listener(), callbacks=[spoil], checkpoint_interval=40, evaluation=True
    )
    with pytest.raises(ValueError, match="NaN or infinite") as error:
        experiment.run()
    assert str(key) in str(error.value)
    assert "[1, 2" in str(error.value)
    assert "checkpoint_40.pt" in str(error.value)
    assert_equal(everything(experiment), spoil.before)
    # What was logged and saved before stays whole.
    assert len(scalars(experiment)["train_listener_loss_critic"]) == 1
    assert torch.load(experiment.folder_name / "checkpoints" / "checkpoint_40.pt")
    assert json.loads((experiment.folder_name / f"{experiment.name}.json").read_text())["vmas"][
        "simple_speaker_listener"
    ]


@family_cases
def test_each_kind_of_bad_data_is_refused_by_name(case, make_experiment):
    experiment = make_experiment(case.config(), task=speaker_listener())
    batch = next(iter(experiment.collector))
    for entry in ("observation", "reward", "action", "log_prob"):
        key = ("next", "listener", entry) if entry == "reward" else ("listener", entry)
        for value in (math.nan, math.inf, -math.inf):
            bad = batch.clone()
            bad.get(key)[1, 2] = value
            with pytest.raises(ValueError, match="NaN or infinite") as error:
                experiment._on_batch_collected(bad)
            assert f"entries: {key}" in str(error.value)
    experiment._on_batch_collected(batch)


class SpoilAbsent(Callback):
    def on_batch_collected(self, batch):
        absent = ~batch["agents", "mask"]
        assert absent.any()
        batch["agents", "log_prob"][absent] = -torch.inf
        self.seen = True


def test_what_absent_agents_carry_is_not_looked_at(run):
    spoil = SpoilAbsent()
    experiment = run(MarsConfig.get_from_yaml(), task=StandInTask(absent=True), callbacks=[spoil])
    assert spoil.seen
    assert scalars(experiment)["train_agents_skipped_steps"] == [0, 0]
    assert all(p.isfinite().all() for p in policy_parameters(experiment).values())


def break_loss(experiment, group, name, iterations):
    """Make a loss of one group non-finite in its first step of the given iterations."""
    algorithm, original = experiment.algorithm, experiment.algorithm.process_loss_vals
    done = set()

    def process_loss_vals(which, loss_vals):
        loss_vals = original(which, loss_vals)
        now = experiment.n_iters_performed
        if which == group and now in iterations and now not in done:
            done.add(now)
            loss_vals[name] = loss_vals[name] * float("nan")
        return loss_vals

    algorithm.process_loss_vals = process_loss_vals


@family_cases
@pytest.mark.parametrize("name", ["loss_objective", "loss_critic"])
def test_a_bad_step_changes_nothing_and_is_counted(case, name, make_experiment):
    if case.sequential and name == "loss_objective":
        pytest.skip("the policy phase sees to its own steps: test_sequential.py")
    experiment = make_experiment(case.config(), on_policy_n_minibatch_iters=1, on_policy_minibatch_size=40)
    states = []

    class Record(Callback):
        def on_train_end(self, training_td, group):
            states.append(everything(self.experiment))

    record = Record()
    record.experiment = experiment
    experiment.callbacks = [*experiment.callbacks, record]
    break_loss(experiment, "agents", name, {1})
    experiment.run()
    part, other = ("actor", "critic") if name == "loss_objective" else ("critic", "actor")

    def of(state, which):
        names = {"actor": "loss_objective", "critic": "loss_critic"}
        return {k: v for k, v in state.items() if f"{which}_network" in k or names[which] in k}

    assert_equal(of(states[0], part), of(states[1], part))
    assert any(not torch.equal(of(states[0], other)[k], v) for k, v in of(states[1], other).items())
    assert scalars(experiment)["train_agents_skipped_steps"] == [0, 1]


def test_a_loss_that_is_infinite_with_a_finite_gradient_is_dropped_too(make_experiment):
    algorithm = make_experiment(MarsConfig.get_from_yaml()).algorithm
    from tensordict import TensorDict

    weight = torch.ones(1, requires_grad=True)
    vals = TensorDict(loss_objective=weight.sum() + torch.inf, loss_entropy=torch.tensor(0.0), loss_critic=weight.sum())
    out = algorithm.process_loss_vals("agents", vals)
    assert torch.autograd.grad(out["loss_objective"], weight, retain_graph=True)[0].isnan().all()
    assert torch.autograd.grad(out["loss_critic"], weight)[0] == 1


class Renamed(Mars):
    """MARS with a name for its policy's optimizer that looks like one of a policy phase."""

    NAME = "loss_objective_agent_0"

    def _get_parameters(self, group, loss):
        parameters = super()._get_parameters(group, loss)
        return {self.NAME: parameters.pop("loss_objective"), **parameters}

    def process_loss_vals(self, group, loss_vals):
        return super().process_loss_vals(group, loss_vals).rename_key_("loss_objective", self.NAME)


class RenamedConfig(MarsConfig):
    @staticmethod
    def associated_class():
        return Renamed


def renamed():
    return RenamedConfig(**vars(MarsConfig.get_from_yaml()))


def test_a_name_decides_nothing_about_who_sees_to_an_optimizer(make_experiment):
    """Beside HAPPO, whose optimizer of this name is its policy phase's, BenchMARL's loop steps another's."""
    ensemble = EnsembleAlgorithmConfig({"speaker": HappoConfig.get_from_yaml(), "listener": renamed()})
    experiment = make_experiment(ensemble, task=speaker_listener(), max_n_iters=3)
    guard = experiment.algorithm.algorithms_map["speaker"].guard
    assert guard.policy_phase["speaker"] == {Renamed.NAME}
    assert not guard.policy_phase["listener"]
    for group in ("speaker", "listener"):
        assert list(experiment.optimizers[group]) == [Renamed.NAME, "loss_critic"]
    hooks = {g: len(o[Renamed.NAME]._optimizer_step_pre_hooks) for g, o in experiment.optimizers.items()}
    assert hooks == {"speaker": 0, "listener": 1}
    leaf = experiment.optimizers["listener"][Renamed.NAME].param_groups[0]["params"][0]
    leaf.register_hook(lambda g: g * math.nan if experiment.n_iters_performed == 1 else g)
    experiment.run()
    assert all(p.isfinite().all() for p in policy_parameters(experiment).values())
    steps = experiment.config.n_optimizer_steps(True) * 2  # of two minibatches
    assert scalars(experiment)["train_listener_skipped_steps"] == [0, steps, 0]
    assert scalars(experiment)["train_speaker_skipped_steps"] == [0, 0, 0]


def test_three_bad_iterations_in_a_row_end_the_run(make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), max_n_iters=9, checkpoint_interval=40)
    break_loss(experiment, "agents", "loss_critic", {1, 2, 4, 5, 6})
    with pytest.raises(RuntimeError, match="3 iterations in a row") as error:
        experiment.run()
    assert experiment.n_iters_performed == 6
    assert "checkpoint_240.pt" in str(error.value)
    assert scalars(experiment)["train_agents_skipped_steps"] == [0, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("bad", [1, 2])
def test_a_resumed_run_counts_bad_iterations_on(bad, make_experiment):
    """So many of three are before the checkpoint, and the rest after it."""
    experiment = make_experiment(MarsConfig.get_from_yaml(), max_n_iters=3, checkpoint_at_end=True)
    break_loss(experiment, "agents", "loss_critic", range(3 - bad, 3))
    experiment.run()
    assert scalars(experiment)["train_agents_skipped_steps"] == [0] * (3 - bad) + [1] * bad
    file = experiment.folder_name / "checkpoints" / "checkpoint_120.pt"
    resumed = Experiment.reload_from_file(str(file), experiment_patch={"max_n_iters": 9})
    break_loss(resumed, "agents", "loss_critic", range(9))
    with pytest.raises(RuntimeError, match="3 iterations in a row"):
        resumed.run()
    assert resumed.n_iters_performed == 5 - bad


def test_a_checkpoint_without_the_guards_entry_counts_from_zero(make_experiment):
    state = make_experiment(MarsConfig.get_from_yaml()).state_dict()
    del state[KEY]
    resumed = make_experiment(MarsConfig.get_from_yaml(), max_n_iters=9)
    resumed.algorithm.guard._streak["agents"] = 2
    resumed.load_state_dict(state)
    break_loss(resumed, "agents", "loss_critic", range(9))
    with pytest.raises(RuntimeError, match="3 iterations in a row"):
        resumed.run()
    assert resumed.n_iters_performed == 2


def spoil_first_agent(experiment, group, iterations):
    """NaN into the gradient of a group's first agent, in the policy phases of the given iterations."""
    leaf = experiment.algorithm._policies[group].agents[0].parameters[0]
    leaf.register_hook(lambda g: g * math.nan if experiment.n_iters_performed in iterations else g)


@pytest.mark.parametrize("group", ["speaker", "listener"])
@sequential_cases
def test_a_turn_of_any_group_of_a_team_counts_for_its_own_iteration(case, group, make_experiment):
    """Also in the last iteration. The team's turns are taken with its last group, the listener."""
    experiment = make_experiment(case.config(teams=[["speaker", "listener"]]), task=speaker_listener(), max_n_iters=4)
    spoil_first_agent(experiment, group, {1, 3})
    experiment.run()
    other = "speaker" if group == "listener" else "listener"
    assert scalars(experiment)[f"train_{group}_skipped_steps"] == [0, 1, 0, 1]
    assert scalars(experiment)[f"train_{other}_skipped_steps"] == [0, 0, 0, 0]
    assert not experiment.algorithm.guard.skipped


def test_three_bad_iterations_of_an_earlier_group_of_a_team_end_the_run_at_once(make_experiment):
    config = HappoConfig.get_from_yaml()
    config.teams = [["speaker", "listener"]]
    experiment = make_experiment(config, task=speaker_listener(), max_n_iters=5)
    spoil_first_agent(experiment, "speaker", {0, 1, 2})
    with pytest.raises(RuntimeError, match=r"Group speaker: .* 3 iterations in a row \(1 steps dropped in the last"):
        experiment.run()
    assert experiment.n_iters_performed == 2
    assert scalars(experiment)["train_speaker_skipped_steps"] == [1, 1, 1]


class FreezeListener(Callback):
    """The last group is trained no longer from the third iteration on."""

    def on_batch_collected(self, batch):
        if self.experiment.n_iters_performed == 2:
            del self.experiment.train_group_map["listener"]


@pytest.mark.parametrize("ensemble", [False, True])
def test_steps_are_counted_where_the_last_group_is_frozen(ensemble, make_experiment):
    config = HappoConfig.get_from_yaml()
    if ensemble:
        config = EnsembleAlgorithmConfig({"speaker": config, "listener": MappoConfig.get_from_yaml()})
    experiment = make_experiment(config, task=speaker_listener(), callbacks=[FreezeListener()], max_n_iters=4)
    leaf = experiment.optimizers["speaker"]["loss_critic"].param_groups[0]["params"][0]
    leaf.register_hook(lambda g: g * math.nan if experiment.n_iters_performed in (1, 3) else g)
    experiment.run()
    steps = experiment.config.n_optimizer_steps(True) * 2  # of two minibatches
    assert scalars(experiment)["train_speaker_skipped_steps"] == [0, steps, 0, steps]
    assert scalars(experiment)["train_listener_skipped_steps"] == [0, 0]


def test_own_callbacks_once_at_the_end_and_the_list_of_the_user_untouched(make_experiment):
    from benchmarl_trust.algorithms.simultaneous import PolicyMetrics
    from benchmarl_trust.runtime import FiniteGuard, LatestCheckpoint, ResumeState

    mine = [Callback()]
    config = MarsConfig.get_from_yaml()
    experiment = make_experiment(
        EnsembleAlgorithmConfig({"speaker": config, "listener": config}), task=speaker_listener(), callbacks=mine
    )
    assert len(mine) == 1
    added = [FiniteGuard, ResumeState, LatestCheckpoint, PolicyMetrics]
    assert [type(callback) for callback in experiment.callbacks] == [Callback, *added]
    # A list that is passed on to a second experiment brings it no callback of the first.
    first, second = SimpleNamespace(callbacks=mine), SimpleNamespace()
    guard = FiniteGuard.of(first)
    second.callbacks = first.callbacks
    assert FiniteGuard.of(first) is guard
    assert FiniteGuard.of(second) is not guard
    assert [callback.experiment for callback in (first.callbacks[-1], second.callbacks[-1])] == [first, second]


class SpoilObservationOfAbsent(Callback):
    def on_batch_collected(self, batch):
        batch["agents", "observation"][~batch["agents", "mask"]] = torch.nan


class SpoilRewardOfLeaving(Callback):
    """The agent is there when it acts, and gone when it is paid."""

    def on_batch_collected(self, batch):
        leaving = batch["agents", "mask"] & ~batch["next", "agents", "mask"]
        assert leaving.any()
        batch["next", "agents", "reward"][leaving] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "key"), [(SpoilObservationOfAbsent, "observation"), (SpoilRewardOfLeaving, "reward")]
)
def test_what_a_network_or_a_loss_would_read_is_looked_at(spoil, key, make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), task=StandInTask(absent=True), callbacks=[spoil()])
    with pytest.raises(ValueError, match=key):
        experiment.run()


@pytest.mark.parametrize("clip_grad_val", [None, 5.0])
@pytest.mark.parametrize("by_norm", [True, False], ids=["by norm", "by value"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bad_gradient_is_dropped_however_gradients_are_clipped(by_norm, clip_grad_val, value, make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), clip_grad_norm=by_norm, clip_grad_val=clip_grad_val)
    optimizer = experiment.optimizers["agents"]["loss_critic"]
    leaf = optimizer.param_groups[0]["params"][0]
    factor = torch.ones_like(leaf)
    factor.view(-1)[0] = value
    before = everything(experiment)
    (leaf * factor).sum().backward()
    experiment._grad_clip(optimizer)
    optimizer.step()
    assert_equal(everything(experiment), before)
    assert experiment.algorithm.guard.skipped == {"agents": 1}


clippings = pytest.mark.parametrize(
    ("by_norm", "clip_grad_val"),
    [(True, 5.0), (True, None), (False, 5.0), (False, None)],
    ids=["by norm", "none by norm", "by value", "none by value"],
)


def step_on(experiment, sizes):
    """One step of the critic as BenchMARL's loop takes it, on gradients whose entries have the given sizes."""
    optimizer = experiment.optimizers["agents"]["loss_critic"]
    leaves = optimizer.param_groups[0]["params"]
    sum((leaf * size).sum() for leaf, size in zip(leaves, sizes, strict=True)).backward()
    entries = torch.cat([leaf.grad.flatten() for leaf in leaves])
    norm = experiment._grad_clip(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return entries, norm


@clippings
@pytest.mark.parametrize("where", ["one tensor", "all tensors"])
def test_finite_entries_whose_norm_overflows_are_dropped(where, by_norm, clip_grad_val, make_experiment):
    """Once Adam has momentum, on which it would go on: clipped by an infinite norm, all gradients are zero."""
    experiment = make_experiment(MarsConfig.get_from_yaml(), clip_grad_norm=by_norm, clip_grad_val=clip_grad_val)
    leaves = experiment.optimizers["agents"]["loss_critic"].param_groups[0]["params"]
    step_on(experiment, [1.0] * len(leaves))
    before = everything(experiment)
    # Where all tensors are large, the norm of each is finite, 1.2e19, and that over all of them is not.
    large = [1.2e19 / math.sqrt(leaf.numel()) for leaf in leaves]
    sizes = [1e25] + [1.0] * (len(leaves) - 1) if where == "one tensor" else large
    assert (
        torch.cat([torch.full((leaf.numel(),), size) for leaf, size in zip(leaves, sizes, strict=True)])
        .isfinite()
        .all()
    )
    assert torch.tensor(1.2e19).square().isfinite()
    assert (torch.tensor(1.2e19).square() * 3).isinf()
    step_on(experiment, sizes)
    assert_equal(everything(experiment), before)
    assert experiment.algorithm.guard.skipped == {"agents": 1}
    step_on(experiment, [1.0] * len(leaves))
    after = everything(experiment)
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert experiment.algorithm.guard.skipped == {"agents": 1}


@clippings
def test_the_largest_gradients_that_pass_have_a_finite_norm(by_norm, clip_grad_val, make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), clip_grad_norm=by_norm, clip_grad_val=clip_grad_val)
    leaves = experiment.optimizers["agents"]["loss_critic"].param_groups[0]["params"]
    limit = _norm_limit(torch.float32)
    sizes = [0.99 * limit / math.sqrt(leaf.numel() * len(leaves)) for leaf in leaves]
    before = everything(experiment)
    entries, norm = step_on(experiment, sizes)
    assert entries.isfinite().all()
    assert norm == pytest.approx(0.99 * limit, rel=1e-4)
    assert not experiment.algorithm.guard.skipped
    after = everything(experiment)
    assert all(value.isfinite().all() for value in after.values())
    assert all(
        not torch.equal(after[name], value)
        for name, value in before.items()
        if "critic" in name and "target" not in name
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_number_of_tensors_at_the_limit_overflows(dtype):
    for tensors in (1, 20, 340, 100_000):
        norms = torch.full((tensors,), _norm_limit(dtype) / math.sqrt(tensors), dtype=dtype)
        norm = torch.linalg.vector_norm(norms)
        assert norm.isfinite()
        largest = 65504 if dtype == torch.float16 else math.sqrt(torch.finfo(dtype).max)
        assert norm.item() == pytest.approx(0.5 * largest, rel=0.05)


@clippings
def test_ordinary_steps_stay_bit_for_bit_what_they_are(by_norm, clip_grad_val, make_experiment):
    """A guarded experiment and one without any of its hooks end at the same parameters and moments."""
    results = []
    for guarded in (True, False):
        experiment = make_experiment(MarsConfig.get_from_yaml(), clip_grad_norm=by_norm, clip_grad_val=clip_grad_val)
        optimizers = list(experiment.optimizers["agents"].values())
        leaves = [leaf for optimizer in optimizers for leaf in optimizer.param_groups[0]["params"]]
        assert all(len(leaf._post_accumulate_grad_hooks) == 1 for leaf in leaves)
        if not guarded:
            for optimizer in optimizers:
                optimizer._optimizer_step_pre_hooks.clear()
            for leaf in leaves:
                leaf._post_accumulate_grad_hooks.clear()
        experiment.run()
        results.append(everything(experiment))
    assert_equal(*results)


class FreezeFirstLayer(MarsConfig):
    """The first parameters of policy and critic are not trained."""

    def get_algorithm(self, experiment):
        algorithm = super().get_algorithm(experiment)
        original = algorithm.get_parameters

        def get_parameters(group):
            parameters = {name: list(leaves) for name, leaves in original(group).items()}
            for leaves in parameters.values():
                leaves[0].requires_grad_(False)
            return parameters

        algorithm.get_parameters = get_parameters
        return algorithm


def test_parameters_that_are_not_trained_are_left_alone(make_experiment):
    experiment = make_experiment(FreezeFirstLayer(**vars(MarsConfig.get_from_yaml())))
    frozen = [o.param_groups[0]["params"][0] for o in experiment.optimizers["agents"].values()]
    before = [leaf.clone() for leaf in frozen]
    experiment.run()
    assert len(frozen) == 2
    assert all(torch.equal(leaf, old) for leaf, old in zip(frozen, before, strict=True))
    assert scalars(experiment)["train_agents_skipped_steps"] == [0, 0]
    clone = copy.deepcopy(experiment.policy)  # what collectors and evaluations do: the hooks stand in nobody's way
    assert all(torch.equal(p, q) for p, q in zip(clone.parameters(), experiment.policy.parameters(), strict=True))


def test_a_sum_of_rewards_may_keep_the_nan_of_an_agent_that_was_absent(make_experiment):
    """An agent that joins an episode later: what it was paid before is NaN, and so is its episode's sum ever after."""
    experiment = make_experiment(MarsConfig.get_from_yaml())
    batch = next(iter(experiment.collector))
    mask = torch.ones(batch["agents", "action"].shape[:-1], dtype=torch.bool)
    mask[:, :2, 1] = False
    batch["agents", "mask"] = mask
    batch["next", "agents", "reward"][:, :2, 1] = math.nan
    batch["next", "agents", "episode_reward"][:, :, 1] = math.nan
    experiment.algorithm.guard.on_batch_collected(batch)
    assert experiment.algorithm.process_batch("agents", batch)["agents", "advantage"].isfinite().all()
    batch["next", "agents", "reward"][0, 3, 1] = math.nan
    with pytest.raises(ValueError, match="reward"):
        experiment.algorithm.guard.on_batch_collected(batch)


@pytest.mark.parametrize("config", [MarsConfig, HappoConfig], ids=["mars", "happo"])
def test_an_experiment_is_freed(config, run):
    """Its files and memory go with it: a hook of ours on a parameter must not hold it."""
    experiment = run(config.get_from_yaml())
    gone = weakref.ref(experiment)
    del experiment
    gc.collect()
    assert gone() is None
