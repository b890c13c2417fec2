"""The page on extending: its gain, entered as it says, trains in BenchMARL's loop and in the sweep."""

import re
from pathlib import Path

import pytest
import torch
from conftest import policy_parameters

from benchmarl_trust import HappoConfig, MarsConfig
from benchmarl_trust.algorithms.common import TrustRegion
from benchmarl_trust.functional import SURROGATES
from benchmarl_trust.functional import surrogate as module

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def huber(monkeypatch):
    """The page's gain under its name, as if the file had been edited."""
    code, entry, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = dict(vars(module))
    exec(code, names)
    for name, surrogate in eval("{" + entry + "}", names).items():
        monkeypatch.setitem(SURROGATES, name, surrogate)
        monkeypatch.setattr(TrustRegion, "surrogates", (*TrustRegion.surrogates, name))
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


def test_the_pages_gain_has_the_slope_of_the_others(huber):
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64)
    SURROGATES[huber].gain(x, advantage, (0.1, 0.3)).sum().backward()
    torch.testing.assert_close(x.grad, advantage)
