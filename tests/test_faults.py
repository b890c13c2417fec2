"""What goes wrong in a run, one thing at a time, in every algorithm: parameters stay finite, logs stay readable."""

import gc
import math
from pathlib import Path

import pytest
import torch
from benchmarl.experiment import Callback
from cases import MAIN, by_family
from conftest import policy_parameters, scalars
from environments import StandIn, StandInTask

main_cases = pytest.mark.parametrize("case", MAIN, ids=[case.id for case in MAIN])
family_cases = pytest.mark.parametrize("case", by_family(MAIN))
values = pytest.mark.parametrize("value", [math.nan, math.inf])


def check_whole(experiment, skipped=None):
    """Parameters, optimizer states and logs are finite; so many steps were skipped in each iteration."""
    check_parameters(experiment)
    logged = scalars(experiment)
    assert {name: row for name, row in logged.items() if not all(map(math.isfinite, row))} == {}
    if skipped is not None:
        assert logged["train_agents_skipped_steps"] == skipped
    return logged


def check_parameters(experiment):
    tensors = [p for loss in experiment.losses.values() for p in loss.parameters()]
    for optimizers in experiment.optimizers.values():
        for optimizer in optimizers.values():
            tensors += [moment for state in optimizer.state.values() for moment in state.values()]
    assert all(tensor.isfinite().all() for tensor in tensors)


########
# Values
########


class SetAdvantages(Callback):
    """Writes into the advantages of one iteration, behind the value estimator."""

    def __init__(self, value, iteration, entry=...):
        super().__init__()
        self.value, self.iteration, self.entry = value, iteration, entry

    def on_setup(self):
        loss = self.experiment.losses["agents"]
        loss.value_estimator.register_forward_hook(lambda module, args, out: self.write(args[0]))

    def write(self, batch):
        if self.experiment.n_iters_performed == self.iteration:
            batch["agents", "advantage"][self.entry] = self.value
            self.before = policy_parameters(self.experiment)


def check_one_bad_iteration(experiment):
    """The second of three; the first and the last are as ever."""
    check_parameters(experiment)
    first, bad, last = scalars(experiment)["train_agents_skipped_steps"]
    assert first == last == 0
    assert bad > 0


@family_cases
@values
def test_an_advantage_that_is_not_finite(case, value, run):
    spoil = SetAdvantages(value, iteration=1, entry=(1, 2, 1))
    check_one_bad_iteration(run(case.config(), task=StandInTask(), max_n_iters=3, callbacks=[spoil]))


@family_cases
@values
def test_a_gradient_that_is_not_finite(case, value, make_experiment):
    experiment = make_experiment(case.config(), task=StandInTask(), max_n_iters=3)
    if case.sequential:
        leaf = experiment.algorithm._policies["agents"].agents[1].parameters[0]
    else:
        leaf = experiment.optimizers["agents"]["loss_objective"].param_groups[0]["params"][0]
    leaf.register_hook(lambda gradient: gradient * value if experiment.n_iters_performed == 1 else gradient)
    experiment.run()
    check_one_bad_iteration(experiment)


@main_cases
def test_advantages_that_are_all_zero_move_no_policy(case, run):
    zero = SetAdvantages(0.0, iteration=0)
    experiment = run(case.config(), task=StandInTask(), max_n_iters=1, callbacks=[zero])
    check_whole(experiment, [0])
    after = policy_parameters(experiment)
    assert all(torch.equal(after[name], value) for name, value in zero.before.items())


class PayAlike(Callback):
    def on_batch_collected(self, batch):
        batch["next", "agents", "reward"].fill_(3.0)


PAIRS = [  # a spread of zero could divide; kkt and greedy refuse statistics of each agent
    pytest.param(*param.values, over, id=f"{param.id}-{over}", marks=param.marks)
    for param in by_family(MAIN)
    for over in ("batch", "per_agent")
    if over == "batch" or getattr(param.values[0].config(), "allocation", "uniform") == "uniform"
]


@pytest.mark.parametrize(("case", "over"), PAIRS)
def test_a_constant_reward(case, over, run):
    experiment = run(case.config(normalize_advantage=over), task=StandInTask(), callbacks=[PayAlike()])
    check_whole(experiment, [0, 0])


class PayOpposed(Callback):
    """One agent gains what the other loses."""

    def on_batch_collected(self, batch):
        reward = batch["next", "agents", "reward"]
        reward[..., 1, :] = -reward[..., 0, :]


@family_cases
def test_two_agents_with_opposed_rewards(case, run):
    experiment = run(case.config(), task=StandInTask(n_agents=2), callbacks=[PayOpposed()])
    check_whole(experiment, [0, 0])


#########
# Actions
#########


class Saturate(Callback):
    """Moves the means of the policy, before they are squashed, so far out that the actions are at their bounds."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def on_setup(self):
        for name, parameter in self.experiment.losses["agents"].named_parameters():
            if "actor" in name and name.endswith("bias"):
                parameter.data[..., :2] = self.mean

    def on_batch_collected(self, batch):
        assert batch["agents", "action"].abs().amin() > 1 - 1e-4


@family_cases
def test_actions_at_the_bounds(case, run):
    check_whole(run(case.config(), callbacks=[Saturate(10.0)]), [0, 0])


@family_cases
def test_actions_so_far_beyond_the_bounds_that_ratios_leave_the_range_of_floats(case, run):
    """What they were before they were squashed is lost: a small step moves log-ratios by hundreds."""
    experiment = run(case.config(), callbacks=[Saturate(1000.0)], lr=0.3)
    check_parameters(experiment)
    logged = scalars(experiment)
    if case.natural:  # no step along the line keeps the bound on the KL
        assert logged["train_agents_policy_rejected"] == [1, 1]
    elif case.sequential:
        assert logged["train_agents_policy_factor_max_position_1"][0] == 0
    else:
        assert logged["train_agents_policy_ratio_min"][1] == 0


class OneAllowed(StandIn):
    """Only the first ``allowed`` actions are allowed."""

    allowed = 1

    def _observe(self):
        out = super()._observe()
        out["agents", "action_mask"] = torch.arange(4).expand(self.n_agents, 4) < self.allowed
        return out


class NoneAllowed(OneAllowed):
    allowed = 0


class EnvTask(StandInTask):
    """A task of the given environment."""

    def __init__(self, env, **config):
        super().__init__(**config)
        self.env = env


@family_cases
def test_one_allowed_action(case, make_experiment):
    """Then there is nothing to choose: all ratios are 1, and no policy moves."""
    experiment = make_experiment(case.config(), task=EnvTask(OneAllowed, mask=True))
    before = policy_parameters(experiment)
    experiment.run()
    check_whole(experiment, [0, 0])
    assert all(torch.equal(before[name], value) for name, value in policy_parameters(experiment).items())


@main_cases
def test_no_allowed_action(case, make_experiment):
    experiment = make_experiment(case.config(), task=EnvTask(NoneAllowed, mask=True))
    with pytest.raises(ValueError, match=r"'agents', 'action_mask'\) allows no action at index \[0, 0\]"):
        experiment.run()


##############
# Environments
##############


class Raises(StandIn):
    """Breaks down in the third iteration."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.total = 0

    def _step(self, tensordict):
        self.total += 1
        if self.total > 25:  # ten steps of this environment are an iteration
            raise ConnectionError("the simulator has gone away")
        return super()._step(tensordict)


@family_cases
def test_an_environment_that_raises(case, make_experiment):
    experiment = make_experiment(case.config(), task=EnvTask(Raises), max_n_iters=5, checkpoint_interval=40)
    with pytest.raises(ConnectionError, match="gone away"):
        experiment.run()
    assert experiment.n_iters_performed == 2
    logged = check_whole(experiment, [0, 0])
    assert len(logged["train_agents_loss_critic"]) == 2
    saved = torch.load(experiment.folder_name / "checkpoints" / "latest.pt")
    for name, value in experiment.losses["agents"].named_parameters():
        assert torch.equal(saved["loss_agents"][name], value), name


class BadObservation(StandIn):
    """One entry of the third observation of each episode is not finite."""

    value = math.nan

    def _observe(self):
        out = super()._observe()
        if self.step_count == 3:
            out["agents", "observation"][1, 2] = self.value
        return out


class InfiniteObservation(BadObservation):
    value = math.inf


@main_cases
@pytest.mark.parametrize("env", [BadObservation, InfiniteObservation])
def test_an_environment_that_shows_what_is_not_finite(case, env, make_experiment):
    """Before anything is learned: sampling would fail with a message about probabilities, VMAS with none."""
    experiment = make_experiment(case.config(), task=EnvTask(env))
    before = policy_parameters(experiment)
    with pytest.raises(ValueError, match=r"'agents', 'observation'\) is NaN or infinite at index \[0, 1, 2\]"):
        experiment.run()
    assert all(torch.equal(before[name], value) for name, value in policy_parameters(experiment).items())


def test_a_policy_can_still_be_called_on_tensors(make_experiment):
    policy = make_experiment(MAIN[0].config(), task=StandInTask()).policy
    observation = torch.zeros(3, 4)
    by_name, by_order = policy(agents_observation=observation), policy(observation)
    assert len(by_name) == len(by_order) > 1


@pytest.mark.parametrize("collect_with_grad", [False, True])
def test_evaluation_and_collection_with_grad_are_looked_at_too(collect_with_grad, make_experiment):
    experiment = make_experiment(MAIN[0].config(), task=EnvTask(BadObservation), collect_with_grad=collect_with_grad)
    run = experiment.run if collect_with_grad else experiment.evaluate
    with pytest.raises(ValueError, match="is NaN or infinite at index"):
        run()


########
# Shapes
########

SHAPES = {
    "episodes of one step": {"max_steps": 1},
    "environments do not divide the batch": {"frames": 42},
    "minibatches do not divide the batch": {"on_policy_minibatch_size": 17},
    "one environment": {"on_policy_n_envs_per_worker": 1},
    "one agent": {"n_agents": 1},
}


@pytest.mark.filterwarnings("ignore:frames_per_batch .* is not exactly divisible")
@family_cases
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(case, shape, run):
    settings = dict(SHAPES[shape])
    if "frames" in settings:
        settings["on_policy_collected_frames_per_batch"] = settings.pop("frames")
    config = {key: settings.pop(key) for key in ("max_steps", "n_agents") if key in settings}
    experiment = run(case.config(), task=StandInTask(**config), **settings)
    check_whole(experiment, [0, 0])


######
# Runs
######


@family_cases
def test_the_same_seed_gives_the_same_run(case, make_experiment):
    """Bit for bit, on one machine and with one number of threads."""
    runs = []
    for _ in range(2):
        experiment = make_experiment(case.config(), evaluation=True)
        experiment.run()
        logged = {name: row for name, row in scalars(experiment).items() if not name.startswith("timers")}
        runs.append((list(experiment.losses["agents"].parameters()), logged))
    (one, first), (two, second) = runs
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    assert first == second


def test_another_seed_gives_another_run(run):
    one, other = (policy_parameters(run(MAIN[0].config(), seed=seed)) for seed in (0, 1))
    assert not any(torch.equal(one[name], other[name]) for name in one)


class Count(Callback):
    """Counts the tensors that are alive and the files that are open, in two iterations."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def on_train_end(self, training_td, group):
        if self.experiment.n_iters_performed not in (3, 5):  # counting takes long
            return
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        self.counts.append((tensors, len(list(Path("/proc/self/fd").iterdir()))))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
@family_cases
def test_nothing_is_kept_from_one_iteration_to_the_next(case, run):
    """Once the optimizers have their states and GPAE its past batches. Memory: benchmarks/soak.py."""
    count = Count()
    run(case.config(), callbacks=[count], task=StandInTask(), max_n_iters=7, checkpoint_interval=40)
    before, after = count.counts
    assert before == after
