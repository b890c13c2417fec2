"""Learning rates and ε over a run, in closed form; a resumed run goes on bit for bit."""

import pytest
import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from cases import CASES, MAIN, by_family
from conftest import scalars

from benchmarl_trust import HappoConfig, HatrpoConfig, MarsConfig
from benchmarl_trust.algorithms.schedules import Schedule, set_lr

GRADIENT = [case for case in CASES if not case.natural]
LR = 1e-3


def rates(experiment, group="agents"):
    return {g["lr"] for optimizer in experiment.optimizers[group].values() for g in optimizer.param_groups}


def watch(experiment):
    """The rates of all steps of every optimizer, by iteration."""
    seen = {}
    for name, optimizer in experiment.optimizers["agents"].items():

        def look(optimizer, args, kwargs, name=name):
            steps = seen.setdefault(experiment.n_iters_performed, {})
            steps.setdefault(name, set()).update(group["lr"] for group in optimizer.param_groups)

        optimizer.register_step_pre_hook(look)
    return seen


@pytest.mark.parametrize("case", by_family(MAIN))
@pytest.mark.parametrize(
    ("kind", "warmup", "factors"),
    [
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 80, [0.5, 0.75, 0.5, 0.25]),
        ("linear", 160, [0.25, 0.5 * 0.75, 0.75 * 0.5, 0.25]),
        ("constant", 120, [1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_every_optimizer_steps_with_the_rate_of_its_iteration(case, kind, warmup, factors, make_experiment):
    """Of 4 iterations of 40 frames."""
    experiment = make_experiment(case.config(lr_schedule=kind, warmup_frames=warmup), max_n_iters=4)
    seen = watch(experiment)
    experiment.run()
    assert scalars(experiment)["train_agents_lr"] == pytest.approx([LR * factor for factor in factors])
    for iteration, factor in enumerate(factors):
        assert seen[iteration].keys() == experiment.optimizers["agents"].keys()
        for used in seen[iteration].values():
            assert list(used) == pytest.approx([LR * factor])


def test_a_shared_policys_optimizer_and_all_groups_have_it(run):
    task = VmasTask.SIMPLE_SPEAKER_LISTENER.get_from_yaml()
    task.config.update(max_steps=5)
    config = HappoConfig.get_from_yaml()
    config.lr_schedule, config.teams = "linear", [["speaker", "listener"]]
    experiment = run(config, task=task, share_policy_params=True)
    assert rates(experiment, "speaker") == rates(experiment, "listener") == {LR / 2}


def one_iteration(experiment, done, frames=0):
    """Train on the first batch as in the iteration after so many; returns what is logged."""
    experiment.n_iters_performed, experiment.total_frames = done, frames
    logged = {}
    experiment.logger.log = lambda values, step: logged.update(values)
    batch = next(iter(experiment.collector)).clone()
    torch.manual_seed(1)
    train(experiment, batch)
    return logged


def train(experiment, batch):
    """What BenchMARL's loop does with a collected batch."""
    experiment.total_frames += batch.numel()
    experiment._on_batch_collected(batch)
    group_batch = experiment.algorithm.process_batch("agents", batch.exclude("info", ("agents", "info")))
    if not experiment.algorithm.has_rnn:
        group_batch = group_batch.reshape(-1)
    experiment.replay_buffers["agents"].extend(group_batch)
    tds = torch.stack([experiment._optimizer_loop("agents") for _ in range(4)])
    experiment.logger.log({f"train/agents/{key}": value.mean().item() for key, value in tds.items()}, step=0)
    experiment._on_train_end(tds, "agents")
    experiment.n_iters_performed += 1


@pytest.mark.parametrize("case", by_family(GRADIENT))
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_half_way_epsilon_is_half_wherever_it_is_read(case, share, make_experiment):
    """The gains', by position too, that inside the clip, and that of the logged shares."""
    half = make_experiment(case.config(epsilon=0.02, epsilon_negative=0.01), share_policy_params=share, lr=0.02)
    expected = one_iteration(half, 0)
    config = case.config(epsilon=0.04, epsilon_negative=0.02, epsilon_schedule="linear")
    ours = make_experiment(config, share_policy_params=share, max_n_iters=4, lr=0.02)
    logged = one_iteration(ours, 2)
    for p, q in zip(half.losses["agents"].parameters(), ours.losses["agents"].parameters(), strict=True):
        assert torch.equal(p, q)
    assert logged.pop("train/agents/policy/epsilon") == 0.02
    assert logged == expected
    name = "policy/outside_fraction" if case.sequential else "outside_fraction"
    assert logged[f"train/agents/{name}"] > 0
    assert ours.losses["agents"].epsilon == (0.01, 0.02)


@pytest.mark.parametrize("case", by_family(CASES))
def test_half_way_the_rate_is_half(case, make_experiment):
    half = make_experiment(case.config(), lr=LR / 2)
    expected = one_iteration(half, 0)
    ours = make_experiment(case.config(lr_schedule="linear"), max_n_iters=4, lr=LR)
    logged = one_iteration(ours, 2)
    assert logged.pop("train/agents/lr") == LR / 2
    assert logged == expected
    for p, q in zip(half.losses["agents"].parameters(), ours.losses["agents"].parameters(), strict=True):
        assert torch.equal(p, q)


def scheduled(case, **settings):
    epsilon = {} if case.natural else {"epsilon_schedule": "linear"}
    return case.config(lr_schedule="linear", warmup_frames=80, **epsilon, **settings)


@pytest.mark.parametrize("case", by_family(MAIN))
def test_a_resumed_run_goes_on_bit_for_bit(case, make_experiment, tmp_path):
    experiment = make_experiment(scheduled(case), max_n_iters=4)
    batches = [batch.clone() for batch in experiment.collector]
    for batch in batches[:2]:
        train(experiment, batch.clone())
    torch.save(experiment.state_dict(), tmp_path / "state.pt")
    for batch in batches[2:]:
        train(experiment, batch.clone())
    again = make_experiment(scheduled(case), max_n_iters=4)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))  # weights_only, as BenchMARL loads it
    for batch in batches[2:]:
        train(again, batch.clone())
    assert rates(again) == rates(experiment) == {LR / 4}
    for p, q in zip(experiment.losses["agents"].parameters(), again.losses["agents"].parameters(), strict=True):
        assert torch.equal(p, q)


def saved(run, config, **settings):
    """The checkpoint at the end of a run."""
    experiment = run(config, checkpoint_at_end=True, **settings)
    return torch.load(experiment.folder_name / "checkpoints" / "latest.pt")


def test_a_run_that_is_made_longer_is_where_a_long_one_would_be(run, make_experiment):
    config = scheduled(MAIN[0])
    state = saved(run, config, max_n_iters=2)
    again = make_experiment(config, max_n_iters=8)
    again.load_state_dict(state)
    assert again.n_iters_performed == 2
    again.run()
    logged = scalars(again)
    assert logged["train_agents_lr"] == pytest.approx([LR * (1 - k / 8) for k in range(2, 8)])
    assert logged["train_agents_policy_epsilon"] == pytest.approx([0.2 * (1 - k / 8) for k in range(2, 8)])


def test_without_its_schedule_a_resumed_run_has_the_rate_of_its_configuration(run, make_experiment):
    """A schedule by a callback is restored; one by the keys is said by the keys."""
    state = saved(run, scheduled(MAIN[0]))
    again = make_experiment(MAIN[0].config())
    again.load_state_dict(state)
    assert rates(again) == {LR}


def test_a_resumed_run_falls_from_another_rate_of_the_user(run, make_experiment):
    state = saved(run, scheduled(MAIN[0]))
    again = make_experiment(scheduled(MAIN[0]), max_n_iters=4, lr=LR / 10)
    again.load_state_dict(state)
    again.run()
    assert list(rates(again)) == pytest.approx([LR / 40])


def test_in_an_ensemble_each_group_has_its_own(run):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    task.config.update(max_steps=5)
    configs = {"adversary": MarsConfig.get_from_yaml(), "agent": MappoConfig.get_from_yaml()}
    configs["adversary"].lr_schedule = configs["adversary"].epsilon_schedule = "linear"
    experiment = run(EnsembleAlgorithmConfig(configs), task=task)
    assert (rates(experiment, "adversary"), rates(experiment, "agent")) == ({LR / 2}, {LR})
    assert experiment.losses["adversary"].epsilon == (0.1, 0.1)


@pytest.mark.parametrize("case", by_family(MAIN))
def test_without_schedules_nobody_touches_a_rate(case, make_experiment):
    experiment = make_experiment(case.config())
    set_lr(experiment.optimizers["agents"].values(), 0.5)  # as a callback of the user would
    experiment.run()
    assert rates(experiment) == {0.5}
    assert not [name for name in scalars(experiment) if name.endswith(("_lr", "policy_epsilon"))]


def test_a_rate_on_a_device_stays_there():
    lr = torch.tensor(0.1)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=lr, capturable=True)
    set_lr([optimizer], 0.05)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.05


@pytest.mark.filterwarnings("ignore:total_frames .* is not exactly divisible")
def test_the_last_batch_and_a_batch_beyond_the_end_are_learned_from(make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), max_n_iters=None, max_n_frames=100)  # 3 batches of 40
    factors = []
    for done in range(5):
        experiment.n_iters_performed = done
        factors.append(Schedule("linear").factor(experiment))
    assert factors == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3, 1 / 3])


def test_a_warm_up_that_never_ends_is_refused(make_experiment):
    config = HatrpoConfig.get_from_yaml()
    config.warmup_frames = 81
    with pytest.raises(ValueError, match=r"algorithm\.warmup_frames=81: the run has 80 frames"):
        make_experiment(config)
    config.warmup_frames = 80
    make_experiment(config)


@pytest.mark.parametrize("key", ["epsilon_schedule", "target_kl"])
def test_natural_steps_refuse_what_they_have_not(key, make_experiment):
    config = HatrpoConfig.get_from_yaml()
    setattr(config, key, "linear" if key == "epsilon_schedule" else 0.01)
    with pytest.raises(ValueError, match=rf"algorithm\.{key}=.*algorithm\.kl_threshold.*algorithm=happo"):
        make_experiment(config)
