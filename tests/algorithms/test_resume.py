"""After a restore the same next batch gives, bit for bit, the same parameters as without the interruption."""

import json
import random

import numpy as np
import pytest
import torch
from benchmarl.experiment import Experiment
from cases import CASES, FAMILIES, MAIN

from benchmarl_trust import HappoConfig, MarsConfig
from benchmarl_trust.algorithms.resume import KEY

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
        fast = case.id in FAMILIES and not (case.natural and recurrent)
        name = f"{case.id}-{'shared-gru' if recurrent else 'separate-mlp'}"
        yield pytest.param(case, recurrent, id=name, marks=() if fast else pytest.mark.slow)


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


def test_slices_stay_slices_after_loading(make_experiment, tmp_path):
    one, other = make_experiment(HappoConfig.get_from_yaml()), make_experiment(HappoConfig.get_from_yaml(), seed=3)
    other.load_state_dict(one.state_dict())
    for i, agent in enumerate(other.algorithm._policies["agents"].agents):
        for leaf, stacked in zip(agent.parameters, one.policy.parameters(), strict=True):
            assert torch.equal(leaf, stacked[i])
        leaf.data += 1
        assert not torch.equal(list(other.policy.parameters())[-1][i], stacked[i])
