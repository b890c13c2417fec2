"""What does not fit is refused before anything is written; what fits goes on without a row or an evaluation twice."""

import errno
import json

import numpy as np
import pytest
import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment
from benchmarl.models import MlpConfig
from cases import configured
from conftest import scalars
from torchrl.envs import TransformedEnv

from benchmarl_trust import ClipHappoConfig, GpaeConfig, HappoConfig, HatrpoConfig, MarsConfig, MaspoConfig

RUN = {"checkpoint_interval": 40, "evaluation": True, "max_n_iters": 3}


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def spread(n_agents=3):
    task = VmasTask.SIMPLE_SPREAD.get_from_yaml()
    task.config.update(max_steps=5, n_agents=n_agents)
    return task


def mlp(width=8, activation=torch.nn.Tanh):
    return MlpConfig(num_cells=[width], activation_class=activation, layer_class=torch.nn.Linear)


def report_of(experiment):
    (file,) = experiment.folder_name.glob("*.json")
    ((tasks,),) = (environments.values() for environments in [json.loads(file.read_text())])
    ((algorithms,),) = (task.values() for task in [tasks])
    ((seeds,),) = (seed.values() for seed in [algorithms])
    (report,) = seeds.values()
    return report


@pytest.fixture
def trained(make_experiment):
    """A function that trains an algorithm for three iterations and returns the experiment and a checkpoint of the
    second.
    """

    def train(config, **settings):
        experiment = make_experiment(config, **{**RUN, **settings})
        experiment.run()
        return experiment, experiment.folder_name / "checkpoints" / "checkpoint_80.pt"

    return train


#: Restored under a MARS run's name: the algorithm, what else is asked for, and what the refusal says.
ANOTHER = {
    "algorithm and seed": (MaspoConfig, {}, {"seed": 5}, r"algorithm was mars and is maspo; seed was 0 and is 5\."),
    "seed": (MarsConfig, {}, {"seed": 5}, r"another run: seed was 0 and is 5\. .* experiment\.save_folder="),
    "family": (HappoConfig, {}, {}, "algorithm was mars and is happo"),
    "stock": (MappoConfig, {}, {}, "algorithm was mars and is mappo"),
    "task": (MarsConfig, {}, {"task": VmasTask.BALANCE.get_from_yaml()}, "task was vmas/simple_spread and is vmas/bal"),
    "agents": (MarsConfig, {}, {"task": spread(4)}, r"agents was \{'agents': 3\} and is \{'agents': 4\}"),
    "network": (
        MarsConfig,
        {},
        {"model": mlp(16)},
        r"model was MlpConfig\(num_cells=\[8\].* is .*cells=\[16",
    ),
    "activation": (MarsConfig, {}, {"model": mlp(8, torch.nn.ReLU)}, "activation_class=Tanh.*activation_class=ReLU"),
    "critic": (MarsConfig, {}, {"critic": mlp(16)}, "critic_model was"),
    "sharing": (MarsConfig, {}, {"share_policy_params": True}, "share_policy_params was False and is True"),
    "shared critic": (MarsConfig, {"share_param_critic": False}, {}, "share_param_critic was .*True.* and is .*False"),
    "values": (MarsConfig, {"normalize_value": "running"}, {}, "normalize_value was .*'none'.* and is .*'running'"),
    "estimator": (MarsConfig, {"estimator": "gpae"}, {}, "estimator=gpae was .*False.* and is .*True"),
    "actions": (MarsConfig, {}, {"prefer_continuous_actions": False}, "continuous_actions was True and is False"),
    "key": (MarsConfig, {"epsilon": 7}, {}, r"algorithm\.epsilon"),
}


@pytest.mark.parametrize("name", ANOTHER)
def test_another_runs_checkpoint_is_refused_before_anything_is_written(name, trained, make_experiment):
    config, keys, settings, message = ANOTHER[name]
    experiment, file = trained(MarsConfig.get_from_yaml())
    before = content(experiment.folder_name)
    with pytest.raises(ValueError, match=message) as error:
        make_experiment(configured(config, **keys), restore_file=str(file), **settings)
    assert name == "key" or f"experiment.restore_file={file}" in str(error.value)
    assert content(experiment.folder_name) == before


def test_what_only_the_set_up_knows_is_refused_before_anything_is_written(trained, make_experiment):
    """An order is compared with the team's size, kept batches with the environments, parameters with the networks."""
    experiment, file = trained(HappoConfig.get_from_yaml())
    before = content(experiment.folder_name)
    with pytest.raises(ValueError, match=r"algorithm\.order=\[0, 1\]"):
        make_experiment(configured(HappoConfig, order=[0, 1]), restore_file=str(file))
    task = spread()
    task.config["obs_agents"] = False  # fewer observations, the same agents
    with pytest.raises(ValueError, match="parameters do not fit group agents") as error:
        make_experiment(HappoConfig.get_from_yaml(), restore_file=str(file), task=task)
    assert "mlp.params.0.weight was [3, 8, 14] and is [3, 8, 10]" in str(error.value)
    assert content(experiment.folder_name) == before

    experiment, file = trained(configured(GpaeConfig, n_rollouts=2), restore_file=None)
    before = content(experiment.folder_name)
    with pytest.raises(ValueError, match="of 4 environments and 10 steps"):
        make_experiment(configured(GpaeConfig, n_rollouts=2), restore_file=str(file), on_policy_n_envs_per_worker=8)
    with pytest.raises(ValueError, match=r"algorithm\.n_rollouts=3"):
        make_experiment(configured(GpaeConfig, n_rollouts=3), restore_file=str(file), on_policy_n_envs_per_worker=4)
    assert content(experiment.folder_name) == before


def test_a_warm_start_in_a_folder_of_its_own(trained, make_experiment, tmp_path):
    experiment, file = trained(HappoConfig.get_from_yaml())
    before = content(experiment.folder_name)
    (tmp_path / "own").mkdir()
    own = {"restore_file": str(file), "save_folder": str(tmp_path / "own"), "max_n_iters": 4}
    with pytest.warns(UserWarning, match=r"\(algorithm was happo and is cliphappo\).* 80 so far; its report"):
        other = make_experiment(ClipHappoConfig.get_from_yaml(), **own)
    for name, parameter in other.losses["agents"].named_parameters():
        assert torch.equal(parameter, torch.load(file)["loss_agents"][name])
    other.run()
    assert list(report_of(other)) == ["absolute_metrics", "step_3", "step_4"]
    assert content(experiment.folder_name) == before
    once = content(other.folder_name)
    with pytest.raises(ValueError, match=r"experiment\.save_folder=.*there is a run already.*restore its own"):
        make_experiment(ClipHappoConfig.get_from_yaml(), **own, seed=1)
    assert content(other.folder_name) == once
    (tmp_path / "another").mkdir()
    with pytest.raises(ValueError, match=r"of another algorithm.*\['loss_critic'\]"):
        make_experiment(HatrpoConfig.get_from_yaml(), **{**own, "save_folder": str(tmp_path / "another")})


def test_a_checkpoint_of_a_stock_algorithm_is_known_by_its_report(trained, make_experiment, tmp_path):
    experiment, file = trained(MappoConfig.get_from_yaml())
    before = content(experiment.folder_name)
    with pytest.raises(ValueError, match="task was vmas/simple_spread and is vmas/balance"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file), task=VmasTask.BALANCE.get_from_yaml())
    with pytest.raises(ValueError, match="algorithm was mappo and is mars"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file))
    assert content(experiment.folder_name) == before
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError, match=r"1 of \d+ differ in shape: clip_epsilon"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file), save_folder=str(tmp_path / "own"))
    assert content(experiment.folder_name) == before


def test_an_ensemble_is_known_by_its_algorithms(trained, make_experiment):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    task.config.update(max_steps=5)
    mars, mappo = MarsConfig.get_from_yaml(), MappoConfig.get_from_yaml()
    experiment, file = trained(EnsembleAlgorithmConfig({"adversary": mars, "agent": mappo}), task=task)
    before = content(experiment.folder_name)
    with pytest.raises(ValueError, match=r"algorithms was \{'adversary': 'mars', 'agent': 'mappo'\} and is "):
        make_experiment(EnsembleAlgorithmConfig({"adversary": mappo, "agent": mars}), task=task, restore_file=str(file))
    assert content(experiment.folder_name) == before
    same = EnsembleAlgorithmConfig({"adversary": mars, "agent": mappo})
    assert make_experiment(same, task=task, restore_file=str(file)).n_iters_performed == 2


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


BROKEN = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:2000]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("not a checkpoint"),
    "its end": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "a bit": lambda file: flip(file, len(file.read_bytes()) // 2),
    "its beginning": lambda file: flip(file, 70),
    "of something else": lambda file: torch.save({"weights": torch.zeros(2)}, file),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_refused_by_name(name, trained, make_experiment):
    experiment, file = trained(MarsConfig.get_from_yaml())
    BROKEN[name](file)
    before, latest = content(experiment.folder_name), file.parent / "latest.pt"
    what = "there is no such file" if name == "missing" else "corrupt"
    with pytest.raises(ValueError, match=what) as error:
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file))
    assert f"experiment.restore_file={file}" in str(error.value)
    assert str(error.value).endswith(f"Use {latest}.")
    latest.unlink()
    before.pop("checkpoints/latest.pt")
    with pytest.raises(ValueError, match=r"Use .*checkpoint_120\.pt\.$"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file))
    for other in file.parent.glob("*.pt"):
        if other != file:
            before.pop(f"checkpoints/{other.name}")
            other.unlink()
    with pytest.raises(ValueError, match="no whole checkpoint beside it: start the run anew"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file))
    assert content(experiment.folder_name) == before


def test_tensors_of_a_gpu_need_one(trained, make_experiment, monkeypatch):
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
    experiment, file = trained(MarsConfig.get_from_yaml())
    monkeypatch.undo()
    before = content(experiment.folder_name)
    with pytest.raises(ValueError, match=r"on cuda:0, which is not there.* experiment\.restore_map_location=cpu"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file))
    for elsewhere in ("cuda", "cuda:7", "somewhere"):
        with pytest.raises(ValueError, match=rf"experiment\.restore_map_location={elsewhere}"):
            make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file), restore_map_location=elsewhere)
    assert content(experiment.folder_name) == before
    again = make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file), restore_map_location="cpu")
    assert again.n_iters_performed == 2


def test_another_size_of_the_batch_is_refused(trained, make_experiment):
    experiment, file = trained(MarsConfig.get_from_yaml())
    before = content(experiment.folder_name)
    for frames in (20, 80):
        settings = {"on_policy_collected_frames_per_batch": frames, "evaluation_interval": frames}
        with pytest.raises(ValueError, match=rf"frames_per_batch={frames}: .* saved with 40.* Resume with 40"):
            make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file), checkpoint_interval=0, **settings)
    assert content(experiment.folder_name) == before


def test_a_path_that_is_not_there(make_experiment):
    with pytest.raises(ValueError, match=r"experiment\.restore_file=no/such/file\.pt: there is no folder no/such\.$"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file="no/such/file.pt")


def test_a_collectors_state_that_is_not_there(trained, make_experiment):
    experiment, file = trained(MarsConfig.get_from_yaml(), collect_with_grad=True)
    before = content(experiment.folder_name)
    with pytest.raises(ValueError, match=r"experiment\.collect_with_grad=True"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file), collect_with_grad=False)
    assert content(experiment.folder_name) == before


def test_the_environment_of_a_refused_restore_is_closed(trained, make_experiment, monkeypatch):
    _, file = trained(HappoConfig.get_from_yaml())
    closed, close = [], TransformedEnv.close
    monkeypatch.setattr(TransformedEnv, "close", lambda env, *args, **kw: closed.append(env) or close(env, *args, **kw))
    with pytest.raises(ValueError, match=r"algorithm\.order"):
        make_experiment(configured(HappoConfig, order=[0, 1]), restore_file=str(file))
    assert len(closed) == 1


def test_a_rate_of_numpys_can_be_read_back(trained, make_experiment):
    _, file = trained(MarsConfig.get_from_yaml(), lr=np.float64(1e-3))
    assert make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file)).n_iters_performed == 2


def test_a_full_disk_loses_nothing(make_experiment, monkeypatch):
    experiment = make_experiment(MarsConfig.get_from_yaml(), **RUN)
    save, latest = torch.save, experiment.folder_name / "checkpoints" / "latest.pt"

    def until_the_disk_is_full(state, file):
        if experiment.n_iters_performed < 2:
            return save(state, file)
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", until_the_disk_is_full)
    with pytest.raises(OSError, match=r"cannot be saved in .*No space left on device.* MB are free") as error:
        experiment.run()
    assert f"python -m benchmarl.resume {latest}" in str(error.value)
    monkeypatch.undo()
    assert {file.name for file in latest.parent.iterdir()} == {"latest.pt", "checkpoint_40.pt"}
    resumed = Experiment.reload_from_file(str(latest))
    resumed.run()
    assert resumed.n_iters_performed == 3


@pytest.mark.parametrize("config", [MarsConfig, HappoConfig], ids=["mars", "happo"])
def test_resumed_from_an_older_checkpoint_nothing_is_there_twice(config, trained, make_experiment):
    """Two iterations came after the checkpoint; they are done again, and two more."""
    experiment, file = trained(config.get_from_yaml(), max_n_iters=4)
    discarded = scalars(experiment)
    assert all(len(row) == 4 for row in discarded.values())
    resumed = make_experiment(config.get_from_yaml(), restore_file=str(file), max_n_iters=6)
    assert resumed.folder_name == experiment.folder_name
    resumed.run()
    for name, row in scalars(resumed).items():
        assert len(row) == 6, name
        assert row[:2] == discarded[name][:2]
    report = report_of(resumed)
    steps = [f"step_{i + 1}" for i in range(6)]
    assert list(report) == ["absolute_metrics", *steps]
    assert report["absolute_metrics"]["return"] == [max(max(report[step]["return"]) for step in steps)]
    assert [report[step]["step_count"] for step in steps] == [40, 80, 120, 160, 200, 240]


class Notes(Callback):
    """Logs by steps of its own: frames, and halves."""

    def on_batch_collected(self, batch):
        log = self.experiment.logger.loggers[0].log_scalar
        log("by_frames", 1.0, step=self.experiment.total_frames)
        log("halves", 1.0, step=self.experiment.n_iters_performed + 0.5)
        log("in/a/folder", 1.0, step=self.experiment.n_iters_performed)
        if self.experiment.n_iters_performed > 2:
            log("late", 1.0, step=0)


def test_rows_of_a_user_are_neither_lost_nor_there_twice(trained, make_experiment):
    experiment, file = trained(MarsConfig.get_from_yaml(), callbacks=[Notes()], max_n_iters=4)
    make_experiment(MarsConfig.get_from_yaml(), callbacks=[Notes()], restore_file=str(file), max_n_iters=5).run()
    folder = experiment.folder_name / experiment.name / "scalars"
    rows = {
        name: [float(row.split(",")[0]) for row in (folder / f"{name}.csv").read_text().splitlines()]
        for name in ("by_frames", "halves", "in/a/folder", "late")
    }
    assert rows["by_frames"] == [40, 80, 120, 160, 200]
    assert rows["halves"] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert rows["in/a/folder"] == [0, 1, 2, 3, 4]
    assert rows["late"] == [0, 0]  # one for each of two iterations


def test_a_run_that_was_made_longer_says_that_it_is_longer(trained, make_experiment):
    _, file = trained(MarsConfig.get_from_yaml())
    with pytest.warns(UserWarning, match="has 80 frames and this run is to have 40 .* nothing left to train"):
        make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file), max_n_iters=1)


def test_evaluating_an_older_checkpoint_takes_nothing_from_the_run(trained, make_experiment):
    experiment, file = trained(MarsConfig.get_from_yaml())
    rows, report = scalars(experiment), report_of(experiment)
    again = make_experiment(MarsConfig.get_from_yaml(), restore_file=str(file))
    again.evaluate()
    after = report_of(again)
    assert {step: after[step] for step in ("step_1", "step_3")} == {step: report[step] for step in ("step_1", "step_3")}
    assert all(scalars(again)[name][: len(row)] == row for name, row in rows.items())


def test_a_finished_run_has_nothing_left_to_do(trained, make_experiment):
    experiment, _ = trained(MarsConfig.get_from_yaml())
    rows, latest = scalars(experiment), experiment.folder_name / "checkpoints" / "latest.pt"
    resumed = make_experiment(MarsConfig.get_from_yaml(), restore_file=str(latest))
    resumed.run()
    assert resumed.n_iters_performed == 3
    assert scalars(resumed) == rows


def test_resuming_with_other_settings(trained, make_experiment):
    """Longer, with another radius and rate: the same algorithm, task and seed."""
    _, file = trained(MarsConfig.get_from_yaml())
    settings = {"lr": 5e-5, "max_n_iters": 4, "on_policy_n_minibatch_iters": 1}
    resumed = make_experiment(configured(MarsConfig, epsilon=0.3), restore_file=str(file), **settings)
    resumed.run()
    assert resumed.algorithm.epsilon == (0.3, 0.3)
    assert resumed.optimizers["agents"]["loss_objective"].param_groups[0]["lr"] == 5e-5
    assert list(report_of(resumed)) == ["absolute_metrics", "step_1", "step_2", "step_3", "step_4"]
