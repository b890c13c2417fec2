"""On a GPU, or one that is simulated: what runs on the CPU runs there, with the same numbers, wherever it is collected.

Every algorithm on MLPs: ``test_smoke.py``; waits and launches: ``simcuda/test_budgets.py``.
"""

import math

import pytest
import torch
from benchmarl.experiment import Callback, Experiment
from benchmarl.models import CnnConfig, GruConfig
from cases import CASES, FAMILIES, configured
from conftest import policy_parameters, scalars, waits_are_errors
from environments import StandInTask
from problems import CNN, MODELS, RNN, gnn, make_agents, make_problem

from benchmarl_trust import HappoConfig, HatrpoGConfig, MarsConfig
from benchmarl_trust.functional import line_search
from benchmarl_trust.policy import head_of, remember_old_policy
from benchmarl_trust.updates import (
    GradientStep,
    GreedyAllocation,
    KktAllocation,
    NaturalGradient,
    NaturalStep,
    UniformAllocation,
    sweep,
)
from benchmarl_trust.updates.natural import Proposal
from benchmarl_trust.value.gpae import _layout

pytestmark = pytest.mark.gpu

family_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.id in FAMILIES], ids=lambda case: case.id
)
ON_CUDA = {"train_device": "cuda", "buffer_device": "cuda", "sampling_device": "cuda"}
ON_CPU = dict.fromkeys(ON_CUDA, "cpu")


# One update, step by step as on the CPU


def allocation(kind, agents):
    solver = NaturalGradient(cg_iters=3)
    if kind == "uniform":
        return UniformAllocation(agents, 0.03, solver, [2, 0, 1])
    if kind == "kkt":
        return KktAllocation(agents, 0.03, 0.002, 0.02, solver)
    return GreedyAllocation(agents, 0.03, 0.002, 0.02, solver)


def updated(device, step, model, distribution, shared=False, masked=False):
    """A policy's parameters after one sweep, on the CPU."""
    problem = make_problem(model, distribution, shared=shared, device=device)
    agents = make_agents(problem, fused=True)
    for k, agent in enumerate(agents):
        if masked:
            rows = torch.arange(len(agent.data), device=device) % 3 != k
            agent.data["mask"] = rows.reshape(-1, *[1] * (agent.data.ndim - 1)).expand(agent.data.shape)
        remember_old_policy(agent)
    if step == "gradient":
        infos = sweep(agents, [2, 0, 1], GradientStep("clip", 0.2, entropy_coef=0.0), "capped")
    else:
        natural = NaturalStep(agents, allocation(step, agents))
        infos = sweep(agents, natural.choose, natural)
    assert all(info.finite for info in infos)
    assert all(p.device.type == device for p in problem.policy.parameters())
    return [p.detach().cpu() for p in problem.policy.parameters()]


def assert_as_on_the_cpu(*args, **kwargs):
    for p, q in zip(updated("cuda", *args, **kwargs), updated("cpu", *args, **kwargs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


steps = pytest.mark.parametrize("step", ["gradient", "uniform", "kkt", "greedy"])


@steps
@pytest.mark.parametrize("distribution", ["tanh", "normal", "categorical", "masked"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_distributions(step, distribution, shared):
    assert_as_on_the_cpu(step, "mlp", distribution, shared)


@pytest.mark.parametrize("step", ["gradient", "greedy"])
@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"mlp"}))
def test_models(step, model, monkeypatch):
    monkeypatch.setattr(torch, "float", torch.float64)  # to which BenchMARL's models cast
    assert_as_on_the_cpu(step, model, "tanh")


@steps
def test_absent_agents(step):
    assert_as_on_the_cpu(step, "mlp", "masked", masked=True)


# Whole runs


KINDS = {  # task, model, whether parameters are shared; StandInTask acts on the CPU
    "masked-absent": (lambda: StandInTask(mask=True, absent=True), None, False),
    "discrete-shared": (StandInTask, None, True),
    "gru": (lambda: StandInTask(n_agents=2), lambda: GruConfig(**RNN), False),
    "cnn": (lambda: StandInTask(rgb=True), lambda: CnnConfig(**CNN), False),
    # Of VMAS, on the GPU: BenchMARL's GNN cannot be sampled on one device and trained on another.
    "gnn": (lambda: None, gnn, False),
}


@family_cases
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tasks_and_models(case, kind, run):
    task, model, share = KINDS[kind]
    devices = ON_CUDA | {"sampling_device": "cuda" if kind == "gnn" else "cpu"}
    settings = {"share_policy_params": share, "max_n_iters": 1, "on_policy_n_minibatch_iters": 1}
    config = case.config(**({"cg_iters": 2} if case.natural else {}))
    experiment = run(config, task(), model and model(), **settings, **devices)
    assert all(p.is_cuda and p.isfinite().all() for p in policy_parameters(experiment).values())
    assert scalars(experiment)["train_agents_skipped_steps"] == [0]


# Resuming on another device


@pytest.mark.parametrize(
    "config",
    [configured(MarsConfig), configured(HappoConfig), configured(HatrpoGConfig, cg_iters=2)],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_run_goes_on_where_it_is_mapped_to(first, then, config, run):
    settings = {"on_policy_n_minibatch_iters": 1, "checkpoint_at_end": True}
    before = run(config, **settings, **dict.fromkeys(ON_CUDA, first))
    (file,) = (before.folder_name / "checkpoints").glob("checkpoint_*.pt")
    patch = {"max_n_iters": 3, "restore_map_location": then, **dict.fromkeys(ON_CUDA, then)}
    resumed = Experiment.reload_from_file(str(file), experiment_patch=patch)
    for name, value in policy_parameters(before).items():
        assert torch.equal(value.cpu(), policy_parameters(resumed)[name].cpu())
    for group, optimizers in before.optimizers.items():
        for name, old in optimizers.items():
            assert_moments(old, resumed.optimizers[group][name], then)
    resumed.run()
    assert all(p.device.type == then and p.isfinite().all() for p in policy_parameters(resumed).values())
    assert scalars(resumed)["train_agents_skipped_steps"][-1] == 0


def assert_moments(old, new, device):
    """The same numbers, each where a new Adam would have it."""
    assert len(old.state) == len(new.state)
    fused = new.param_groups[0]["fused"]
    for p, q in zip(old.param_groups[0]["params"], new.param_groups[0]["params"], strict=True):
        for key, value in old.state[p].items():
            other = new.state[q][key]
            assert torch.equal(value.cpu(), other.cpu())
            assert other.device.type == (device if fused or key != "step" else "cpu"), key


def test_adams_counter_is_where_a_new_one_has_it(make_experiment):
    """Whatever map_location made of it, also where the user chose an Adam that counts on the host."""
    settings = {"adam_extra_kwargs": {"foreach": True}}
    first, second = (make_experiment(MarsConfig.get_from_yaml(), **settings, **ON_CUDA) for _ in range(2))
    for optimizer in first.optimizers["agents"].values():
        sum(leaf.sum() for leaf in optimizer.param_groups[0]["params"]).backward()
        optimizer.step()
    state = first.state_dict()
    for optimizer in state["benchmarl_trust"]["optimizers"]["agents"].values():
        for moments in optimizer["state"].values():
            assert moments["step"].device.type == "cpu"
            moments["step"] = moments["step"].to("cuda")  # as restore_map_location does
    second.load_state_dict(state)
    for optimizer in second.optimizers["agents"].values():
        assert {moments["step"].device.type for moments in optimizer.state.values()} == {"cpu"}


# What is not finite


def spoil_critic(experiment, iterations):
    leaf = experiment.optimizers["agents"]["loss_critic"].param_groups[0]["params"][0]
    leaf.register_hook(lambda g: g * math.nan if experiment.n_iters_performed in iterations else g)


def state_of(optimizer):
    leaves = optimizer.param_groups[0]["params"]
    moments = [value for leaf in leaves for value in optimizer.state.get(leaf, {}).values()]
    return [tensor.detach().clone() for tensor in (*leaves, *moments)]


@pytest.mark.parametrize("adam", [{}, {"foreach": True}], ids=["fused", "the user's"])
def test_a_bad_gradient_is_dropped_and_counted(adam, make_experiment):
    experiment = make_experiment(
        MarsConfig.get_from_yaml(), max_n_iters=3, adam_extra_kwargs=adam, **ON_CUDA, clip_grad_val=5.0
    )
    spoil_critic(experiment, {0, 2})
    experiment.run()
    steps = experiment.config.n_optimizer_steps(True) * 2  # of two minibatches
    assert scalars(experiment)["train_agents_skipped_steps"] == [steps, 0, steps]
    optimizer = experiment.optimizers["agents"]["loss_critic"]
    assert bool(optimizer.param_groups[0]["fused"]) is not bool(adam)
    assert {int(moments["step"]) for moments in optimizer.state.values()} == {steps}, "counted once in the second"
    assert all(tensor.isfinite().all() for tensor in state_of(optimizer))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_a_dropped_step_changes_nothing_and_waits_for_nothing(bad, make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), **ON_CUDA)
    optimizer = experiment.optimizers["agents"]["loss_critic"]
    leaves = optimizer.param_groups[0]["params"]

    def step(size):
        sum((leaf * size).sum() for leaf in leaves).backward()
        with waits_are_errors():
            optimizer.step()
        optimizer.zero_grad()

    step(1.0)
    before = state_of(optimizer)
    step(bad)
    assert all(torch.equal(one, other) for one, other in zip(before, state_of(optimizer), strict=True))
    step(1.0)
    assert not any(torch.equal(one, other) for one, other in zip(before, state_of(optimizer), strict=True))
    guard = experiment.algorithm.guard
    guard._fetch_skipped()
    assert guard.skipped == {"agents": 1}


class Spoil(Callback):
    def on_batch_collected(self, batch):
        batch["agents", "observation"][1, 2] = math.nan


def test_a_bad_observation_is_refused(make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), callbacks=[Spoil()], **ON_CUDA)
    with pytest.raises(ValueError, match=r"NaN or infinite entries: .*observation"):
        experiment.run()


# Waits


def test_waits_are_refused_for_a_while_only():
    x = torch.ones(2, device="cuda")
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()
    assert x.sum().item() == 2


def test_bounds_on_the_cpu_are_copied_once():
    """As where actions are sampled on the CPU: actions are unsquashed and entropies estimated without a wait."""
    problem = make_problem("mlp", "tanh", device="cuda")
    head = head_of(problem.policy.module[-1])
    assert head.log_half_width.device.type == "cpu"
    action = problem.batch["agents", "action"]
    outputs = tuple(problem.batch["agents", key] for key in ("loc", "scale"))
    first = head.base_action(action), head.entropy(tuple(x[..., 0, :] for x in outputs), 0)
    with waits_are_errors():
        again = head.base_action(action), head.entropy(tuple(x[..., 1, :] for x in outputs), 1)
    assert torch.equal(first[0], again[0])
    assert again[1].isfinite().all()


def test_some_of_the_proposals_without_a_wait():
    proposal = Proposal(*(torch.arange(8.0, device="cuda").reshape(4, 2) for _ in Proposal._fields))
    with waits_are_errors():
        one, others = proposal.of(3), proposal.without(1)
    assert one.direction.tolist() == [[6, 7]]
    assert others.direction.tolist() == [[0, 1], [4, 5], [6, 7]]


def test_where_trajectories_end_is_asked_once(recorder):
    done = torch.zeros(3, 5, dtype=torch.bool)
    done[0, 1] = done[0, 3] = done[2, 2] = True
    with recorder.recording():
        layout = _layout(done.to("cuda", non_blocking=True))
    assert recorder.waits.total() == 1, recorder.waits
    for on_gpu, on_cpu in zip(layout, _layout(done), strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize(("expected", "trials"), [(1.0, 1), (-1.0, 0), (math.nan, 0)])
def test_a_line_search_waits_once_a_trial(expected, trials, recorder):
    theta, step, kl = (torch.full((1,), x, device="cuda") for x in (0.0, 1.0, 0.1))
    expected = torch.full((), expected, device="cuda")
    with recorder.recording():
        search = line_search([theta], [step], lambda: (theta.sum(), kl.sum()), expected, 0.5)
    assert recorder.waits.total() == 1, recorder.waits
    assert search.trials.item() == trials
    assert theta.item() == trials
