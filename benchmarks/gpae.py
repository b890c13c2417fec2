"""Times one iteration's training: GPAE, MAPPO with separate critics, and MAPPO with its one shared critic.

    python benchmarks/gpae.py --agents 4 8 16

All three train on the same collected batch (VMAS balance, 60 environments x 100 steps, MLPs), one after the other and
several times over, in one process; medians and their ratios are printed. GPAE evaluates N critic inputs per sample, as
MAPPO with separate critics evaluates N critics; MAPPO's shared critic evaluates one. Absolute times depend on the
machine and on what else it does: compare the ratios.

With --recursion, the advantages alone: GPAE's, with and without traces, over TorchRL's vectorised GAE.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.experiment import Experiment
from sequential_update import ENVIRONMENTS, MINIBATCH, STEPS, make_experiment
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

from benchmarl_trust import GpaeConfig
from benchmarl_trust.functional import per_agent_advantage, trace_coefficient


def train(experiment: Experiment, batch, epochs: int, synchronize: Callable) -> tuple[float, float]:
    """What BenchMARL's loop does with a collected batch; its seconds, and those of the advantages among them."""
    synchronize()
    start = time.perf_counter()
    group_batch = experiment.algorithm.process_batch("agents", batch.clone())
    synchronize()
    middle = time.perf_counter()
    experiment.replay_buffers["agents"].extend(group_batch.reshape(-1))
    for _ in range(epochs * -(-ENVIRONMENTS * STEPS // MINIBATCH)):
        experiment._optimizer_loop("agents")
    synchronize()
    return time.perf_counter() - start, middle - start


def compare(n_agents: int, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds of each, for a number of agents."""
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    separate, shared, gpae = MappoConfig.get_from_yaml(), MappoConfig.get_from_yaml(), GpaeConfig.get_from_yaml()
    separate.share_param_critic = False
    algorithms = {"gpae": gpae, "separate": separate, "shared": shared}
    with tempfile.TemporaryDirectory() as folder:
        experiments = {
            name: make_experiment(algorithm, n_agents, args.device, folder, args.share, args.epochs)
            for name, algorithm in algorithms.items()
        }
        batch = next(iter(experiments["gpae"].collector)).exclude(
            "info", ("agents", "info"), ("next", "agents", "info")
        )
        times = {name: [] for name in experiments}
        for _ in range(args.repeats + 1):  # the first round warms up
            for name, experiment in experiments.items():
                times[name].append(train(experiment, batch, args.epochs, synchronize))
        for experiment in experiments.values():
            experiment.close()
    return {
        name: tuple(statistics.median(column) for column in zip(*values[1:], strict=True))
        for name, values in times.items()
    }


def time_recursion(envs: int, steps: int, n_agents: int, device: str, repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of the advantages alone."""
    shape = (envs, steps, n_agents)
    reward, value, next_value, log_ratio = torch.randn(4, *shape, device=device)
    done = torch.rand(envs, steps, 1, device=device) < 1 / 100
    each = done.expand(shape).contiguous()
    calls = {
        "torchrl": lambda: vec_generalized_advantage_estimate(0.99, 0.95, value, next_value, reward, each, each),
        "gpae": lambda: per_agent_advantage(reward, value, next_value, 0.95, 0.99, done, done),
        "gpae dt": lambda: per_agent_advantage(
            reward, value, next_value, trace_coefficient(log_ratio, 0.95), 0.99, done, done
        ),
    }
    times = {name: [] for name in calls}
    for _ in range(repeats + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--share", action="store_true", help="one policy for all agents, BenchMARL's default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--recursion", action="store_true", help="the advantages alone")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.recursion:
        print("| environments | steps | agents | TorchRL GAE | GPAE | GPAE with traces |")
        print("|---|---|---|---|---|---|")
        for envs, steps in ((60, 100), (60, 1000), (6, 1000)):
            for n_agents in args.agents:
                ms = time_recursion(envs, steps, n_agents, args.device)
                ratios = [f"{ms[name]:.2f} ms ({ms[name] / ms['torchrl']:.2f})" for name in ("gpae", "gpae dt")]
                print(f"| {envs} | {steps} | {n_agents} | {ms['torchrl']:.2f} ms | {' | '.join(ratios)} |", flush=True)
        return
    print("| agents | GPAE | advantages among it | over MAPPO, separate critics | over MAPPO, shared critic |")
    print("|---|---|---|---|---|")
    for n_agents in args.agents:
        seconds = compare(n_agents, args)
        total, advantages = seconds["gpae"]
        ratios = [f"{total / seconds[name][0]:.2f}" for name in ("separate", "shared")]
        print(f"| {n_agents} | {total:.2f} s | {advantages:.2f} s | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
