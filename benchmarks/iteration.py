"""What an iteration costs on a device, by algorithm: seconds, and on a GPU launches, waits and memory.

    python benchmarks/iteration.py --device cuda                             # the sizes of experiment=vmas_fine_tuned
    python benchmarks/iteration.py --device cpu --algorithms mappo happo
    python benchmarks/iteration.py --device cuda --counts                    # launches and waits of a short iteration

VMAS balance, 60,000 frames of 600 environments, 45 epochs of minibatches of 4096, MLP 256 x 256, separate policies, all
else BenchMARL's defaults. All train on the same collected batch, in turns and several times over, in one process.
Training is the processing of the batch and the optimizer's steps, without logging and without the callbacks at an
iteration's start and end (the package's check of the batch and exact KL). Printed are the median seconds, the median of
their ratios to the first algorithm's in the same round, with the least and the largest, and the peak of PyTorch's
allocated memory in the last round less what was allocated before it.

With --counts, instead, the same of 2 epochs x 4 minibatches: kernels launched and copies, by PyTorch's profiler, and
how often the host waited for the GPU, at any line and at lines of the package itself.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig
from tensordict import TensorDictBase

import benchmarl_trust
from benchmarl_trust import ALGORITHMS

KNOWN = {"mappo": MappoConfig, **ALGORITHMS}
PACKAGE = Path(benchmarl_trust.__file__).parent
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


def make_experiment(name: str, args: argparse.Namespace, folder: str) -> Experiment:
    """An experiment that has collected nothing yet."""
    config = ExperimentConfig.get_from_yaml()
    config.sampling_device = config.train_device = config.buffer_device = args.device
    config.share_policy_params, config.gamma = False, 0.9
    config.on_policy_collected_frames_per_batch = args.environments * 100
    config.on_policy_n_envs_per_worker = args.environments
    config.on_policy_n_minibatch_iters = 2 if args.counts else args.epochs
    config.on_policy_minibatch_size = args.environments * 25 if args.counts else 4096
    config.evaluation, config.loggers, config.create_json = False, [], False
    config.save_folder = folder
    task = VmasTask.BALANCE.get_from_yaml()
    task.config.update(n_agents=args.agents, max_steps=100)
    return Experiment(task, KNOWN[name].get_from_yaml(), MlpConfig.get_from_yaml(), seed=0, config=config)


def train(experiment: Experiment, batch) -> None:
    """What BenchMARL's loop does with a collected batch, but for callbacks and logging."""
    config = experiment.config
    group_batch = batch.exclude(*experiment._get_excluded_keys("agents"))
    group_batch = experiment.algorithm.process_batch("agents", group_batch).reshape(-1)
    experiment.replay_buffers["agents"].extend(group_batch)
    minibatches = -(-config.on_policy_collected_frames_per_batch // config.on_policy_minibatch_size)
    for _ in range(config.on_policy_n_minibatch_iters * minibatches):
        experiment._optimizer_loop("agents")


def collect(experiment: Experiment, synchronize: Callable, times: int) -> tuple[TensorDictBase, float]:
    """A batch, and the median seconds of its collection; the first is not timed."""
    batches, seconds = iter(experiment.collector), []
    for _ in range(times + 1):
        start = time.perf_counter()
        batch = next(batches)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return batch, statistics.median(seconds[1:])


def time_iterations(args: argparse.Namespace, folder: str) -> None:
    """Print a table of seconds and ratios."""
    cuda = args.device == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    experiments = {name: make_experiment(name, args, folder) for name in args.algorithms}
    batch, collection = collect(experiments[args.algorithms[0]], synchronize, args.repeats)
    print(f"collection: {collection:.2f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in experiments}
    memory = dict.fromkeys(experiments, float("nan"))
    for _ in range(args.repeats + 1):  # the first round warms up
        for name, experiment in experiments.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            train(experiment, batch)
            synchronize()
            seconds[name].append(time.perf_counter() - start)
            if cuda:
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    print("| algorithm | training | over the first row's | memory of training |\n|---|---|---|---|")
    first = seconds[args.algorithms[0]][1:]
    for name, rounds in seconds.items():
        ratios = [own / other for own, other in zip(rounds[1:], first, strict=True)]
        print(
            f"| `{name}` | {statistics.median(rounds[1:]):.2f} s | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {memory[name]:.0f} MiB |"
        )


def count(name: str, args: argparse.Namespace, folder: str) -> str:
    """A row of launches and copies of the second training, and waits of the third; the first makes what lasts."""
    experiment = make_experiment(name, args, folder)
    batch, _ = collect(experiment, torch.cuda.synchronize, 1)
    train(experiment, batch)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train(experiment, batch)
        torch.cuda.synchronize()
    calls = Counter({event.key: event.count for event in profile.key_averages()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(experiment, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning.filename for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    own = sum(Path(filename).is_relative_to(PACKAGE) for filename in waits)
    return f"| `{name}` | {sum(calls[key] for key in LAUNCHES)} | {calls['cudaMemcpyAsync']} | {len(waits)} | {own} |"


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--algorithms", nargs="+", default=list(KNOWN), choices=list(KNOWN), metavar="NAME")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--environments", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--counts", action="store_true", help="launches and waits on a GPU")
    args = parser.parse_args()
    if args.counts and args.device != "cuda":
        parser.error("--counts needs --device cuda")
    warnings.simplefilter("ignore")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {args.agents} agents")
    with tempfile.TemporaryDirectory() as folder:
        if not args.counts:
            time_iterations(args, folder)
            return
        print("| algorithm | launches | copies | waits | of them in the package |\n|---|---|---|---|---|")
        for name in args.algorithms:
            print(count(name, args, folder), flush=True)


if __name__ == "__main__":
    main()
