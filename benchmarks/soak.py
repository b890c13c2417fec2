"""Long runs: does memory grow, do files stay open?

    python benchmarks/soak.py                     # 500 iterations of every algorithm, two at a time
    python benchmarks/soak.py --algorithms happo gpae --iterations 1000

Each algorithm trains on vmas/simple_spread in a process of its own, with evaluations, checkpoints and logs as users
have them. Printed are the process's largest resident memory (MiB) up to iteration 50 and up to the end, their ratio,
and the numbers of open files at both times. GPAE runs with ``n_rollouts=4``, so that its buffer is filled too. The
script fails if memory has grown by more than 5 % or a file was left open. It reads Linux's /proc.
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import torch
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models import MlpConfig
from torch import nn

from benchmarl_trust import ALGORITHMS

#: The iteration after which nothing should grow any more.
WARM = 50
HEADER = f"{'algorithm':<12}{'iterations':>11}{f'MiB at {WARM}':>11}{'MiB at end':>11}{'ratio':>8}"
HEADER += f"{'files':>12}{'skipped':>9}"


class Watch(Callback):
    """Measures at the end of some iterations, and counts skipped steps."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, tuple[float, int]] = {}
        self.skipped = 0

    def on_train_end(self, training_td, group: str) -> None:
        """Called once per iteration: the task has one group."""
        self.skipped += self.experiment.algorithm.guard.skipped[group]
        done = self.experiment.n_iters_performed + 1
        if done in (WARM, self.experiment.config.max_n_iters):
            status = Path("/proc/self/status").read_text()
            peak = int(status.split("VmHWM:")[1].split()[0]) / 1024  # getrusage's would begin with the parent's
            self.seen[done] = (peak, len(list(Path("/proc/self/fd").iterdir())))


def soak(name: str, iterations: int) -> tuple[str, bool]:
    """One run; a line of the table, and whether nothing has grown."""
    torch.set_num_threads(1)
    config = ExperimentConfig.get_from_yaml()
    config.max_n_iters, config.max_n_frames = iterations, None
    config.on_policy_collected_frames_per_batch, config.on_policy_n_envs_per_worker = 200, 20
    config.on_policy_n_minibatch_iters, config.on_policy_minibatch_size, config.lr = 2, 100, 3e-4
    config.evaluation_interval, config.evaluation_episodes, config.render = 2_000, 5, False
    config.checkpoint_interval, config.keep_checkpoints_num = 2_000, 2
    config.share_policy_params, config.loggers = False, ["csv"]
    task = VmasTask.SIMPLE_SPREAD.get_from_yaml()
    task.config["max_steps"] = 10
    algorithm = ALGORITHMS[name].get_from_yaml()
    if name == "gpae":
        algorithm.n_rollouts = 4
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        config.save_folder = folder
        model = MlpConfig(num_cells=[32], activation_class=nn.Tanh, layer_class=nn.Linear)
        Experiment(task, algorithm, model, seed=0, config=config, callbacks=[watch]).run()
    (before, files_before), (after, files_after) = watch.seen[WARM], watch.seen[iterations]
    files = f"{files_before} -> {files_after}"
    numbers = f"{iterations:>11}{before:>11.1f}{after:>11.1f}{after / before:>8.3f}"
    return f"{name:<12}{numbers}{files:>12}{watch.skipped:>9}", after <= 1.05 * before and files_after <= files_before


def main() -> None:
    """Run them, and print the table as it fills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS), metavar="NAME")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.iterations <= WARM:
        parser.error(f"--iterations must be above {WARM}")
    print(HEADER, flush=True)
    # A fresh process for each, so that the largest memory is its own.
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        runs = [pool.apply_async(soak, (name, arguments.iterations)) for name in arguments.algorithms]
        flat = True
        for run in runs:
            line, good = run.get()
            print(line, flush=True)
            flat = flat and good
    if not flat:
        raise SystemExit("Memory or open files have grown.")


if __name__ == "__main__":
    main()
