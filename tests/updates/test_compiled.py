"""Compiled steps against eager ones: the same numbers, one compilation for all agents, nothing silently eager.

Most tests compile by the backend ``eager``, which traces forward and backward and writes no code; inductor takes 20 s.
"""

import dataclasses
import gc
import logging
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from benchmarl.environments import VmasTask
from benchmarl.hydra_config import load_algorithm_config_from_hydra
from benchmarl.models import GruConfig
from cases import configured
from conftest import policy_parameters, scalars
from environments import StandInTask
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from problems import RNN, gnn, make_agents, make_problem
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from benchmarl_trust import ALGORITHMS, A2poConfig, HappoConfig
from benchmarl_trust.algorithms import checks
from benchmarl_trust.algorithms.sequential_gradient import SequentialGradientConfig
from benchmarl_trust.policy import AgentPolicy, remember_old_policy
from benchmarl_trust.updates import GradientStep, MinibatchEpochs, sweep
from benchmarl_trust.updates import compiled as compiled_module

EPOCHS, SIZE, ROWS, ITERATIONS = 3, 7, 24, 2  # three whole minibatches and one of 3 rows


@pytest.fixture
def graphs(monkeypatch):
    """A function: how many graphs were compiled, without a code generator."""
    monkeypatch.setattr(compiled_module, "BACKEND", "eager")
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest's, at half of the time
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture
def eager_steps(monkeypatch):
    """The number of eager backward passes so far, in a list."""
    steps, backward = [0], AgentPolicy.backward

    def count(self, loss):
        steps[0] += 1
        backward(self, loss)

    monkeypatch.setattr(AgentPolicy, "backward", count)
    return steps


def updated(
    compiled,
    model="mlp",
    distribution="tanh",
    shared=False,
    masked=False,
    factor="full",
    device="cpu",
    fused=True,
    **keys,
):
    """Parameters, infos and the next random number after some iterations of all agents; and how far they moved."""
    problem = make_problem(model, distribution, shared=shared, dtype=torch.float32, rows=ROWS, device=device)
    before = [p.detach().clone() for p in problem.policy.parameters()]
    agents = make_agents(problem, fused=fused)
    for k, agent in enumerate(agents):
        if masked:
            agent.data["mask"] = torch.arange(ROWS, device=device) % 3 != k
        remember_old_policy(agent)
    generator = torch.Generator(device).manual_seed(5)
    torch.manual_seed(3)
    for _ in range(ITERATIONS):  # with a new step each, as an algorithm makes them
        step = GradientStep("clip", **{"epsilon": 0.2, "max_grad_norm": 0.5, **keys}, compiled=compiled)
        turn = step if shared else MinibatchEpochs(step, EPOCHS, SIZE, generator)
        rows = torch.arange(SIZE, device=device) if shared else None
        infos = sweep(agents, [2, 0, 1], turn, factor, rows, chunk=SIZE, epsilon=0.2)
    parameters = [p.detach() for p in problem.policy.parameters()]
    assert max((p - q).abs().max() for p, q in zip(parameters, before, strict=True)) > 0.01
    values = [torch.stack([*info.step, info.factor_ess, info.advantage_variance]) for info in infos]
    return parameters, values, torch.rand(1)


def assert_equal_results(one, other):
    for x, y in zip([*one[0], *one[1], one[2]], [*other[0], *other[1], other[2]], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


KINDS = {
    "happo": {"epsilon": (0.1, 0.2), "max_grad_norm": None, "max_grad_value": 0.01},
    "a2po absent": {"factor": "inside_clip", "by_position": True, "masked": True},
    "entropy drawn": {"entropy_coef": 0.01},
    "entropy": {"distribution": "normal", "entropy_coef": 0.01},
    "discrete": {"distribution": "categorical", "entropy_coef": 0.01},
    "action mask, absent": {"distribution": "masked", "entropy_coef": 0.01, "masked": True},
    "cnn": {"model": "cnn"},
}
SLOW = ("entropy drawn", "entropy", "discrete", "action mask, absent", "cnn")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KINDS])
def test_it_equals_the_eager_step_and_is_compiled_once_for_all_agents(kind, graphs, eager_steps):
    compiled = updated({}, **KINDS[kind])
    assert graphs() == 1
    assert eager_steps[0] == ITERATIONS * 3 * EPOCHS  # of each agent and epoch the last minibatch
    assert_equal_results(compiled, updated(None, **KINDS[kind]))
    assert graphs() == 1


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("compiled", [{}, None], ids=["compiled", "eager"])
def test_fused_optimizers_get_gradients_in_the_layout_of_the_parameters(compiled, model, graphs):
    """They go through both memories alike: a convolution's gradient in its own layout would move wrong entries."""
    assert_equal_results(updated(compiled, model), updated(None, model, fused=False))


def copied(data):
    """With inputs of its own, to which a body writes what it computes."""
    return {**data, "inputs": data["inputs"].copy()}


def test_another_loss_is_compiled_anew(graphs):
    agent = make_agents(make_problem(dtype=torch.float32))[0]
    remember_old_policy(agent)
    agent.data["old_log_prob"] += torch.linspace(-1, 1, ROWS)
    compiled = {}
    for keys in ({"surrogate": "clip"}, {"surrogate": "log"}, {"surrogate": "clip", "entropy_coef": 10.0}):
        step = GradientStep(epsilon=0.2, compiled=compiled, **keys)
        torch.manual_seed(1)
        expected = step.loss(agent, copied(agent.data), torch.ones(ROWS)).detach()
        torch.manual_seed(1)
        torch.testing.assert_close(step(agent, agent.data, torch.ones(ROWS)).loss, expected)
    assert graphs() == len(compiled) == 3


def test_it_has_a_gradient_where_none_is_asked_for(graphs):
    def gradients():
        agent = make_agents(make_problem(dtype=torch.float32))[0]
        remember_old_policy(agent)
        GradientStep("clip", 0.2, compiled={})(agent, agent.data, torch.ones(ROWS))
        return [p.grad for p in agent.policy.parameters]

    with torch.no_grad():
        found = gradients()
    for gradient, expected in zip(found, gradients(), strict=True):
        torch.testing.assert_close(gradient, expected)
        assert gradient.any()


def test_shared_policies_too(graphs, eager_steps):
    compiled = updated({}, shared=True)
    assert (graphs(), eager_steps[0]) == (1, 0)
    assert_equal_results(compiled, updated(None, shared=True))


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["quadratic", "reciprocal", "log", "linear"])
def test_every_gain(surrogate, graphs):
    def step(compiled):
        agent = make_agents(make_problem(dtype=torch.float32))[0]
        remember_old_policy(agent)
        agent.data["old_log_prob"] += torch.linspace(-1, 1, ROWS)  # ratios on both sides of the region's bounds
        info = GradientStep(surrogate, 0.2, compiled=compiled)(agent, agent.data, torch.ones(ROWS))
        return [p.grad for p in agent.policy.parameters], info

    (compiled, info), (eager, expected) = step({}), step(None)
    assert graphs() == 1
    torch.testing.assert_close(info.loss, expected.loss)
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y)


def test_what_is_not_finite_is_undone_as_ever(graphs):
    problem = make_problem(dtype=torch.float32)
    agents = make_agents(problem, fused=True)
    for agent in agents:
        remember_old_policy(agent)
    agents[1].data["advantage"][0] = math.nan
    before = [[p.clone() for p in agent.policy.parameters] for agent in agents]
    step = MinibatchEpochs(GradientStep("clip", 0.2, compiled={}), EPOCHS, SIZE, torch.Generator().manual_seed(5))
    infos = sweep(agents, [1, 0, 2], step)
    assert [bool(info.finite) for info in infos] == [False, True, True]
    stayed = [
        all(torch.equal(p, q) for p, q in zip(agent.policy.parameters, old, strict=True))
        for agent, old in zip(agents, before, strict=True)
    ]
    assert stayed == [False, True, False]
    assert graphs() == 1


def test_frozen_parameters_and_buffers_are_the_agents_own(graphs):
    """They are arguments as the others are: those of the agent that was compiled first are not the next one's."""

    def steps(compiled):
        problem = make_problem(dtype=torch.float32)
        for agent in problem.group.agents:
            first, *agent.parameters = agent.parameters
            first.requires_grad_(False)
        agents = make_agents(problem)
        for agent in agents:
            remember_old_policy(agent)
        step = GradientStep("clip", 0.2, compiled=compiled)
        return [step(agent, agent.data, torch.ones(ROWS)) for agent in agents]

    for info, expected in zip(steps({}), steps(None), strict=True):
        torch.testing.assert_close(info, expected)
    assert graphs() == 1


def test_a_buffer_is_what_it_is_now(graphs):
    agent = make_agents(make_problem(dtype=torch.float32))[0]
    name, bias = next((n, p) for n, p in agent.policy.body.named_parameters() if n.endswith("bias"))
    owner = agent.policy.body.get_submodule(name.rpartition(".")[0])
    agent.policy.parameters = [p for p in agent.policy.parameters if p is not bias]
    del owner.bias
    owner.register_buffer("bias", bias.detach().clone())
    remember_old_policy(agent)
    step = GradientStep("clip", 0.2, compiled={})
    for shift in (0.0, 1.0):
        owner.bias = owner.bias + shift
        expected = step.loss(agent, copied(agent.data), torch.ones(ROWS)).detach()
        torch.testing.assert_close(step(agent, agent.data, torch.ones(ROWS)).loss, expected)


def test_parameters_that_nothing_depends_on_have_no_gradient(graphs):
    problem = make_problem(dtype=torch.float32)
    agent = make_agents(problem)[0]
    unused = torch.nn.Parameter(torch.ones(2))
    agent.policy.body.register_parameter("unused", unused)
    agent.policy.parameters = [unused, *agent.policy.parameters]
    remember_old_policy(agent)
    GradientStep("clip", 0.2, compiled={})(agent, agent.data, torch.ones(ROWS))
    assert graphs() == 1
    assert unused.grad is None
    assert all(p.grad.any() for p in agent.policy.parameters[1:])


def test_a_body_of_the_whole_group_is_refused():
    agent = make_agents(make_problem(twin=False))[0]
    with pytest.raises(ValueError, match="give GroupPolicy a make_twin"):
        GradientStep("clip", 0.2, compiled={})(agent, agent.data, torch.ones(ROWS))


def test_minibatches_with_other_entries_are_refused(graphs):
    """What the function does with a mask was compiled into it."""
    agent = make_agents(make_problem(dtype=torch.float32))[0]
    remember_old_policy(agent)
    step = GradientStep("clip", 0.2, compiled={})
    step(agent, agent.data, torch.ones(ROWS))
    agent.data["mask"] = torch.ones(ROWS, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"made for .*old_log_prob, and this one has .* mask, old_log_prob: give"):
        step(agent, agent.data, torch.ones(ROWS))


def test_what_cannot_be_traced_is_said_by_key(graphs):
    agent = make_agents(make_problem("gru", dtype=torch.float32))[0]
    remember_old_policy(agent)
    with pytest.raises(RuntimeError, match=r"algorithm\.compile=True: .*Run with algorithm\.compile=False"):
        GradientStep("clip", 0.2, compiled={})(agent, agent.data, torch.ones(agent.data.shape))


# In experiments


def speaker_listener():
    task = VmasTask.SIMPLE_SPEAKER_LISTENER.get_from_yaml()
    task.config.update(max_steps=5)
    return task


RUNS = {  # configuration, its keys, the task, graphs
    "happo": (HappoConfig, {"entropy_coef": 0.01, "epsilon_schedule": "linear"}, None, 1),
    "a2po": (A2poConfig, {}, None, 1),
    "discrete, masked, absent": (HappoConfig, {"entropy_coef": 0.01}, StandInTask(mask=True, absent=True), 1),
    "a team of two groups": (HappoConfig, {"teams": [["speaker", "listener"]]}, speaker_listener(), 2),
}


def assert_equal_runs(one, other):
    for (name, p), q in zip(policy_parameters(one).items(), policy_parameters(other).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    logged, expected = scalars(one), scalars(other)
    assert logged.keys() == expected.keys()
    for name in logged:
        if "policy" in name:
            assert logged[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "happo")) for k in RUNS])
def test_runs_are_equal_to_rounding(kind, run, graphs):
    config, keys, task, n_graphs = RUNS[kind]
    settings = {"task": task, "max_n_iters": 3, "on_policy_minibatch_size": 15}  # of 40 frames: 15, 15, 10
    compiled = run(configured(config, compile=True, **keys), **settings)
    assert graphs() == n_graphs
    assert_equal_runs(compiled, run(configured(config, **keys), **settings))


def test_a_run_goes_on_with_or_without(make_experiment, graphs, tmp_path):
    """Nothing of it is in a checkpoint, nor in what a run is."""
    settings = {"checkpoint_at_end": True, "max_n_iters": 1, "create_json": False}
    first = make_experiment(configured(HappoConfig, compile=True), **settings)
    first.run()
    again = {"restore_file": str(first.folder_name / "checkpoints" / "checkpoint_40.pt"), "max_n_iters": 2}
    for compiled, n_graphs in ((False, 0), (True, 1)):
        counters.clear()
        resumed = make_experiment(configured(HappoConfig, compile=compiled), **again)
        resumed.run()
        assert (resumed.n_iters_performed, graphs()) == (2, n_graphs)


def test_an_experiment_is_freed(run, graphs):
    experiment = run(configured(HappoConfig, compile=True))
    assert graphs() == 1
    (step,) = experiment.algorithm._compiled.values()
    gone = weakref.ref(experiment), weakref.ref(step._function)
    del experiment, step
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1)
def test_more_experiments_than_recompilations_are_allowed(graphs):
    for k, distribution in enumerate(("tanh", "categorical"), 1):
        updated({}, distribution=distribution)
        assert graphs() == k


# Refused


@pytest.mark.parametrize(
    ("model", "reason"),
    [(gnn(), r"cannot be run for one agent alone \(GnnConfig\)"), (GruConfig(**RNN), r"is recurrent \(GruConfig\)")],
    ids=["gnn", "gru"],
)
def test_models_that_it_cannot_serve(model, reason, make_experiment):
    with pytest.raises(ValueError, match=rf"algorithm\.compile=True: .* {reason}\. Take algorithm\.compile=False"):
        make_experiment(configured(HappoConfig, compile=True), model=model)
    make_experiment(HappoConfig.get_from_yaml(), model=model)


def refusal(make_experiment, tmp_path, **settings):
    with pytest.raises(ValueError, match=r"algorithm\.compile=True: .*algorithm\.compile=False") as error:
        make_experiment(configured(HappoConfig, compile=True), **settings)
    assert not [*tmp_path.iterdir()]
    return str(error.value)


def test_without_a_compiler(make_experiment, tmp_path):
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert "needs a C++ compiler" in refusal(make_experiment, tmp_path)
        make_experiment(HappoConfig.get_from_yaml())


def test_without_pythons_headers(make_experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "sysconfig", SimpleNamespace(get_path=lambda name: f"/nowhere/{name}"))
    assert "no Python.h in /nowhere/include" in refusal(make_experiment, tmp_path)


def test_on_a_gpu_without_triton(make_experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(checks, "_memory", lambda device: math.inf)
    hidden = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(checks, "importlib", hidden)
    assert "the package triton" in refusal(make_experiment, tmp_path, train_device="cuda", loggers=[])


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_it_is_a_key_of_gradient_steps_in_turns_alone(name):
    def composed():
        with initialize_config_module("benchmarl.conf", version_base=None):
            return compose("config", overrides=[f"algorithm={name}", "task=vmas/balance", "algorithm.compile=True"])

    if issubclass(ALGORITHMS[name], SequentialGradientConfig):
        assert load_algorithm_config_from_hydra(composed().algorithm) == dataclasses.replace(
            ALGORITHMS[name].get_from_yaml(), compile=True
        )
    else:
        with pytest.raises(ConfigCompositionException, match=r"algorithm\.compile"):
            composed()


# With the compiler that users have


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["happo", "a2po absent", "entropy drawn", "action mask, absent", "cnn"])
def test_inductor(kind, eager_steps):
    counters.clear()
    compiled = updated({}, **KINDS[kind])
    assert counters["stats"]["unique_graphs"] == 1
    assert eager_steps[0] == ITERATIONS * 3 * EPOCHS
    assert_equal_results(compiled, updated(None, **KINDS[kind]))


@pytest.mark.slow
def test_a_run_by_inductor(run):
    settings = {"max_n_iters": 3, "on_policy_minibatch_size": 15}
    compiled = run(configured(HappoConfig, compile=True, entropy_coef=0.01), **settings)
    assert_equal_runs(compiled, run(configured(HappoConfig, entropy_coef=0.01), **settings))


# Inductor advises other arithmetic, and records an empty graph to have a pool of memory.
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32", "ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("kind", ["happo", "a2po absent", "entropy drawn", "action mask, absent"])
def test_cuda_graphs(kind, request):
    """On a real GPU: the simulated one has no torch.compile."""
    if request.config.simulated:
        pytest.skip("the simulated device has no torch.compile")
    compiled = updated({}, **KINDS[kind], device="cuda")
    assert_equal_results(compiled, updated(None, **KINDS[kind], device="cuda"))
