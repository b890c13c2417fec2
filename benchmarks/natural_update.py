"""Times the policy phases of the natural-gradient algorithms beside stock MAPPO's actor training.

    python benchmarks/natural_update.py --agents 2 4 8 16
    python benchmarks/natural_update.py --agents 4 --profile --products --precision    # instead: where the time goes

All train on the same collected batch and from the same policies (VMAS balance, 60 environments x 100 steps, separate
policies, MLP 256 x 256), one after the other and several times over, in one process; medians and their ratios are
printed. Absolute times depend on the machine and on what else it does: compare the ratios.

MAPPO    BenchMARL's own optimizer loop (15 epochs x 15 minibatches) with a loss that has no critic part: sampling,
         the actors' loss, its backward pass, clipping of gradients, Adam. Advantages and the filling of the buffer are
         not timed, nor for the others.
HATRPO, clip-HATRPO, W, G
         the policy phase: everything between the advantages and the critic's training, logging included.
minimal  HATRPO's policy updates and nothing else, written by hand: no autograd, float32 throughout, no statistics.
"""

import argparse
import contextlib
import copy
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from functools import partial
from unittest import mock

import torch
from benchmarl.algorithms import Mappo, MappoConfig
from sequential_update import ENVIRONMENTS, EPOCHS, MINIBATCH, STEPS, make_experiment
from tensordict.nn.utils import mappings
from torch.nn.functional import linear

from benchmarl_trust import ClipHatrpoConfig, HatrpoConfig, HatrpoGConfig, HatrpoWConfig
from benchmarl_trust import functional as F
from benchmarl_trust.functional.line_search import KL_SLACK
from benchmarl_trust.policy import Agent, kl_of, remember_old_policy
from benchmarl_trust.updates.natural import LocalModel

ALGORITHMS = {"hatrpo": HatrpoConfig, "clip": ClipHatrpoConfig, "W": HatrpoWConfig, "G": HatrpoGConfig}
DELTA, DAMPING, CG_ITERS, LS_STEP, ACCEPT_RATIO, BACKTRACK = 0.01, 0.1, 10, 10, 0.5, 0.8
#: Iterations after which a solve in float64 counts as complete.
COMPLETE = 200


##########################
# What is timed and how
##########################


def collect(experiment):
    """A batch, once; the experiments get copies."""
    return next(iter(experiment.collector)).exclude("info", ("agents", "info"), ("next", "agents", "info"))


def timed(run, synchronize):
    """How many seconds ``run()`` takes, and what it returns."""
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - start, result


def make_actor_training(experiment, batch):
    """A function that trains stock MAPPO's actors as BenchMARL does."""
    group_batch = experiment.algorithm.process_batch("agents", batch.clone())
    experiment.replay_buffers["agents"].extend(group_batch.reshape(-1))
    experiment.losses["agents"]._has_critic = False  # then the loss has no critic part, and no optimizer steps on it

    def run():
        for _ in range(EPOCHS * -(-ENVIRONMENTS * STEPS // MINIBATCH)):
            experiment._optimizer_loop("agents")

    return run


def make_policy_phase(experiment, batch):
    """A function that runs an algorithm's policy phase, each time from the first policies."""
    algorithm = experiment.algorithm
    prepared = Mappo.process_batch(algorithm, "agents", batch.clone())
    parameters = list(experiment.policy.parameters())
    before = [p.detach().clone() for p in parameters]

    def run():
        for p, old in zip(parameters, before, strict=True):
            p.data.copy_(old)
        algorithm._batches["agents"] = prepared
        algorithm._policy_phase(["agents"])

    return run


def agents_of(experiment, batch) -> list[Agent]:
    """The agents with their data, as the policy phase sees them."""
    algorithm = experiment.algorithm
    algorithm._batches["agents"] = Mappo.process_batch(algorithm, "agents", batch.clone())
    agents = algorithm._agents(["agents"])
    for agent in agents:
        remember_old_policy(agent)
    return agents


####################
# HATRPO by hand
####################


class Network:
    """An MLP with two hidden layers of tanh at one point: its outputs, products with its Jacobian and its transpose.

    Vectors [P] hold weight and bias of each layer in turn.
    """

    def __init__(self, leaves, x):
        self.leaves, self.x = leaves, x
        w1, b1, self.w2, b2, self.w3, b3 = leaves
        self.h1 = torch.tanh(linear(x, w1, b1))
        self.h2 = torch.tanh(linear(self.h1, self.w2, b2))
        self.output = linear(self.h2, self.w3, b3)

    def prepare(self):
        """Slopes of the activations, for the products."""
        self.slope1, self.slope2 = 1 - self.h1.square(), 1 - self.h2.square()

    def push(self, vector):
        """J v."""
        parts = vector.split([leaf.numel() for leaf in self.leaves])
        v1, c1, v2, c2, v3, c3 = (part.view(leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True))
        t1 = linear(self.x, v1, c1) * self.slope1
        t2 = (linear(t1, self.w2) + linear(self.h1, v2, c2)) * self.slope2
        return linear(t2, self.w3) + linear(self.h2, v3, c3)

    def pull(self, e3):
        """Jᵀ u."""
        e2 = e3 @ self.w3 * self.slope2
        e1 = e2 @ self.w2 * self.slope1
        layers = ((e1, self.x), (e2, self.h1), (e3, self.h2))
        return torch.cat([part for e, h in layers for part in ((e.T @ h).view(-1), e.sum(0))])


def log_prob(output, action, raw_to_scale):
    """The log-prob of actions before squashing, up to a constant; and what it is made of."""
    loc, raw = output.chunk(2, -1)
    scale = raw_to_scale(raw)
    standard = (action - loc) / scale
    return (-0.5 * standard.square() - scale.log()).sum(-1), standard, loc, scale


def slope_of(raw_to_scale, raw):
    """dσ/d(raw), elementwise."""
    with torch.enable_grad():
        raw = raw.detach().requires_grad_()
        return torch.autograd.grad(raw_to_scale(raw).sum(), raw)[0]


def gauss_newton(network, raw_to_scale):
    """The Fisher product of a network whose outputs are those of normals."""
    network.prepare()
    raw = network.output.chunk(2, -1)[1]
    scale, slope = raw_to_scale(raw), slope_of(raw_to_scale, raw)
    curvature = torch.cat([torch.ones_like(scale), 2 * slope.square()], -1) / scale.square().repeat(1, 2) / len(raw)
    return lambda vector: network.pull(curvature * network.push(vector))


def minimal_step(leaves, x, action, advantage, weight, raw_to_scale):
    """One agent's natural-gradient step; its log-ratio after it."""
    network = Network(leaves, x)
    product = gauss_newton(network, raw_to_scale)
    old_log_prob, standard, old_loc, old_scale = log_prob(network.output, action, raw_to_scale)
    score = torch.cat([standard, (standard.square() - 1) * slope_of(raw_to_scale, network.output.chunk(2, -1)[1])], -1)
    weighted = weight * advantage
    gradient = network.pull(score / old_scale.repeat(1, 2) * (weighted / len(x)).unsqueeze(-1))

    direction, residual = torch.zeros_like(gradient), gradient
    p, squared = gradient, gradient @ gradient
    threshold = 1e-10 * squared
    for _ in range(CG_ITERS):
        if squared <= threshold:
            break
        curved = product(p) + DAMPING * p
        length = squared / (p @ curved)
        direction = direction + length * p
        residual = residual - length * curved
        previous, squared = squared, residual @ residual
        p = residual + squared / previous * p

    step = (2 * DELTA / (direction @ (gradient - residual))).sqrt() * direction
    expected = gradient @ step
    before = [leaf.clone() for leaf in leaves]
    changes = [
        part.view(leaf.shape) for part, leaf in zip(step.split([p.numel() for p in leaves]), leaves, strict=True)
    ]
    for k in range(LS_STEP):
        fraction = BACKTRACK**k
        for leaf, old, change in zip(leaves, before, changes, strict=True):
            torch.add(old, change, alpha=fraction, out=leaf)
        new_log_prob, _, loc, scale = log_prob(Network(leaves, x).output, action, raw_to_scale)
        log_ratio = new_log_prob - old_log_prob
        ratio, shift = (old_scale / scale).square(), ((old_loc - loc) / scale).square()
        kl = 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1).mean()
        gain = (weighted * (log_ratio.exp() - 1)).mean()
        if kl <= DELTA * (1 + KL_SLACK) and gain > ACCEPT_RATIO * fraction * expected:
            return log_ratio
    for leaf, old in zip(leaves, before, strict=True):
        leaf.copy_(old)
    return torch.zeros_like(log_ratio)


def make_minimal(experiment, batch):
    """A function that runs HATRPO by hand on the data of its policy phase, each time from the first policies."""
    agents = agents_of(experiment, batch)
    raw_to_scale = mappings(experiment.algorithm.scale_mapping)
    before = [[p.detach().clone() for p in agent.policy.parameters] for agent in agents]
    leaves = copy.deepcopy(before)
    data = [
        (a.data["inputs", "agents", "observation"].squeeze(-2), a.data["action"], a.data["advantage"]) for a in agents
    ]

    @torch.no_grad()
    def run():
        for mine, old in zip(leaves, before, strict=True):
            torch._foreach_copy_(mine, old)
        log_factor = torch.zeros_like(data[0][2])
        for i in torch.randperm(len(data)).tolist():
            log_factor = log_factor + minimal_step(leaves[i], *data[i], log_factor.exp(), raw_to_scale)
        return leaves

    return run


################
# The table
################


@contextlib.contextmanager
def experiments(names, n_agents: int, device: str):
    """Experiments of the given algorithms, by name, and one batch."""
    configs = {"mappo": MappoConfig, **ALGORITHMS}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        made = {}
        for name in names:
            made[name] = make_experiment(configs[name].get_from_yaml(), n_agents, device, folder)
            stack.callback(made[name].close)
        yield made, collect(made[names[0]])


def compare(n_agents: int, repeats: int, device: str, synchronize) -> dict[str, float]:
    """Median seconds of each, for a number of agents."""
    with experiments(["mappo", *ALGORITHMS], n_agents, device) as (made, batch):
        runs = {name: make_policy_phase(made[name], batch) for name in ALGORITHMS}
        runs["mappo"] = make_actor_training(made["mappo"], batch)
        runs["minimal"] = make_minimal(made["hatrpo"], batch)
        times = defaultdict(list)
        for _ in range(repeats + 1):  # the first round warms up
            for name, run in runs.items():
                times[name].append(timed(run, synchronize)[0])
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def print_comparison(arguments, synchronize) -> None:
    """Seconds and ratios."""
    print(f"{'N':>3}{'MAPPO':>8}{'HATRPO':>8}{'clip':>8}{'W':>8}{'G':>8}{'minimal':>9}", end="")
    print(f"{'HATRPO/MAPPO':>14}{'HATRPO/minimal':>16}{'W/HATRPO':>10}{'G/HATRPO':>10}")
    for n_agents in arguments.agents:
        t = compare(n_agents, arguments.repeats, arguments.device, synchronize)
        print(f"{n_agents:>3}" + "".join(f"{t[name]:>8.3f}" for name in ("mappo", *ALGORITHMS)), end="")
        print(f"{t['minimal']:>9.3f}{t['hatrpo'] / t['mappo']:>14.2f}{t['hatrpo'] / t['minimal']:>16.2f}", end="")
        print(f"{t['W'] / t['hatrpo']:>10.2f}{t['G'] / t['hatrpo']:>10.2f}", flush=True)


########################
# Where the time goes
########################

#: Column -> the function whose time it is. Products are part of a solve.
PARTS = {
    "graph": (LocalModel, "__init__"),
    "gradient": (LocalModel, "gradient"),
    "products": (LocalModel, "fisher_product"),
    "solve": (F, "conjugate_gradient"),
    "search": (F, "line_search"),
}


def adding(seconds: dict[str, float], name: str, function, synchronize):
    """The function, its time added to an entry of ``seconds``."""

    def wrapper(*args, **kwargs):
        took, result = timed(lambda: function(*args, **kwargs), synchronize)
        seconds[name] += took
        return result

    return wrapper


def profile(run, repeats: int, synchronize) -> dict[str, float]:
    """Median seconds of a policy phase and of its parts; "solve" is then the vectors' arithmetic alone."""
    rounds = defaultdict(list)
    for _ in range(repeats + 1):
        seconds = defaultdict(float)
        with contextlib.ExitStack() as stack:
            for name, (owner, attribute) in PARTS.items():
                wrapper = adding(seconds, name, getattr(owner, attribute), synchronize)
                stack.enter_context(mock.patch.object(owner, attribute, wrapper))
            whole, _ = timed(run, synchronize)
        seconds["solve"] -= seconds["products"]
        seconds["rest"] = whole - sum(seconds.values())
        seconds["whole"] = whole
        for name, value in seconds.items():
            rounds[name].append(value)
    return {name: statistics.median(values[1:]) for name, values in rounds.items()}


def print_profile(arguments, synchronize) -> None:
    """Shares of the policy phases."""
    columns = [*PARTS, "rest"]
    print(
        "Shares of a policy phase: building the graphs, gradients, Fisher products, the rest of the solve, line search"
    )
    print(f"{'N':>3}{'':>9}{'seconds':>9}" + "".join(f"{name:>10}" for name in columns))
    for n_agents in arguments.agents:
        with experiments(list(ALGORITHMS), n_agents, arguments.device) as (made, batch):
            for name in ALGORITHMS:
                t = profile(make_policy_phase(made[name], batch), arguments.repeats, synchronize)
                shares = "".join(f"{100 * t[part] / t['whole']:>9.1f}%" for part in columns)
                print(f"{n_agents:>3}{name:>9}{t['whole']:>9.3f}{shares}", flush=True)


######################
# Fisher products
######################


def double_backward(agent):
    """The second derivative of the KL, by differentiating its gradient, whose graph is kept."""
    with torch.enable_grad():
        outputs = agent.policy.forward(agent.data["inputs"].copy())
        kl = kl_of(agent.policy, tuple(output.detach() for output in outputs), outputs, agent.data)
        gradient = agent.policy.gradient(kl, create_graph=True)
    return lambda vector: agent.policy.gradient(gradient, vector, retain_graph=True)


def forward_mode(agent):
    """Jᵀ H (J v) with J v by forward-mode differentiation, a forward pass each time."""
    model, policy, inputs = LocalModel(agent, agent.data), agent.policy, agent.data["inputs"]
    parameters = {name: p.detach() for name, p in policy.body.named_parameters()}

    def outputs(values):
        result = torch.func.functional_call(policy.body, values, (inputs.copy(),))
        return tuple(result.get(key).select(inputs.ndim, policy.slot) for key in policy.head.keys)

    def product(vector):
        tangents = dict(zip(parameters, policy.unflatten(vector), strict=True))
        _, pushed = torch.func.jvp(outputs, (parameters,), (tangents,))
        return policy.gradient(model._roots, tuple(model._curve(pushed)), retain_graph=True)

    return product


def by_hand(agent, raw_to_scale):
    """The product of the minimal HATRPO."""
    leaves = [p.detach() for p in agent.policy.parameters]
    return gauss_newton(Network(leaves, agent.data["inputs", "agents", "observation"].squeeze(-2)), raw_to_scale)


def stacked(algorithm, batch):
    """The products of all agents at once, of the group's own body, which is vectorised over stacked parameters."""
    policy = algorithm._policies["agents"]
    parameters = list(policy.body.parameters())
    outputs = policy.outputs(batch.reshape(-1))
    roots = tuple(outputs.get(key) for key in policy.head.keys)
    leaves = tuple(root.detach().requires_grad_() for root in roots)
    duals = tuple(torch.zeros_like(root, requires_grad=True) for root in roots)
    kl = policy.head.kl(tuple(leaf.detach() for leaf in leaves), leaves).mean(0).sum()
    slope = torch.autograd.grad(kl, leaves, create_graph=True)
    pulled_back = torch.autograd.grad(roots, parameters, duals, create_graph=True)

    def product(vectors):  # [N, P] -> [N, P]
        sizes = [p[0].numel() for p in parameters]
        parts = [part.reshape(p.shape) for part, p in zip(vectors.split(sizes, -1), parameters, strict=True)]
        pushed = torch.autograd.grad(pulled_back, duals, parts, retain_graph=True)
        curved = torch.autograd.grad(slope, leaves, pushed, retain_graph=True)
        pulled = torch.autograd.grad(roots, parameters, curved, retain_graph=True)
        return torch.cat([part.flatten(1) for part in pulled], -1)

    return product


def print_products(arguments, synchronize) -> None:
    """Milliseconds of a Fisher product per agent, for several ways to compute it."""
    print("A Fisher product, ms per agent, and how far it is from the first; the last two for all agents together")
    for n_agents in arguments.agents:
        with experiments(["hatrpo"], n_agents, arguments.device) as (made, batch):
            algorithm, agents = made["hatrpo"].algorithm, agents_of(made["hatrpo"], batch)
            models = [LocalModel(agent, agent.data) for agent in agents]
            size = sum(p.numel() for p in agents[0].policy.parameters)
            vectors = torch.randn(n_agents, size, device=arguments.device)
            ways = {
                "Gauss-Newton by two reverse passes (ours)": models[0].fisher_product,
                "Gauss-Newton by forward mode": forward_mode(agents[0]),
                "double backward of the KL": double_backward(agents[0]),
                "Gauss-Newton by hand": by_hand(agents[0], mappings(algorithm.scale_mapping)),
                "loop over agents (ours)": lambda vs, models=models: torch.stack(
                    [model.fisher_product(v) for model, v in zip(models, vs, strict=True)]
                ),
                "stacked, all agents at once": stacked(algorithm, batch),
            }
            expected = ways["loop over agents (ours)"](vectors)
            times, errors = defaultdict(list), {}
            for _ in range(10 * arguments.repeats + 1):
                for name, product in ways.items():
                    rows = slice(None) if "agents" in name else 0
                    seconds, result = timed(partial(product, vectors[rows]), synchronize)
                    times[name].append(seconds / (n_agents if "agents" in name else 1))
                    errors[name] = ((result - expected[rows]).norm() / expected[rows].norm()).item()
            for name, values in times.items():
                print(f"{n_agents:>3}  {name:<44}{1000 * statistics.median(values[1:]):>8.2f}{errors[name]:>10.1e}")


##############
# Precision
##############


def solve(model, gradient, vectors: torch.dtype, iterations: int):
    """A solution after some iterations, the directions that it is made of, and what the solver says."""
    directions, own = [], model.policy.parameters[0].dtype

    def matvec(v):
        directions.append(v[0].double())
        return model.fisher_product(v[0].to(own)).to(vectors).unsqueeze(0) + DAMPING * v

    solution = F.conjugate_gradient(matvec, gradient.to(vectors).unsqueeze(0), iterations, 1e-28, refresh=10**9)
    return solution.x[0].double(), torch.stack(directions), solution


def print_precision(arguments, synchronize) -> None:
    """What float32 costs a solve: errors and loss of conjugacy, for the first agent."""
    with experiments(["hatrpo"], arguments.agents[0], arguments.device) as (made, batch):
        agent = agents_of(made["hatrpo"], batch)[0]
    data = agent.data.apply(lambda x: x.double() if x.is_floating_point() else x)
    exact = Agent(copy.deepcopy(agent.policy), None, data)
    exact.policy.body.double()
    remember_old_policy(exact)
    single, double = (LocalModel(a, a.data) for a in (agent, exact))
    gradient = double.gradient(torch.ones_like(data["advantage"]))[1]
    complete, _, solution = solve(double, gradient, torch.float64, COMPLETE)
    share = (solution.residual.norm() / gradient.norm()).item()
    print(f"{len(gradient)} unknowns, λ = {DAMPING}; residual of the complete solve in float64: {share:.1e}")
    print(f"{'iterations':>10}{'products':>10}{'vectors':>9}{'error':>10}{'by rounding':>13}{'conjugacy lost':>16}")
    kinds = [(double, torch.float64), (single, torch.float64), (single, torch.float32)]
    for iterations in (CG_ITERS, 3 * CG_ITERS):
        reference = None
        for model, vectors in kinds:
            x, directions, _ = solve(model, gradient, vectors, iterations)
            reference = x if reference is None else reference
            curved = torch.stack([double.fisher_product(p) + DAMPING * p for p in directions])
            gram = directions @ curved.T
            length = gram.diagonal().sqrt()
            lost = (gram / length / length.unsqueeze(-1)).fill_diagonal_(0).abs().amax().item()
            error, rounding = ((x - y).norm() / y.norm() for y in (complete, reference))
            own = "float64" if model is double else "float32"
            print(
                f"{iterations:>10}{own:>10}{str(vectors).removeprefix('torch.'):>9}{error.item():>10.1e}"
                f"{rounding.item():>13.1e}{lost:>16.1e}"
            )


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--profile", action="store_true", help="where the time of a policy phase goes")
    parser.add_argument("--products", action="store_true", help="compare ways to compute a Fisher product")
    parser.add_argument("--precision", action="store_true", help="compare conjugate gradients in float32 and float64")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    synchronize = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}; medians in seconds")
    tables = {"profile": print_profile, "products": print_products, "precision": print_precision}
    chosen = [table for name, table in tables.items() if getattr(arguments, name)]
    for table in chosen or [print_comparison]:
        table(arguments, synchronize)


if __name__ == "__main__":
    main()
