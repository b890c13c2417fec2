"""How far one iteration moves a policy at a given ε, under each surrogate gain: the README's table of equal ε.

A Gaussian action of unit deviation, whose mean an iteration may shift by δ: the log-ratio is x = δ a - δ²/2, the KL
divergence δ²/2. The advantage A is normal and correlates by R with a. Printed is the KL of the shift that maximises the
expected gain, at ε, and the ε at which another gain has the clip's KL. In any number of dimensions the same holds
along the direction of the shift.

    python benchmarks/equal_epsilon.py    # a minute on two cores
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarl_trust.functional import SURROGATES


def best_kl(name: str, correlation: float, epsilon: float, points: int = 801) -> float:
    """The KL of the best shift, by an integral over a grid of (a, noise)."""
    x = torch.linspace(-6, 6, points, dtype=torch.float64)
    density = (-x.square() / 2).exp() / (-x.square() / 2).exp().sum()
    action, noise = torch.meshgrid(x, x, indexing="ij")
    weight = torch.outer(density, density)
    advantage = correlation * action + (1 - correlation**2) ** 0.5 * noise

    def gain(shift: float) -> float:
        log_ratio = shift * action - shift**2 / 2
        return float((weight * SURROGATES[name].gain(log_ratio, advantage, epsilon)).sum())

    low, high = 0.0, 0.8
    for _ in range(32):  # the expected gain rises to its maximum and falls behind it
        third = (high - low) / 3
        low, high = (low + third, high) if gain(low + third) < gain(high - third) else (low, high - third)
    return (low + high) ** 2 / 8


def epsilon_for(kl: float, kl_at: Callable[..., float], high: float, low: float = 0.05) -> float | None:
    """The ε between these two at which ``kl_at(epsilon=ε)``, which grows with ε, is this; None if there is none."""
    if kl_at(epsilon=high) < kl:
        return None
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(epsilon=middle) < kl else (low, middle)
    return (low + high) / 2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.2)
    parser.add_argument("--correlations", type=float, nargs="+", default=[0.1, 0.3, 0.5], metavar="R")
    parser.add_argument("--points", type=int, default=801, help="of the grid, in each direction")
    args = parser.parse_args()
    others = {"quadratic": 0.999, "reciprocal": 0.499, "log": 2.0}
    for correlation in args.correlations:
        kl = {name: best_kl(name, correlation, args.epsilon, args.points) for name in ("clip", *others)}
        print(f"R = {correlation}: KL " + ", ".join(f"{name} {value:.5f}" for name, value in kl.items()))
        for name, largest in others.items():
            kl_at = partial(best_kl, name, correlation, points=args.points)
            found = epsilon_for(kl["clip"], kl_at, largest)
            print(f"    ε of {name} for the clip's KL: " + ("none" if found is None else f"{found:.2f}"), flush=True)


if __name__ == "__main__":
    main()
