"""The page on extending: its gain, entered as it says, trains in loop and sweep; its schedule runs."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import policy_parameters, scalars

from benchmarl_trust import HappoConfig, MarsConfig
from benchmarl_trust.functional import SURROGATES
from benchmarl_trust.functional import surrogate as gains

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def blocks() -> list[str]:
    """The page's Python: gain, its entry, schedule, its configuration, preset."""
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def huber(monkeypatch):
    """The page's gain under its name, as if the file had been edited."""
    code, entry, *_ = blocks()
    names = dict(vars(gains))
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


@pytest.fixture
def schedule():
    """The page's module for a schedule."""
    module = types.ModuleType("equal_length")
    _, _, code, config, _ = blocks()
    sys.modules[module.__name__] = module  # where dataclasses look up annotations
    exec(code + config, vars(module))
    yield module
    del sys.modules[module.__name__]


def happo_values() -> dict:
    """The values of the page's yaml file."""
    sentence = PAGE.read_text().partition("that of `happo` without")[2].partition("and with")[0]
    own = re.findall(r"`(\w+)`", sentence)
    return {key: value for key, value in vars(HappoConfig.get_from_yaml()).items() if key not in own}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_the_pages_schedule_runs(share, schedule, make_experiment):
    config = schedule.EqualLengthConfig(**happo_values(), length=0.05)
    experiment = make_experiment(config, max_n_iters=1, share_policy_params=share)
    before = policy_parameters(experiment)
    experiment.run()
    after = policy_parameters(experiment)
    squares = [(after[name] - before[name]).square().reshape(1 if share else 3, -1).sum(1) for name in before]
    moved = sum(squares).sqrt()
    if share:  # one network makes the steps of all three
        assert 0.05 < moved < 0.15 + 1e-6
    else:
        torch.testing.assert_close(moved, torch.full((3,), 0.05), rtol=1e-4, atol=0)
    logged = scalars(experiment)
    assert logged["train_agents_policy_factor_mean_position_0"] == [1]
    assert logged["train_agents_policy_kl"][0] > 0


def test_the_pages_key_is_checked(schedule, make_experiment):
    config = schedule.EqualLengthConfig(**happo_values(), length=-1.0)
    with pytest.raises(ValueError, match=r"length=-1\.0 must be"):
        make_experiment(config)
