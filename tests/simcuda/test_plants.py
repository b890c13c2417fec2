"""Wrong and dropped devices, planted one by one into the package: small runs on the simulated device refuse them."""

import pytest
from cases import configured

from benchmarl_trust import ALGORITHMS
from benchmarl_trust.environments import DifferentialGame, MatrixGame
from simcuda.plants import planted
from simcuda.rules import DeviceMismatchError

pytestmark = pytest.mark.gpu

DIFFERENTIAL = {"start": [1.5, 1.5], "low": 0.0, "high": 7.0, "action_range": 5.5}


def small(make_experiment, name, sampling, **keys):
    """One iteration of an algorithm that trains on the GPU."""
    devices = {"sampling_device": sampling, "train_device": "cuda", "buffer_device": "cuda"}
    make_experiment(configured(ALGORITHMS[name], **keys), max_n_iters=1, **devices).run()


RUNS = {
    "gpae": lambda make: small(make, "gpae", "cpu"),
    "a2po": lambda make: small(make, "a2po", "cpu"),
    "happo": lambda make: small(make, "happo", "cpu", entropy_coef=0.01),
    "mars": lambda make: small(make, "mars", "cpu", normalize_advantage="batch"),
    "gpae, sampled on the GPU": lambda make: small(make, "gpae", "cuda"),
    "hatrpog": lambda make: small(make, "hatrpog", "cpu", normalize_advantage="batch", cg_iters=2),
    "differential": lambda make: DifferentialGame(**DIFFERENTIAL, num_envs=2, device="cuda").rollout(2),
    "climbing": lambda make: MatrixGame([[1, 0], [0, 2]], num_envs=2, device="cuda").rollout(2),
}

PLANTS = [
    ("gpae", "value/gpae.py", "torch.arange(length, device=done.device)", "torch.arange(length)"),
    ("gpae", "value/gpae.py", "length - 1, device=done.device)", "length - 1)"),
    ("gpae", "value/critic.py", "dtype=torch.bool, device=features.device)", "dtype=torch.bool)"),
    ("gpae", "algorithms/metrics.py", "dtype=torch.bool, device=flat.device)", "dtype=torch.bool)"),
    ("gpae", "algorithms/estimators.py", "device=algorithm.device,\n", "device='cpu',\n"),
    ("a2po", "updates/order.py", "generator=generator, device=score.device)\n", "generator=generator)\n"),
    ("a2po", "updates/order.py", "device=score.device, dtype=torch.float64)", "dtype=torch.float64)"),
    ("happo", "updates/gradient.py", "generator=generator, device=generator.device)", "generator=generator)"),
    (
        "happo",
        "updates/sweep.py",
        "torch.zeros_like(old_log_prob if rows",
        "torch.zeros(len(old_log_prob)) + (0 if rows",
    ),
    ("happo", "policy/head.py", "= self.log_half_width.to(like)", "= self.log_half_width"),
    ("happo", "algorithms/sequential.py", "torch.Generator(self.device)", "torch.Generator()"),
    ("happo", "algorithms/sequential.py", "generator=self.generator, device=self.device)", "generator=self.generator)"),
    ("hatrpog", "functional/conjugate_gradient.py", "(torch.zeros_like(b), ", "(torch.zeros(b.shape), "),
    ("differential", "environments/trust_games.py", "dtype=torch.float32, device=device)", "dtype=torch.float32)"),
    ("differential", "environments/trust_games.py", "flag.clone()).to(device)", "flag.clone(), device=device)"),
    ("gpae, sampled on the GPU", "algorithms/estimators.py", '[group].clone().to("cpu")', "[group].clone()"),
    ("mars", "functional/advantage.py", "torch.ones_like(advantage, dtype", "torch.ones(advantage.shape, dtype"),
    (
        "hatrpog",
        "algorithms/sequential.py",
        'torch.ones_like(batch[group, "advantage"][..., 0], dtype',
        'torch.ones(batch[group, "advantage"].shape[:-1], dtype',
    ),
    ("climbing", "environments/trust_games.py", "tensor.to(device)", "tensor"),
]


@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_refused_without_a_plant(run, make_experiment, recorder):
    RUNS[run](make_experiment)


@pytest.mark.parametrize(("run", "file", "text", "replacement"), PLANTS)
def test_a_planted_device_is_refused(run, file, text, replacement, make_experiment, recorder):
    with (
        planted(file, text, replacement),
        pytest.raises((DeviceMismatchError, RuntimeError), match=r"device|generator"),
    ):
        RUNS[run](make_experiment)


def test_a_plant_is_taken_out_again():
    before = DifferentialGame.__init__.__code__
    with planted("environments/trust_games.py", "self.low, self.high = low, high", "self.low, self.high = high, low"):
        assert DifferentialGame(**DIFFERENTIAL).low == 7
    assert DifferentialGame(**DIFFERENTIAL).low == 0
    assert DifferentialGame.__init__.__code__ is before


def test_there_are_enough():
    assert len(PLANTS) >= 15
