"""Times one iteration's training: stock MAPPO, HAPPO, and a minimal plain-PyTorch loop of HAPPO's policy updates.

    python benchmarks/sequential_update.py --agents 2 4 8 16
    python benchmarks/sequential_update.py --agents 4 --compile --cells 64 64

All three train on the same collected batch (VMAS balance, 60 environments x 100 steps, separate policies), one after
the other and several times over, in one process; medians and their ratios are printed. Absolute times depend on the
machine and on what else it does: compare the ratios.

(a)  stock MAPPO: BenchMARL's loop, actors and critic.
(b)  HAPPO: its policy phase and its critic phase; "policy" is the policy phase alone.
(c)  HAPPO's policy updates and nothing else, written by hand: per-agent leaves, one gather per epoch, fused Adam.

With --compile the policy phase alone, as it is and with algorithm.compile=True, in turns; both in the time of the
processor (on a GPU in that of the clock), and the first compiled phase apart, since it compiles.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings

import torch
from benchmarl.algorithms import Mappo, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig
from tensordict.nn.utils import mappings

from benchmarl_trust import HappoConfig

EPOCHS, MINIBATCH, ENVIRONMENTS, STEPS, EPSILON = 15, 400, 60, 100, 0.2


def make_experiment(
    algorithm,
    n_agents: int,
    device: str,
    folder: str,
    share: bool = False,
    epochs: int = EPOCHS,
    cells: list[int] | None = None,
) -> Experiment:
    """An experiment that has collected nothing yet. ``cells`` are the widths of the MLPs' hidden layers."""
    config = ExperimentConfig.get_from_yaml()
    config.sampling_device = config.train_device = config.buffer_device = device
    config.share_policy_params = share
    config.on_policy_collected_frames_per_batch = ENVIRONMENTS * STEPS
    config.on_policy_n_envs_per_worker = ENVIRONMENTS
    config.on_policy_n_minibatch_iters, config.on_policy_minibatch_size = epochs, MINIBATCH
    config.evaluation, config.loggers, config.create_json = False, [], False
    config.save_folder = folder
    task = VmasTask.BALANCE.get_from_yaml()
    task.config.update(n_agents=n_agents, max_steps=STEPS)
    model = MlpConfig.get_from_yaml()
    model.num_cells = cells or model.num_cells
    return Experiment(task, algorithm, model, seed=0, config=config)


def train(experiment: Experiment, batch, synchronize) -> float:
    """What BenchMARL's loop does with a collected batch; its seconds."""
    start = time.perf_counter()
    group_batch = experiment.algorithm.process_batch("agents", batch.clone())
    experiment.replay_buffers["agents"].extend(group_batch.reshape(-1))
    for _ in range(EPOCHS * -(-ENVIRONMENTS * STEPS // MINIBATCH)):
        experiment._optimizer_loop("agents")
    synchronize()
    return time.perf_counter() - start


def time_policy_phase(experiment: Experiment, synchronize, clock=time.perf_counter) -> list[float]:
    """A list that will hold the seconds of each policy phase of HAPPO (without MAPPO's advantages before it)."""
    seconds, original = [], experiment.algorithm._policy_phase

    def timed(team):
        synchronize()
        start = clock()
        original(team)
        synchronize()
        seconds.append(clock() - start)

    experiment.algorithm._policy_phase = timed
    return seconds


def log_prob(layers, x, a, raw_to_scale):
    """The log-prob of one agent's actions before squashing, up to a constant."""
    (w1, b1), (w2, b2), (w3, b3) = layers
    hidden = torch.tanh(torch.nn.functional.linear(x, w1, b1))
    hidden = torch.tanh(torch.nn.functional.linear(hidden, w2, b2))
    loc, raw = torch.nn.functional.linear(hidden, w3, b3).chunk(2, -1)
    scale = raw_to_scale(raw)
    return (-0.5 * ((a - loc) / scale).square() - scale.log()).sum(-1)


def minimal(observation, action, advantage, layers, optimizers, raw_to_scale):
    """HAPPO's policy updates by hand. ``layers`` are the leaves of each agent, ``action`` is before squashing."""
    with torch.no_grad():
        old_log_prob = [log_prob(*x, raw_to_scale) for x in zip(layers, observation, action, strict=True)]
    log_factor = torch.zeros_like(advantage[0])
    for i in torch.randperm(len(layers)).tolist():
        weight, leaves = log_factor.exp(), [p for layer in layers[i] for p in layer]
        for _ in range(EPOCHS):
            rows = torch.randperm(len(weight), device=weight.device)
            columns = (observation[i], action[i], old_log_prob[i], advantage[i], weight)
            for x, a, old, adv, w in zip(*(c[rows].split(MINIBATCH) for c in columns), strict=True):
                ratio = (log_prob(layers[i], x, a, raw_to_scale) - old).exp()
                gain = torch.minimum(ratio * adv, ratio.clamp(1 - EPSILON, 1 + EPSILON) * adv)
                optimizers[i].zero_grad()
                (-(w * gain).mean()).backward()
                torch.nn.utils.clip_grad_norm_(leaves, 5)
                optimizers[i].step()
        with torch.no_grad():
            log_factor += log_prob(layers[i], observation[i], action[i], raw_to_scale) - old_log_prob[i]


def make_minimal(experiment: Experiment, batch, device: str):
    """A function that runs :func:`minimal` on the data of HAPPO's policy phase."""
    algorithm = experiment.algorithm
    algorithm._batches["agents"] = Mappo.process_batch(algorithm, "agents", batch.clone())
    agents = algorithm._agents(["agents"])
    layers, optimizers = [], []
    for agent in agents:
        leaves = [torch.nn.Parameter(p.detach().clone()) for p in agent.policy.parameters]
        layers.append(list(zip(leaves[::2], leaves[1::2], strict=True)))
        optimizers.append(torch.optim.Adam(leaves, lr=5e-5, eps=1e-6, fused=True))
    observation = [agent.data["inputs", "agents", "observation"].squeeze(-2) for agent in agents]
    action = [agent.data["action"] for agent in agents]
    advantage = [agent.data["advantage"] for agent in agents]
    raw_to_scale = mappings(algorithm.scale_mapping)

    return lambda: minimal(observation, action, advantage, layers, optimizers, raw_to_scale)


def compare(n_agents: int, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each, for a number of agents."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    with tempfile.TemporaryDirectory() as folder:
        mappo = make_experiment(MappoConfig.get_from_yaml(), n_agents, device, folder)
        happo = make_experiment(HappoConfig.get_from_yaml(), n_agents, device, folder)
        batch = next(iter(mappo.collector)).exclude("info", ("agents", "info"), ("next", "agents", "info"))
        hand = make_minimal(happo, batch, device)
        times: dict[str, list[float]] = {"mappo": [], "happo": [], "minimal": []}
        times["happo policy"] = time_policy_phase(happo, synchronize)
        for _ in range(repeats + 1):  # the first round warms up
            times["mappo"].append(train(mappo, batch, synchronize))
            times["happo"].append(train(happo, batch, synchronize))
            start = time.perf_counter()
            hand()
            synchronize()
            times["minimal"].append(time.perf_counter() - start)
        mappo.close()
        happo.close()
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def compare_compiled(n_agents: int, repeats: int, device: str, cells: list[int] | None) -> str:
    """Policy phases of HAPPO, eager and compiled, on the same batch with the same random numbers; a line of results."""
    cuda = device == "cuda"
    synchronize, clock = (torch.cuda.synchronize, time.perf_counter) if cuda else (lambda: None, time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        experiments = []
        for compiled in (False, True):
            algorithm = HappoConfig.get_from_yaml()
            algorithm.compile = compiled
            experiments.append(make_experiment(algorithm, n_agents, device, folder, cells=cells))
        batch = next(iter(experiments[0].collector)).exclude("info", ("agents", "info"), ("next", "agents", "info"))
        times = [time_policy_phase(experiment, synchronize, clock) for experiment in experiments]
        start = time.perf_counter()
        experiments[1].algorithm.process_batch("agents", batch.clone())
        first = time.perf_counter() - start
        experiments[0].algorithm.process_batch("agents", batch.clone())
        difference = distance(*experiments)
        for k in range(repeats):
            for experiment in experiments if k % 2 else reversed(experiments):
                experiment.algorithm.process_batch("agents", batch.clone())
        for experiment in experiments:
            experiment.close()
    eager, compiled = (each[1:] for each in times)
    ratios = [c / e for e, c in zip(eager, compiled, strict=True)]
    return (
        f"{n_agents:>3}{statistics.median(eager):>9.2f}{statistics.median(compiled):>10.2f}"
        f"{statistics.median(ratios):>8.2f}{min(ratios):>8.2f}{max(ratios):>6.2f}{first:>10.1f}{difference:>12.0e}"
    )


def distance(one: Experiment, other: Experiment) -> float:
    """The largest difference of their policies' parameters."""
    pairs = zip(one.policy.parameters(), other.policy.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def peak_memory(name: str, n_agents: int) -> float:
    """MiB that a process of its own needs at most to train one algorithm."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_train_alone, (name, n_agents))


def _train_alone(name: str, n_agents: int) -> float:
    warnings.simplefilter("ignore")
    algorithm = {"mappo": MappoConfig, "happo": HappoConfig}[name].get_from_yaml()
    with tempfile.TemporaryDirectory() as folder:
        experiment = make_experiment(algorithm, n_agents, "cpu", folder)
        batch = next(iter(experiment.collector)).exclude("info", ("agents", "info"), ("next", "agents", "info"))
        for _ in range(3):
            train(experiment, batch, lambda: None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="compare HAPPO's policy phase with the compiled one")
    parser.add_argument("--cells", type=int, nargs="+", help="with --compile: widths of the hidden layers (256 256)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.compile:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}; medians in seconds")
        print(f"{'N':>3}{'eager':>9}{'compiled':>10}{'ratio':>8}{'from':>8}{'to':>6}{'first':>10}{'difference':>12}")
        for n_agents in arguments.agents:
            print(compare_compiled(n_agents, arguments.repeats, arguments.device, arguments.cells), flush=True)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}; medians in seconds")
    print(f"{'N':>3}{'(a) MAPPO':>11}{'(b) HAPPO':>11}{'policy':>9}{'(c) minimal':>13}{'b/a':>8}{'policy/c':>10}")
    for n_agents in arguments.agents:
        t = compare(n_agents, arguments.repeats, arguments.device)
        print(
            f"{n_agents:>3}{t['mappo']:>11.2f}{t['happo']:>11.2f}{t['happo policy']:>9.2f}{t['minimal']:>13.2f}"
            f"{t['happo'] / t['mappo']:>8.2f}{t['happo policy'] / t['minimal']:>10.2f}",
            flush=True,
        )
    if arguments.device == "cpu":
        most = max(arguments.agents)
        peak = {name: peak_memory(name, most) for name in ("mappo", "happo")}
        print(
            f"peak memory of a process that trains 3 times, N = {most}: MAPPO {peak['mappo']:.0f} MiB, HAPPO "
            f"{peak['happo']:.0f} MiB, ratio {peak['happo'] / peak['mappo']:.2f}"
        )


if __name__ == "__main__":
    main()
