"""What is not finite: data is refused before any group trains, a bad step changes nothing."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback
from cases import CASES, by_family
from conftest import policy_parameters, scalars
from environments import StandInTask

from benchmarl_trust import MarsConfig

family_cases = pytest.mark.parametrize("case", by_family(CASES))


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


def test_three_bad_iterations_in_a_row_end_the_run(make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), max_n_iters=9, checkpoint_interval=40)
    break_loss(experiment, "agents", "loss_critic", {1, 2, 4, 5, 6})
    with pytest.raises(RuntimeError, match="3 iterations in a row") as error:
        experiment.run()
    assert experiment.n_iters_performed == 6
    assert "checkpoint_240.pt" in str(error.value)
    assert scalars(experiment)["train_agents_skipped_steps"] == [0, 1, 1, 0, 1, 1, 1]


def test_own_callbacks_once_at_the_end_and_the_list_of_the_user_untouched(make_experiment):
    from benchmarl.algorithms import EnsembleAlgorithmConfig

    from benchmarl_trust.algorithms.common import RatioExtremes
    from benchmarl_trust.algorithms.guard import FiniteGuard
    from benchmarl_trust.algorithms.resume import LatestCheckpoint, ResumeState

    mine = [Callback()]
    config = MarsConfig.get_from_yaml()
    experiment = make_experiment(
        EnsembleAlgorithmConfig({"speaker": config, "listener": config}), task=speaker_listener(), callbacks=mine
    )
    assert len(mine) == 1
    added = [FiniteGuard, ResumeState, LatestCheckpoint, RatioExtremes]
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
