"""Agents that are absent for a while: what they did reaches no number, and their values are true all the same."""

import pytest
import torch
from benchmarl.experiment import Callback
from cases import CASES, Case
from conftest import scalars
from environments import N_ACTIONS, CrewTask, StandIn, StandInTask

from benchmarl_trust import HappoConfig

#: All cases with separate policies; with a shared one those that have another kind of turn.
SHARING = [(case, False) for case in CASES] + [(Case("happo"), True), (Case("hatrpo"), True)]


########
# Values
########


class Leave(StandIn):
    """Agents are paid 1 a step for being there; the last ``leave`` of them are absent from step 2 on.

    All that they observe is the time, so what an absent agent's values must be is known: 0.
    """

    def __init__(self, leave, seed=0):
        super().__init__(absent=True, seed=seed)
        self.leave = leave

    def _observe(self):
        out = super()._observe()
        time = torch.tensor(min(self.step_count, N_ACTIONS - 1))
        out["agents", "observation"] = torch.nn.functional.one_hot(time, N_ACTIONS).float().expand(self.n_agents, -1)
        self.present = torch.arange(self.n_agents) < self.n_agents - self.leave * (self.step_count >= 2)
        out["agents", "mask"] = self.present
        return out

    def _rewards(self, tensordict):
        return {"agents": self.present.float().unsqueeze(-1)}


class LeaveTask(StandInTask):
    """:class:`Leave` as a task."""

    env = Leave


@pytest.mark.parametrize("leave", [1, 3], ids=["one agent", "the whole group"])
@pytest.mark.parametrize("name", ["mars", "happo"])
def test_values_of_absent_agents_are_trained(name, leave, run):
    """They are bootstrapped from. With a critic for each agent nothing else would hold them."""
    experiment = run(
        Case(name).config(share_param_critic=False),
        task=LeaveTask(leave=leave),
        max_n_iters=5,
        on_policy_n_minibatch_iters=10,
        on_policy_minibatch_size=40,
        lr=0.03,
    )
    loss, batch = experiment.losses["agents"], experiment.replay_buffers["agents"].storage[:40]
    with torch.no_grad(), loss.critic_network_params.to_module(loss.critic_network):
        value = loss.critic_network(batch.clone())["agents", "state_value"]
        error = (value - batch["agents", "value_target"]).square()
        torch.testing.assert_close(loss(batch)["loss_critic"], error.mean())
    absent = ~batch["agents", "mask"].unsqueeze(-1)
    assert absent.sum() == 40 * 3 / 5 * leave
    assert value[absent].abs().max() < 0.15


##########################
# What absent agents leave
##########################


class Spoil(Callback):
    """Marks an agent as absent on every other step, and leaves there what an environment might."""

    def __init__(self, value, reward):
        super().__init__()
        self.value, self.reward = value, reward

    def on_batch_collected(self, batch):
        absent = torch.zeros(batch["agents", "action"].shape[:-1], dtype=torch.bool)
        absent[:, ::2, 1] = True
        batch["agents", "mask"] = batch["next", "agents", "mask"] = ~absent
        batch["agents", "action"][absent] = batch["agents", "log_prob"][absent] = self.value
        batch["next", "agents", "reward"][absent] = self.reward


@pytest.mark.parametrize(("case", "share"), SHARING, ids=[f"{case.id}{'-shared' * share}" for case, share in SHARING])
def test_what_absent_agents_did_reaches_no_number(case, share, run):
    """Not a bit of it; and a reward that is no number counts as 0."""
    runs = []
    for spoil in (Spoil(torch.nan, torch.nan), Spoil(0.5, 0.0)):
        experiment = run(case.config(**case.entropy), callbacks=[spoil], share_policy_params=share)
        runs.append([p for loss in experiment.losses.values() for p in loss.parameters()])
        assert scalars(experiment)["train_agents_skipped_steps"] == [0, 0]
    for p, q in zip(*runs, strict=True):
        assert p.isfinite().all()
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["mars", "happo", "gpae"])
def test_a_finite_reward_counts_in_the_return_of_an_absent_agent(name, make_experiment):
    """A team's reward goes on after a death, and is part of what the last action was worth."""
    experiment = make_experiment(Case(name).config(), task=StandInTask(absent=True))
    batch = next(iter(experiment.collector))
    absent, reward = ~batch["agents", "mask"], batch["next", "agents", "reward"]
    targets = {}
    for value in (0.0, 1.0, torch.nan, torch.inf):
        reward[absent] = value
        torch.manual_seed(0)  # GPAE samples actions where an episode ends
        experiment.algorithm.guard.on_batch_collected(batch)
        out = experiment.algorithm.process_batch("agents", batch.clone())
        targets[value] = out["agents", "value_target"].reshape(-1, 5, 3)  # episodes of 5 steps, the last 3 without it
    decay = experiment.config.gamma * experiment.algorithm.lmbda
    expected = torch.tensor([sum(decay ** (k - t) for k in range(max(t, 2), 5)) for t in range(5)])
    change = targets[1.0] - targets[0.0]
    torch.testing.assert_close(change[..., 2], expected.expand(8, 5), rtol=1e-5, atol=1e-5)
    assert (change[..., :2] == 0).all()
    for value in (torch.nan, torch.inf):
        assert torch.equal(targets[value], targets[0.0])


class SpoilCrew(Callback):
    """An absent worker is paid nothing, or what is no number."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def on_batch_collected(self, batch):
        batch["next", "workers", "reward"][~batch["workers", "mask"]] = self.value


@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_a_team_is_paid_alike_if_those_present_are(value, run):
    config = HappoConfig.get_from_yaml()
    config.teams = [["scout", "workers"]]
    experiment = run(config, task=CrewTask(), callbacks=[SpoilCrew(value)], max_n_iters=1)
    assert scalars(experiment)["train_workers_skipped_steps"] == [0]
