"""``target_kl`` ends an iteration's epochs: a tiny one after the first, a huge one never, one between in between."""

import math

import pytest
import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from cases import CASES, Case, by_family
from conftest import policy_parameters, scalars
from environments import StandInTask
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarl_trust import MarsConfig
from benchmarl_trust.algorithms.kl_stop import KlStop

GRADIENT = [case for case in CASES if not case.natural]
cases = pytest.mark.parametrize("case", by_family(GRADIENT))
sharing = pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
TINY, HUGE = 1e-12, 1e9


def epochs_of(case, epochs):
    """Keys and settings by which a policy makes so many epochs."""
    return ({"actor_epochs": epochs}, {}) if case.sequential else ({}, {"on_policy_n_minibatch_iters": epochs})


def run_epochs(run, case, epochs, target_kl=None, **settings):
    keys, more = epochs_of(case, epochs)
    return run(case.config(target_kl=target_kl, **keys), **{"lr": 0.02, "max_n_iters": 1, **settings, **more})


def equal(one, other):
    one, other = policy_parameters(one), policy_parameters(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@cases
@sharing
def test_a_tiny_one_makes_the_first_epoch_and_a_huge_one_all(case, share, run):
    one, three = (run_epochs(run, case, epochs, share_policy_params=share) for epochs in (1, 3))
    tiny, huge = (run_epochs(run, case, 3, target, share_policy_params=share) for target in (TINY, HUGE))
    assert equal(one, tiny)
    assert not equal(one, three)
    for p, q in zip(three.losses["agents"].parameters(), huge.losses["agents"].parameters(), strict=True):
        assert torch.equal(p, q)
    for experiment, epochs in ((tiny, 1), (huge, 3)):
        logged = scalars(experiment)
        assert {name: values for name, values in logged.items() if "epochs" in name} == {
            f"train_agents_policy_epochs{agent}": [epochs]
            for agent in ("", *(f"_agent_{i}" for i in range(3) if case.sequential))
        }
        trained = [value for name, values in logged.items() if name.startswith("train") for value in values]
        assert all(map(math.isfinite, trained))
    assert scalars(tiny)["train_agents_policy_kl"] == scalars(one)["train_agents_policy_kl"]
    assert "train_agents_policy_epochs" not in scalars(three)


@pytest.mark.parametrize(("name", "share"), [("mars", False), ("happo", False), ("happo", True)])
def test_one_between_ends_with_the_epoch_that_exceeds_it(name, share, run):
    """By the first agent's KL where each has a turn, which is not of the others'; by the mean else."""
    case = Case(name, {"order": "fixed"} if name == "happo" else {})
    column = "train_agents_policy_kl" + ("_agent_0" if name == "happo" and not share else "")
    settings = {"share_policy_params": share, "lr": 0.003}
    one, two, three = (run_epochs(run, case, epochs, **settings) for epochs in (1, 2, 3))
    first, second, third = (scalars(experiment)[column][0] for experiment in (one, two, three))
    assert first < second < third
    stopped = run_epochs(run, case, 3, (first + second) / 2, **settings)
    logged = scalars(stopped)
    assert logged[column] == [second]
    assert logged[column.replace("kl", "epochs")] == [2]
    if name == "mars" or share:
        assert equal(stopped, two)


def test_each_agent_has_its_own_number_of_epochs(run):
    case = Case("happo", {"order": "fixed"})
    kls = [scalars(run_epochs(run, case, epochs, lr=0.01))["train_agents_policy_kl_agent_0"][0] for epochs in (1, 2)]
    experiment = run_epochs(run, case, 6, sum(kls) / 2, lr=0.01)
    logged = scalars(experiment)
    made = [logged[f"train_agents_policy_epochs_agent_{i}"][0] for i in range(3)]
    assert made[0] == 2
    assert logged["train_agents_policy_epochs"][0] == pytest.approx(sum(made) / 3)


def test_after_the_stop_the_policys_optimizer_rests_and_the_critics_goes_on(run):
    """Also for a policy that has moments already: Adam would go on by them."""
    experiment = run_epochs(run, Case("mars"), 4, TINY, max_n_iters=3)
    steps = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in experiment.optimizers["agents"].items()
    }
    assert steps == {"loss_objective": {3 * 2}, "loss_critic": {3 * 4 * 2}}  # of 2 minibatches an epoch
    logged = scalars(experiment)
    assert len(logged["train_agents_grad_norm_loss_objective"]) == 3
    one = scalars(run_epochs(run, Case("mars"), 1))
    expected = one["train_agents_grad_norm_loss_objective"][0] / 4  # a mean over all, 0 where none was taken
    assert logged["train_agents_grad_norm_loss_objective"][0] == pytest.approx(expected)
    for name in ("kl_approx", "ESS", "loss_objective", "entropy", "policy_ratio_max"):
        assert all(abs(value) < 100 for value in logged[f"train_agents_{name}"])


@pytest.mark.parametrize("case", by_family([Case("mars"), Case("happo"), Case("gpae", {"n_rollouts": 3})]))
@pytest.mark.parametrize("setting", ["absent", "masked", "gru"])
def test_absent_agents_masked_actions_and_recurrent_policies(case, setting, run):
    from test_smoke import MODELS

    tasks = {"absent": {"absent": True}, "masked": {"mask": True}, "gru": {}}
    settings = {"task": StandInTask(**tasks[setting]), "model": MODELS["gru"]() if setting == "gru" else None}
    settings |= {"max_n_iters": 2}
    one, tiny = (run_epochs(run, case, *how, **settings) for how in ((1,), (3, TINY)))
    assert scalars(tiny)["train_agents_policy_epochs"] == [1, 1]
    assert scalars(tiny)["train_agents_policy_kl"][0] == scalars(one)["train_agents_policy_kl"][0] > 0


@sharing
def test_the_agents_of_a_team_over_groups_stop_too(share, run):
    task = VmasTask.SIMPLE_SPEAKER_LISTENER.get_from_yaml()
    task.config.update(max_steps=5)
    case = Case("happo", {"teams": [["speaker", "listener"]]})
    logged = scalars(run_epochs(run, case, 3, TINY, task=task, share_policy_params=share))
    for group in ("speaker", "listener"):
        assert logged[f"train_{group}_policy_epochs"] == logged[f"train_{group}_policy_epochs_agent_0"] == [1]


def test_in_an_ensemble_the_other_group_goes_on(run):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    task.config.update(max_steps=5)
    configs = {"adversary": MarsConfig.get_from_yaml(), "agent": MappoConfig.get_from_yaml()}
    configs["adversary"].target_kl = TINY
    experiment = run(EnsembleAlgorithmConfig(configs), task=task, max_n_iters=1, on_policy_n_minibatch_iters=3)
    steps = [
        {int(state["step"]) for state in experiment.optimizers[group]["loss_objective"].state.values()}
        for group in ("adversary", "agent")
    ]
    assert steps == [{2}, {6}]
    assert [name for name in scalars(experiment) if "epochs" in name] == ["train_adversary_policy_epochs"]


class Waits(TorchDispatchMode):
    """Counts the numbers that the host takes of tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_a_check(make_experiment, monkeypatch):
    waits, checks = [], KlStop.on_train_step

    def counted(self, batch, group):
        with Waits() as mode:
            out = checks(self, batch, group)
        waits.append(mode.count)
        return out

    monkeypatch.setattr(KlStop, "on_train_step", counted)
    config = MarsConfig.get_from_yaml()
    config.target_kl = HUGE
    make_experiment(config, max_n_iters=1, on_policy_n_minibatch_iters=3).run()
    assert waits == [0, 1, 0, 1, 0, 0]  # after the last epoch there is nothing to decide
