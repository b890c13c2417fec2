"""After a restore the same next batch gives, bit for bit, the same parameters as without the interruption."""

import json
import random

import numpy as np
import pytest
import torch
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment
from cases import CASES, FAMILIES, MAIN

from benchmarl_trust import GpaeConfig, HappoConfig, MarsConfig
from benchmarl_trust.runtime.resume import KEY

other_seed = pytest.mark.filterwarnings("ignore:This run starts from the checkpoint of another one")
all_cases = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def train(experiment, batch):
    """What BenchMARL's loop does with a collected batch."""
    experiment._on_batch_collected(batch)
    for group in experiment.train_group_map:
        group_batch = batch.exclude(*experiment._get_excluded_keys(group))
        group_batch = experiment.algorithm.process_batch(group, group_batch)
        if not experiment.algorithm.has_rnn:
            group_batch = group_batch.reshape(-1)
        experiment.replay_buffers[group].extend(group_batch)
        tds = [experiment._optimizer_loop(group) for _ in range(4)]
        experiment._on_train_end(torch.stack(tds), group)


def draws():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random(), random.gauss(0, 1)]


def interrupted():
    """With slow ones beside one of each family; natural steps through recurrent policies take seconds."""
    for case, recurrent in [*((case, False) for case in CASES), *((case, True) for case in MAIN)]:
        fast = case.id in (*FAMILIES, "a2po-running") and not (case.natural and recurrent)
        name = f"{case.id}-{'shared-gru' if recurrent else 'separate-mlp'}"
        yield pytest.param(case, recurrent, id=name, marks=() if fast else pytest.mark.slow)


@other_seed
@pytest.mark.parametrize(("case", "recurrent"), interrupted())
def test_resume_is_exact(case, recurrent, make_experiment, tmp_path):
    from test_smoke import MODELS

    model = MODELS["gru"]() if recurrent else None
    experiment = make_experiment(case.config(**case.entropy), model=model, share_policy_params=recurrent, max_n_iters=4)
    batches = [batch.clone() for batch in experiment.collector]
    assert len(batches) == 4
    for batch in batches[:2]:
        train(experiment, batch.clone())
    np.random.rand(3)
    random.gauss(0, 1)  # leaves a second value in Python's generator
    torch.save(experiment.state_dict(), tmp_path / "state.pt")
    for batch in batches[2:]:
        train(experiment, batch.clone())
    expected, expected_draws = list(experiment.losses["agents"].parameters()), draws()

    torch.manual_seed(123)
    again = make_experiment(case.config(**case.entropy), model=model, share_policy_params=recurrent, seed=7)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))  # weights_only, as BenchMARL loads it
    torch.manual_seed(99)  # Experiment.run seeds anew before it collects
    for batch in batches[2:]:
        train(again, batch.clone())
    for p, q in zip(expected, again.losses["agents"].parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(experiment.losses["agents"].buffers(), again.losses["agents"].buffers(), strict=True):
        assert torch.equal(p, q)
    assert draws() == expected_draws


def test_a_checkpoint_without_our_entry_still_loads(make_experiment):
    one = make_experiment(HappoConfig.get_from_yaml())
    state = one.state_dict()
    del state[KEY]
    ours = make_experiment(HappoConfig.get_from_yaml(), seed=3)
    ours.load_state_dict(state)
    for p, q in zip(ours.policy.parameters(), one.policy.parameters(), strict=True):
        assert torch.equal(p, q)


@all_cases
def test_resuming_with_another_learning_rate(case, make_experiment):
    state = make_experiment(case.config()).state_dict()
    again = make_experiment(case.config(), lr=5e-6, adam_eps=1e-3)
    again.load_state_dict(state)
    for optimizer in again.optimizers["agents"].values():
        assert optimizer.param_groups[0]["lr"] == 5e-6
        assert optimizer.param_groups[0]["eps"] == 1e-3


def learning_rates(experiment):
    return {
        name: optimizer.param_groups[0]["lr"]
        for optimizers in experiment.optimizers.values()
        for name, optimizer in optimizers.items()
    }


def scheduled(experiment):
    """Change the rates as a schedule would, each optimizer's to another one."""
    for optimizers in experiment.optimizers.values():
        for i, optimizer in enumerate(optimizers.values()):
            optimizer.param_groups[0]["lr"] /= 2 + i
    return learning_rates(experiment)


@other_seed
@all_cases
def test_scheduled_learning_rates_come_back(case, make_experiment, tmp_path):
    one = make_experiment(case.config(), adam_eps=1e-6)
    batch = next(iter(one.collector))
    rates = scheduled(one)
    assert max(rates.values()) == 5e-4
    assert len(set(rates.values())) == len(rates)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    again = make_experiment(case.config(), adam_eps=1e-3, seed=3)
    assert set(learning_rates(again).values()) == {1e-3}
    again.load_state_dict(torch.load(tmp_path / "state.pt"))  # weights_only, as BenchMARL loads it
    assert learning_rates(again) == rates
    assert {o.param_groups[0]["eps"] for o in again.optimizers["agents"].values()} == {1e-3}
    train(again, batch)
    assert learning_rates(again) == rates


@all_cases
def test_another_learning_rate_of_the_user_holds_against_a_schedule(case, make_experiment):
    one = make_experiment(case.config())
    scheduled(one)
    state = one.state_dict()
    again = make_experiment(case.config(), lr=5e-6)
    again.load_state_dict(state)
    assert set(learning_rates(again).values()) == {5e-6}


def test_rates_of_a_checkpoint_that_does_not_say_its_lr_are_the_configurations(make_experiment):
    one = make_experiment(HappoConfig.get_from_yaml())
    scheduled(one)
    state = one.state_dict()
    del state[KEY]["lr"]
    again = make_experiment(HappoConfig.get_from_yaml())
    again.load_state_dict(state)
    assert set(learning_rates(again).values()) == {1e-3}


def gpae(n_rollouts=2):
    config = GpaeConfig.get_from_yaml()
    config.n_rollouts = n_rollouts
    return config


SHAPES = {  # environments, frames
    "as many frames": (8, 40),
    "more environments": (8, 80),
    "longer": (4, 80),
    "shorter": (4, 20),
}


def of_shape(shape):
    return {"on_policy_n_envs_per_worker": shape[0], "on_policy_collected_frames_per_batch": shape[1]}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("excluded", [False, True], ids=["with buffers", "without"])
def test_kept_batches_of_another_shape_are_refused(excluded, shape, make_experiment):
    """The checkpoint's are of 4 environments and 10 steps; cut to other lengths they would be other trajectories."""
    from test_smoke import MODELS

    for model in (None, MODELS["gru"]()):
        settings = {**of_shape((4, 40)), "restore_file": None, "max_n_iters": 2, "model": model, "critic": model}
        settings |= {"exclude_buffer_from_checkpoint": excluded, "on_policy_minibatch_size": 20}
        experiment = make_experiment(gpae(), checkpoint_at_end=True, **settings)
        assert experiment.algorithm.resume_state.batch_shapes == {"agents": [4, 10]}
        experiment.run()
        file = experiment.folder_name / "checkpoints" / "checkpoint_80.pt"
        again = {**settings, "restore_file": str(file), "max_n_iters": 3}
        resumed = make_experiment(gpae(), **again)
        assert len(resumed.replay_buffers["agents"]) == (0 if excluded else 8 if model else 80)
        again |= of_shape(shape)
        if excluded and shape[1] < 40:
            with pytest.raises(ValueError, match=r"on_policy_collected_frames_per_batch=20: .* saved with 40"):
                make_experiment(gpae(), **{**again, "max_n_iters": 9})
            continue
        if excluded:
            resumed = make_experiment(gpae(), **{**again, "max_n_iters": 9})
            train(resumed, next(iter(resumed.collector)))
            assert len(resumed.replay_buffers["agents"]) == (shape[0] if model else shape[1])
            continue
        with pytest.raises(ValueError, match=r"of 4 environments and 10 steps for group agents") as error:
            make_experiment(gpae(), **again)
        assert f"{shape[0]} environments and {shape[1] // shape[0]} steps" in str(error.value)
        assert "Resume with 4 environments and 40 frames" in str(error.value)
        for key in (*of_shape(shape), "exclude_buffer_from_checkpoint=True"):
            assert f"experiment.{key}" in str(error.value)


@pytest.mark.filterwarnings("ignore:frames_per_batch .* is not exactly divisible")
def test_kept_batches_of_several_groups_are_looked_at(make_experiment):
    task = VmasTask.SIMPLE_SPEAKER_LISTENER.get_from_yaml()
    task.config.update(max_steps=5)
    state = make_experiment(gpae(), task=task, on_policy_collected_frames_per_batch=42).state_dict()
    assert state[KEY]["batch_shapes"] == {"speaker": [4, 11], "listener": [4, 11]}  # whole steps of all environments
    again = make_experiment(gpae(), task=task, on_policy_collected_frames_per_batch=40)
    assert again.algorithm.resume_state.batch_shapes == {"speaker": [4, 10], "listener": [4, 10]}
    again.load_state_dict(state)  # nothing is kept yet
    state["buffer_listener"] = state["buffer_speaker"] = {}
    with pytest.raises(
        ValueError, match=r"4 environments and 11 steps for group speaker; .* 4 environments and 10 steps"
    ):
        again.algorithm.resume_state.on_load_state_dict(state)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.overrides.get("n_rollouts", 1) == 1], ids=lambda case: case.id
)
def test_an_algorithm_that_keeps_no_batch_resumes_with_any_shape(case, make_experiment):
    one = make_experiment(case.config())
    assert one.algorithm.resume_state.batch_shapes == {}
    train(one, next(iter(one.collector)))
    state = one.state_dict()
    assert state["buffer_agents"] is not None
    again = make_experiment(case.config(), on_policy_n_envs_per_worker=8)
    again.load_state_dict(state)
    train(again, next(iter(again.collector)))
    assert all(p.isfinite().all() for p in again.losses["agents"].parameters())


def test_a_checkpoint_of_another_kind_of_device_still_loads(make_experiment):
    one = make_experiment(HappoConfig.get_from_yaml())
    state = one.state_dict()
    state[KEY]["generators"] = [["cuda", torch.zeros(16, dtype=torch.uint8)]]
    again = make_experiment(HappoConfig.get_from_yaml())
    again.load_state_dict(state)
    assert torch.equal(again.algorithm.generator.get_state(), one.algorithm.generator.get_state())


def test_a_checkpoint_of_another_algorithm_is_named(make_experiment):
    state = make_experiment(HappoConfig.get_from_yaml()).state_dict()
    with pytest.raises(ValueError, match="of another algorithm"):
        make_experiment(MarsConfig.get_from_yaml()).load_state_dict(state)


class _KilledError(Exception):
    """What a kill is to a process."""


@pytest.mark.parametrize("moment", ["in place", "latest"])
def test_a_whole_checkpoint_survives_a_kill_while_one_is_written(moment, make_experiment, monkeypatch):
    """BenchMARL keeps one checkpoint here, and deletes it before it writes the next: half a file is left."""
    experiment = make_experiment(
        MarsConfig.get_from_yaml(), max_n_iters=4, checkpoint_interval=40, keep_checkpoints_num=1
    )
    save, saved = torch.save, []

    def save_or_die(state, file):
        save(state, file)
        saved.append(str(file))
        if len(saved) >= 5 and ("latest" in str(file)) == (moment == "latest"):
            file.write_bytes(file.read_bytes()[:1000])
            raise _KilledError

    monkeypatch.setattr(torch, "save", save_or_die)
    with pytest.raises(_KilledError):
        experiment.run()
    monkeypatch.undo()
    folder = experiment.folder_name / "checkpoints"
    broken = folder / ("latest.pt.part" if moment == "latest" else "checkpoint_120.pt")
    with pytest.raises(RuntimeError, match="zip"):
        torch.load(broken)
    resumed = Experiment.reload_from_file(str(folder / "latest.pt"))
    assert resumed.n_iters_performed == (2 if moment == "latest" else 3)
    resumed.run()
    assert resumed.n_iters_performed == 4
    assert {file.name for file in folder.iterdir()} >= {"latest.pt", "checkpoint_160.pt"}


def test_the_report_of_a_resumed_run_has_the_evaluations_before(make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml(), max_n_iters=2, checkpoint_at_end=True, evaluation=True)
    experiment.run()
    (report,) = experiment.folder_name.glob("*.json")
    before = json.loads(report.read_text())
    state = torch.load(experiment.folder_name / "checkpoints" / "latest.pt")
    resumed = make_experiment(MarsConfig.get_from_yaml(), max_n_iters=3)
    resumed.load_state_dict(state)
    resumed.run()
    (report,) = resumed.folder_name.glob("*.json")
    ((mine,),) = (tasks.values() for tasks in json.loads(report.read_text()).values())
    ((old,),) = (tasks.values() for tasks in before.values())
    old, mine = old["mars"]["seed_0"], mine["mars"]["seed_0"]
    assert list(mine) == ["absolute_metrics", "step_1", "step_2", "step_3"]
    assert all(mine[step] == old[step] for step in ("step_1", "step_2"))
    assert mine["absolute_metrics"]["return"][0] >= old["absolute_metrics"]["return"][0]


def test_a_state_asked_for_without_checkpoints_writes_nothing(make_experiment):
    experiment = make_experiment(MarsConfig.get_from_yaml())
    experiment.state_dict()
    assert not (experiment.folder_name / "checkpoints").exists()


@other_seed
def test_slices_stay_slices_after_loading(make_experiment, tmp_path):
    one, other = make_experiment(HappoConfig.get_from_yaml()), make_experiment(HappoConfig.get_from_yaml(), seed=3)
    other.load_state_dict(one.state_dict())
    for i, agent in enumerate(other.algorithm._policies["agents"].agents):
        for leaf, stacked in zip(agent.parameters, one.policy.parameters(), strict=True):
            assert torch.equal(leaf, stacked[i])
        leaf.data += 1
        assert not torch.equal(list(other.policy.parameters())[-1][i], stacked[i])


@pytest.mark.parametrize("chosen", [{"fused": False}, {"foreach": True}, {"differentiable": True}])
def test_the_users_choice_of_an_implementation_holds(chosen, make_experiment):
    one = make_experiment(MarsConfig.get_from_yaml())
    batch = next(iter(one.collector))
    train(one, batch.clone())
    assert one.optimizers["agents"]["loss_critic"].param_groups[0]["fused"] is True
    again = make_experiment(MarsConfig.get_from_yaml(), adam_extra_kwargs=chosen)
    again.load_state_dict(one.state_dict())
    for optimizer in again.optimizers["agents"].values():
        assert not optimizer.param_groups[0]["fused"]
        assert {key: optimizer.param_groups[0][key] for key in chosen} == chosen
    if "differentiable" not in chosen:  # which needs parameters that are no leaves
        train(again, batch)
