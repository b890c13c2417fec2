"""Where torch's internals are others, gpu tests are skipped with the reason; at the pinned version that is an error."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import pytest_configure

from simcuda import install


def configured(monkeypatch, version):
    def fail():
        raise install.UnknownTorchError("other internals")

    monkeypatch.setattr(install, "install", fail)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = SimpleNamespace(getoption=lambda name: name == "--simcuda")
    pytest_configure(config)
    return config


def test_another_torch_skips(monkeypatch):
    config = configured(monkeypatch, "2.99.0")
    assert not config.simulated
    assert config.no_gpu == "other internals"


@pytest.mark.skipif(not install.is_known(), reason="of torch as it is pinned, on Linux")
def test_the_pinned_torch_fails(monkeypatch):
    with pytest.raises(install.UnknownTorchError):
        configured(monkeypatch, torch.__version__)


def test_the_pinned_torch_is_known():
    constraints = Path(__file__).parents[2] / "constraints.txt"
    pinned = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    assert pinned.removeprefix("torch==").startswith(install.KNOWN)
