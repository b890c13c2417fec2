"""The page on extending: its gain, entered as it says, trains in BenchMARL's loop and in the sweep."""

import re
from pathlib import Path

import pytest
import torch
from conftest import policy_parameters, scalars

from benchmarl_trust import HappoConfig, MarsConfig
from benchmarl_trust.algorithms.sequential import Sequential
from benchmarl_trust.functional import SURROGATES
from benchmarl_trust.functional import surrogate as module
from benchmarl_trust.updates import StepInfo, sweep

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def huber(monkeypatch):
    """The page's gain under its name, as if the file had been edited."""
    code, entry, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = dict(vars(module))
    exec(code, names)
    for name, surrogate in eval("{" + entry + "}", names).items():
        monkeypatch.setitem(SURROGATES, name, surrogate)
        return name


@pytest.mark.parametrize("config", [MarsConfig, HappoConfig])
def test_the_pages_gain_trains(config, huber, run):
    ends = []
    for surrogate in (huber, config.get_from_yaml().surrogate):
        settings = config.get_from_yaml()
        settings.surrogate = surrogate
        ends.append(policy_parameters(run(settings, lr=0.02)))
    assert all(p.isfinite().all() for p in ends[0].values())
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_pages_gain_is_what_its_entry_says(huber):
    surrogate, epsilon = SURROGATES[huber], (0.1, 0.3)
    low, high = surrogate.log_bounds(*epsilon)
    x = torch.tensor([0.0, 0.0, low, high, -3.0, 3.0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([-2.0, 0.5, -2.0, 0.5, -2.0, 0.5], dtype=torch.float64)
    surrogate.gain(x, advantage, epsilon).sum().backward()
    torch.testing.assert_close(x.grad[:4], torch.tensor([-2.0, 0.5, 0.0, 0.0], dtype=torch.float64))
    assert x.grad[4] > 0 > x.grad[5]  # outliers are pulled back


class Mine(Sequential):
    """The page's schedule, with a step that halves the agent's parameters."""

    def _sweep(self, team, agents, order):
        def step(agent, data, weight, place):
            for parameter in agent.policy.parameters:
                parameter.data.mul_(0.5)
            return StepInfo(weight.mean(), weight.mean())

        return sweep(agents, order, step, self.factor, epsilon=self.epsilon[1])


class MineConfig(HappoConfig):
    @staticmethod
    def associated_class():
        return Mine

    def get_algorithm(self, experiment):
        own = ("epsilon_by_position", "actor_epochs", "actor_minibatch_size")
        return Mine(**{key: value for key, value in vars(self).items() if key not in own}, experiment=experiment)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_the_pages_schedule_runs(share, make_experiment):
    config = MineConfig(**vars(HappoConfig.get_from_yaml()))
    experiment = make_experiment(config, max_n_iters=1, share_policy_params=share)
    before = policy_parameters(experiment)
    experiment.run()
    halved = 0.5 ** (3 if share else 1)  # one network is each agent's
    for name, parameter in policy_parameters(experiment).items():
        torch.testing.assert_close(parameter, before[name] * halved)
    logged = scalars(experiment)
    assert logged["train_agents_policy_factor_mean_position_0"] == [1]
    assert logged["train_agents_policy_kl"][0] > 0
