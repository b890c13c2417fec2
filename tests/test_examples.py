"""The examples start, and print what they are to show."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import benchmarl.hydra_config
import benchmarl.run
import numpy as np
import pytest
import torch
from benchmarl.environments import PettingZooTask
from conftest import scalars
from hydra import compose, initialize_config_module
from torchrl.envs import ParallelEnv

from benchmarl_trust import MarsConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = EXAMPLES.parent / "benchmarks"
WITH_ARGUMENTS = [script for folder in (EXAMPLES, BENCHMARKS) for script in sorted(folder.glob("*.py"))]
for name in ("_common.py", "torchrl_only.py", "torchrl_only_hatrpo.py", "parallel_collection.py"):
    WITH_ARGUMENTS.remove(EXAMPLES / name)


@pytest.fixture
def script(monkeypatch, capsys):
    """A function that runs a script in this process, which saves its imports, and returns what it prints or says."""

    def run_script(path, *arguments, fails=False):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(path.parent)  # as Python does for a script
        try:
            runpy.run_path(str(path), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        assert (code not in (0, None)) == fails
        printed = capsys.readouterr()
        return f"{printed.out}{printed.err}{code}"

    return run_script


@pytest.mark.parametrize("path", WITH_ARGUMENTS, ids=lambda path: path.stem)
def test_help(path, script):
    assert "usage:" in script(path, "--help")


def test_options_of_one_name_mean_the_same(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    helps = {path.stem: script(path, "--help") for path in WITH_ARGUMENTS}
    defaults = {}
    for option in ("--out", "--seeds", "--override"):
        pattern = re.compile(rf"^  {option} (\S.*?)\s\s+(.+?)(?: \(default: (.+)\))?$", re.MULTILINE)
        found = {name: match.groups() for name, text in helps.items() if (match := pattern.search(text))}
        assert len(found) >= 5
        assert len({(value, text) for value, text, _ in found.values()}) == 1
        defaults[option] = {name: default for name, (_, _, default) in found.items()}
    assert defaults["--out"] == {name: f"outputs/{name}" for name in defaults["--out"]}
    del defaults["--out"]["show"]  # it trains nothing
    assert all(isinstance(seed, int) for default in defaults["--seeds"].values() for seed in json.loads(default))
    assert defaults["--seeds"].keys() == defaults["--override"].keys() == defaults["--out"].keys()
    for text in helps.values():
        assert ("--out FOLDER" in text) == ("Files in the folder of --out: " in text)
        assert "--output" not in text


def test_a_run_is_composed_as_benchmarl_does(load, monkeypatch, tmp_path):
    overrides = ["algorithm=mars", "task=vmas/balance", "experiment=vmas_laptop", "algorithm.epsilon=0.1", "seed=3"]
    overrides += ["task.n_agents=2", "experiment.lr=0.002", "model.num_cells=[8]", "critic_model.num_cells=[16]"]
    stock = {}

    class Recorder:
        def __init__(self, **arguments):
            stock.update(arguments)

        def run(self):
            pass

    monkeypatch.setattr(benchmarl.hydra_config, "Experiment", Recorder)
    monkeypatch.setattr(sys, "argv", ["benchmarl.run", *overrides, f"hydra.run.dir={tmp_path}"])
    benchmarl.run.hydra_experiment()
    assert stock.pop("callbacks") == ()
    composed = load("_common").compose(*overrides)
    assert composed.keys() == stock.keys()
    task, stock_task = composed.pop("task"), stock.pop("task")
    assert (task.env_name(), task.name, task.config) == (stock_task.env_name(), stock_task.name, stock_task.config)
    assert composed == stock
    assert (composed["algorithm_config"].epsilon, composed["config"].lr, composed["seed"]) == (0.1, 0.002, 3)
    assert (task.config["n_agents"], composed["critic_model_config"].num_cells) == (2, [16])


def test_of_two_choices_the_last_counts(load):
    settings = load("_common").compose("task=vmas/balance", "algorithm=mars", "task=vmas/navigation", "algorithm=gpae")
    assert (settings["task"].name, type(settings["algorithm_config"]).__name__) == ("NAVIGATION", "GpaeConfig")


@pytest.mark.parametrize("name", ["torchrl_only", "torchrl_only_hatrpo"])
def test_torchrl_only(name, script):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 90
    (line,) = [line for line in script(EXAMPLES / f"{name}.py", 1).splitlines() if "mean of M" in line]
    factors, *kls = line.split("mean of M")[1].split("KL")
    first, *others = map(float, factors.split())
    assert first == 1
    assert all(0.9 < factor < 1.1 for factor in others)
    assert any(factor != 1 for factor in others)
    assert len(kls) == (name == "torchrl_only_hatrpo")
    for spent in kls:
        assert len(spent.split()) == 3
        assert all(0.001 < float(kl) <= 0.01 for kl in spent.split())


def test_joint_constraint(tmp_path, script):
    settings = ("--seeds", 0, 1, "--iterations", 2, "--frames", 32, "--out", tmp_path / "new" / "folder")
    output = script(EXAMPLES / "joint_constraint.py", *settings)
    rows = [line.split() for line in output.splitlines() if line.startswith("HATRPO") and "±" in line]
    assert [row[0] for row in rows] == ["HATRPO", "HATRPO-W", "HATRPO-G"]
    for row in rows:
        assert sum(map(int, row[5:8])) == 2  # seeds
        assert 0 < float(row[-1]) <= 0.0201  # KL of both agents
    assert (tmp_path / "new" / "folder" / "joint_constraint.png").stat().st_size > 10_000
    paths = (tmp_path / "new" / "folder" / "paths.csv").read_text().splitlines()
    assert paths[0] == "algorithm,seed,iteration,a1,a2"
    assert len(paths) == 1 + 3 * 2 * 3  # algorithms, seeds, the start and two iterations
    first = np.array([line.split(",")[3:] for line in paths[1:] if line.split(",")[2] == "0"], dtype=float)
    assert np.abs(first - [3.0, 1.1]).max() < 0.8  # the start, shifted by a random network
    assert "two or more" in script(EXAMPLES / "joint_constraint.py", "--seeds", 2, fails=True)


SMALL = ["collected_frames_per_batch=200", "n_envs_per_worker=20", "n_minibatch_iters=1", "minibatch_size=100"]
SMALL = [f"experiment.on_policy_{setting}" for setting in SMALL]
SMALL += ["model.num_cells=[8]", "experiment.evaluation_interval=200", "experiment.evaluation_episodes=4"]


def test_advantage_gap(tmp_path, script):
    picture = tmp_path / "advantage_gap.png"
    settings = ("--seeds", 0, "--frames", 400, "--steps", 100, "--out", tmp_path, "--override", *SMALL)
    rows = [line.split() for line in script(EXAMPLES / "advantage_gap.py", *settings).splitlines()]
    game_gpae, task_gpae = [row for row in rows if row[:1] == ["GPAE"]]
    game_mappo, task_mappo = [row for row in rows if row[:1] == ["MAPPO"]]
    assert float(game_gpae[1]) == pytest.approx(0.5, abs=0.01)  # in state 0
    assert float(game_gpae[4]) == pytest.approx(1.5, abs=0.01)  # in state 1
    assert [float(game_mappo[k]) for k in (1, 4)] == [0, 0]
    assert [float(task_mappo[k]) for k in (1, 4, 7, 10)] == [0, 0, 0.25, 0.25]
    assert float(task_gpae[1]) != 0
    assert picture.stat().st_size > 10_000


def test_truncation(tmp_path, script):
    picture = tmp_path / "truncation.png"
    settings = ("--task", "simple_spread", "--seeds", 0, "--frames", 400, "--rollouts", 2)
    settings += ("--etas", 1.0, "--truncations", "dt", "none")
    output = script(EXAMPLES / "truncation.py", *settings, "--out", tmp_path, "--override", *SMALL)
    traces = {
        line.split()[0]: float(line.split()[-1]) for line in output.splitlines() if line.startswith(("dt", "none"))
    }
    assert traces["none"] == 0.95  # λ: nothing is truncated
    assert traces["dt,"] < 0.95
    assert picture.stat().st_size > 10_000


SHORT = [*SMALL, "critic_model.num_cells=[8]", "task.max_steps=10"]


def test_barrier(tmp_path, script):
    out = tmp_path / "barrier"
    output = script(EXAMPLES / "barrier.py", "--seeds", 0, "--frames", 200, "--out", out, "--override", *SHORT)
    arms = [line.split(",")[0] for line in (out / "barrier.csv").read_text().splitlines()]
    assert arms == ["arm", "mars", "mars-log", "maspo", "maspo-at-mars"]
    assert all(f"\n{arm} " in output for arm in arms[1:])
    assert all(len(list((out / arm).rglob("*.json"))) == 1 for arm in arms[1:])
    assert (out / "barrier.png").stat().st_size > 10_000
    settings = ("--frames", 300, "--out", tmp_path / "refused", "--override", *SHORT)
    assert "no multiple of the evaluation interval" in script(EXAMPLES / "barrier.py", *settings, fails=True)
    assert not (tmp_path / "refused").exists()


def test_advantage_variance(tmp_path, script):
    out = tmp_path / "variance"
    settings = ("--seeds", 0, "--agents", 3, "--iterations", 1, "--epochs", 1, "--out", out, "--override", *SHORT)
    script(EXAMPLES / "advantage_variance.py", *settings)
    rows = [line.split(",") for line in (out / "advantage_variance.csv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["n_agents", "algorithm"], ["3", "HAPPO"], ["3", "clip-HAPPO"]]
    (seed,) = (out / "seeds.csv").read_text().splitlines()[1:2]
    assert seed.split(",")[:3] == ["3", "HAPPO", "0"]
    assert float(seed.split(",")[3]) == pytest.approx(float(rows[1][2]), rel=1e-3)
    assert (out / "advantage_variance.png").stat().st_size > 10_000
    settings = ("--task", "give_way", "--out", out)
    assert "has no n_agents" in script(EXAMPLES / "advantage_variance.py", *settings, fails=True)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that imports an example, in a folder for what it writes: it writes where it is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_ensemble(load):
    experiment = load("ensemble").make_experiment(1, frames=300)
    experiment.run()
    assert [type(loss).__name__ for loss in experiment.losses.values()] == ["CriticPhaseLoss", "ClipPPOLoss"]
    logged = scalars(experiment)
    assert logged["train_adversary_policy_kl"][0] > 0
    assert logged["train_agent_kl_approx"][0] != 0


def test_custom_task(load):
    experiment = load("custom_task").make_experiment(1, frames=300)
    experiment.run()
    assert experiment.task_name == "meeting"
    batch = experiment.test_env.rollout(3)
    middle = batch["robot", "observation"][..., :2].mean(-2, keepdim=True)
    torch.testing.assert_close(batch["robot", "observation"][..., 4:], middle - batch["robot", "observation"][..., :2])
    reward = batch["next", "robot", "reward"]
    assert (reward == reward[..., :1, :]).all()
    assert (reward < 0).all()
    assert 0 < scalars(experiment)["train_robot_policy_kl"][0] <= 0.01 * (1 + 1e-5)


def test_custom_callback(load):
    experiment = load("custom_callback").make_experiment(2, frames=3000)
    batches = []
    look = experiment.callbacks[0].on_batch_collected

    def remember(batch):
        batches.append(batch.clone())
        look(batch)

    experiment.callbacks[0].on_batch_collected = remember
    experiment.run()
    shares = []
    for batch in batches:
        ground, done = batch["next", "agents", "info", "ground_rew"], batch["next", "terminated"]
        ends = [ground[i, t, 0].item() for i, t, _ in done.nonzero().tolist()]
        shares.append(sum(value < 0 for value in ends) / len(ends))
    assert scalars(experiment)["collection_fallen"] == pytest.approx(shares)


TINY = ["experiment=vmas_laptop", "experiment.max_n_frames=200", *SMALL, "critic_model.num_cells=[8]"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A lambda function was passed to ParallelEnv")
def test_parallel_collection(tmp_path, script, monkeypatch):
    pytest.importorskip("pettingzoo")
    settings = [*TINY, "task=pettingzoo/simple_speaker_listener", "task.max_cycles=5", "algorithm=happo"]
    settings += ["experiment.parallel_collection=True", "experiment.on_policy_n_envs_per_worker=2"]
    settings += ["experiment.evaluation=False", "experiment.create_json=False", f"hydra.run.dir={tmp_path}"]
    seeds, set_seed = [], ParallelEnv.set_seed

    def watched(env, seed, **kwargs):
        seeds.append(seed)
        return set_seed(env, seed, **kwargs)

    monkeypatch.setattr(ParallelEnv, "set_seed", watched)
    script(EXAMPLES / "parallel_collection.py", *settings)
    assert seeds == [0]
    (kl,) = tmp_path.rglob("train_speaker_policy_kl.csv")
    assert float(kl.read_text().split(",")[1]) > 0


@pytest.mark.parametrize("own", [False, True])
def test_copies_with_a_seed_of_their_own_start_differently(own, load, make_experiment):
    pytest.importorskip("pettingzoo")
    callbacks = [load("parallel_collection").OwnSeeds()] if own else []
    task = PettingZooTask.SIMPLE_SPREAD.get_from_yaml()
    experiment = make_experiment(MarsConfig.get_from_yaml(), task=task, callbacks=callbacks)
    first = next(iter(experiment.collector))["agent", "observation"][:, 0]
    assert len(first.unique(dim=0)) == (len(first) if own else 1)  # without, BenchMARL starts all copies alike


def sweep(*arguments, **environment):
    command = ["bash", str(EXAMPLES / "sweep.sh"), *arguments]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_sweep_without_its_extra_names_the_cure(tmp_path):
    missing = tmp_path / "hydra_plugins" / "hydra_joblib_launcher.py"
    missing.parent.mkdir()
    missing.write_text("raise ImportError")
    done = sweep(str(tmp_path / "sweep"), PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'Hydra\'s joblib launcher is missing: pip install "benchmarl_trust[sweep]"\n'
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_sweep(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = sweep(str(tmp_path / "sweep"), "algorithm=mappo,happo", "seed=3", *TINY[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| vmas/balance")]
    assert [[cell.strip() for cell in row[2:5]] for row in rows] == [["happo", "1", "200"], ["mappo", "1", "200"]]
    assert (tmp_path / "sweep" / "learning_curves.png").stat().st_size > 10_000
    assert "name a new folder" in sweep(str(tmp_path / "sweep")).stderr
    assert "The first argument is a folder" in sweep("algorithm=mappo").stderr


def test_a_cluster_is_composed():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_module("benchmarl.conf", version_base=None):
        overrides = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=240"]
        overrides += ["hydra.launcher.gpus_per_node=1"]
        choices = ["algorithm=happo", "task=vmas/navigation", "experiment=vmas_fine_tuned"]
        cfg = compose("config", overrides=[*choices, *overrides], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith("SlurmLauncher")
    launcher = cfg.hydra.launcher
    assert (launcher.partition, launcher.timeout_min, launcher.gpus_per_node) == ("gpu", 240, 1)
    assert cfg.algorithm.epsilon == 0.2


def test_equal_epsilon(script):
    """The KL of the best shift against a naive search; MASPO's and MARS's are far below the clip's."""
    path = BENCHMARKS / "equal_epsilon.py"
    output = script(path, "--correlations", 0.3, "--points", 201)
    kl = {name: float(value) for name, value in re.findall(r"(clip|quadratic|reciprocal) (0\.\d+)", output)}
    a, n = torch.randn(2, 2_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantage, shifts = 0.3 * a + 0.91**0.5 * n, torch.linspace(0.01, 0.15, 29, dtype=torch.float64)
    gains = [
        (r * advantage - advantage.abs() / 0.4 * (r - 1).square()).mean()
        for r in ((d * a - d * d / 2).exp() for d in shifts)
    ]
    best = shifts[int(torch.stack(gains).argmax())]
    assert kl["quadratic"] == pytest.approx(float(best) ** 2 / 2, rel=0.15)  # neighbours of the grid are 14 % apart
    assert kl["reciprocal"] == pytest.approx(kl["quadratic"], rel=0.05)
    assert kl["clip"] > 5 * kl["quadratic"]
    assert "ε of reciprocal for the clip's KL: none" in output
