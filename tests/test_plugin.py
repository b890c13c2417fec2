"""The routes a user takes, in processes of their own, with BenchMARL unmodified.

They use nothing of this repository but the installed package, so they also test a wheel.
"""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

TINY = [
    "task=vmas/balance",
    "experiment.loggers=[csv]",
    "experiment.render=False",
    "experiment.max_n_iters=1",
    "experiment.max_n_frames=null",
    "experiment.on_policy_collected_frames_per_batch=40",
    "experiment.on_policy_n_envs_per_worker=4",
    "experiment.on_policy_n_minibatch_iters=1",
    "experiment.on_policy_minibatch_size=20",
    "experiment.evaluation_interval=40",
    "experiment.evaluation_episodes=2",
    "task.max_steps=5",
]


OURS = ("mars", "maspo", "happo", "cliphappo", "hatrpo", "cliphatrpo", "hatrpow", "hatrpog", "gpae")


def python(*arguments, cwd) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


def benchmarl(*overrides, cwd) -> str:
    return python("-m", "benchmarl.run", *overrides, cwd=cwd)


def results(folder: Path) -> list[dict]:
    """The json reports below a folder, as {task: {algorithm: {seed: ...}}}."""
    files = [file for file in folder.rglob("*.json") if ".hydra" not in str(file)]
    return [json.loads(file.read_text())["vmas"] for file in files]


@pytest.mark.slow
def test_kill_a_run_with_overrides_then_evaluate_and_resume(tmp_path):
    overrides = ["algorithm=mars", "algorithm.epsilon=0.1", "algorithm.surrogate=log", *TINY]
    overrides += ["experiment.checkpoint_interval=40", "experiment.keep_checkpoints_num=1"]
    overrides += ["experiment.max_n_iters=100000"]
    with (tmp_path / "out.txt").open("w") as out:
        command = [sys.executable, "-m", "benchmarl.run", *overrides]
        run = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
        wait_for(lambda: len([*tmp_path.rglob("latest.pt"), *tmp_path.rglob("checkpoint_*.pt")]) > 1, run)
        run.kill()  # SIGKILL: nothing is tidied up
        run.wait()
    output = (tmp_path / "out.txt").read_text()
    assert "Algorithm: mars, Task: vmas/balance" in output
    assert "epsilon: 0.1" in output
    (checkpoint,) = tmp_path.rglob("latest.pt")
    state = torch.load(checkpoint)
    done, report_before = state["state"]["n_iters_performed"], state["benchmarl_trust"]["report"]
    assert done > 0
    assert len(report_before) > 1

    assert "Evaluation results logged" in python("-m", "benchmarl.evaluate", str(checkpoint), cwd=tmp_path)

    # Two iterations more: BenchMARL resumes with the run's own record of its settings.
    (hydra,) = tmp_path.rglob(".hydra")
    text = (hydra / "config.yaml").read_text()
    (hydra / "config.yaml").write_text(text.replace("max_n_iters: 100000", f"max_n_iters: {done + 2}"))
    output = python("-m", "benchmarl.resume", str(checkpoint), cwd=tmp_path)
    assert "Reloaded experiment" in output
    assert "epsilon: 0.1" in output
    (losses,) = tmp_path.rglob("train_agents_loss_objective.csv")
    iterations = [int(line.split(",")[0]) for line in losses.read_text().splitlines()]
    assert iterations[-2:] == [done, done + 1]
    (report,) = results(tmp_path)
    report = report["balance"]["mars"]["seed_0"]
    assert all(report[step] == value for step, value in report_before.items() if step.startswith("step_"))
    assert len(report) >= len(report_before) + 2


def wait_for(condition, run) -> None:
    """Until it holds; fails if the process ends before or it takes too long."""
    start = time.monotonic()
    while not condition():
        assert run.poll() is None, "the run has ended"
        assert time.monotonic() - start < 240
        time.sleep(0.1)


@pytest.mark.slow
def test_multirun_with_benchmarls_own(tmp_path):
    benchmarl("-m", "algorithm=mappo,mars", "seed=0,1", *TINY, cwd=tmp_path)
    reports = results(tmp_path)
    names = sorted((name, seed) for r in reports for name, seeds in r["balance"].items() for seed in seeds)
    assert names == [(name, f"seed_{i}") for name in ("mappo", "mars") for i in (0, 1)]


@pytest.mark.slow
def test_sequential_algorithm_with_lists_on_the_command_line(tmp_path):
    options = ["algorithm.order=[3,1,0,2]", "algorithm.teams=[[agents]]", "algorithm.actor_epochs=2"]
    benchmarl("algorithm=cliphappo", *options, "experiment.share_policy_params=False", *TINY, cwd=tmp_path)
    files = list(tmp_path.rglob("train_agents_policy_order_position_*.csv"))
    orders = {file.stem[-1]: float(file.read_text().split(",")[1]) for file in files}
    assert orders == {"0": 3, "1": 1, "2": 0, "3": 2}


#: On the command line some are refused by the schema, which speaks of the same key.
BAD = {
    "algorithm.critic_coef": "0",
    "algorithm.lmbda": "nan",
    "algorithm.entropy_coef": "-0.1",
    "algorithm.loss_critic_type": "l3",
    "algorithm.order": "[0.0,1.0,2.0]",
    "algorithm.teams": "[[]]",
    "algorithm.actor_epochs": "1.5",
    "algorithm.actor_minibatch_size": "100.0",
    "algorithm.n_rollouts": "100000000",
    "algorithm.eta": "null",
    "algorithm.use_tanh_normal": "maybe",
    "experiment.gamma": "1.5",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What BenchMARL's command line says to command lines that train nothing, from one process."""
    commands = {
        # First, since the others load the plugin. BenchMARL's --help needs an algorithm and a task, whatever they are.
        "help": ["--help", "algorithm=mappo", "task=vmas/balance"],
        "no choice": ["task=vmas/balance"],
        "unknown key": ["algorithm=mars", "algorithm.epsilom=0.1", *TINY],
        "mappo's key": ["algorithm=mars", "algorithm.clip_epsilon=0.1", *TINY],
        "bad value": ["algorithm=mars", "algorithm.epsilon=0.7", *TINY],
        **{key: ["algorithm=happo", f"{key}={value}", *TINY] for key, value in BAD.items()},
        "no such logger": ["algorithm=mars", *TINY, "experiment.loggers=[csv,paper]"],
    }
    script = f"""
        import contextlib, io, json, runpy, sys
        from hydra.core.global_hydra import GlobalHydra
        answers = dict()
        for name, arguments in {commands}.items():
            sys.argv, out, code = ["run.py", *arguments], io.StringIO(), 0
            GlobalHydra.instance().clear()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    runpy.run_module("benchmarl.run", run_name="__main__")
                except SystemExit as end:
                    code = end.code
            answers[name] = [code or 0, out.getvalue()]
        print("ANSWERS", json.dumps(answers))
    """
    output = python("-c", textwrap.dedent(script), cwd=tmp_path_factory.mktemp("answers"))
    return json.loads(output.split("ANSWERS ")[1].splitlines()[0])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("unknown key", "epsilom"),
        ("mappo's key", "clip_epsilon"),
        ("bad value", "algorithm.epsilon=0.7: the reciprocal surrogate needs 0 < algorithm.epsilon < 0.5"),
        ("no such logger", "experiment.loggers=['csv', 'paper']: paper is unknown"),
        *((key, key) for key in BAD),
    ],
)
def test_what_is_wrong_is_refused_by_name(command, message, answers):
    code, output = answers[command]
    assert code == 1
    assert message in output


def test_what_the_rules_refuse_has_a_cure(answers):
    for key in ("algorithm.critic_coef", "algorithm.lmbda", "algorithm.order", "algorithm.teams", "experiment.gamma"):
        assert f"ValueError: {key}=" in answers[key][1]
        assert "The usual value is" in answers[key][1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm"])
def test_a_launcher_that_is_not_installed_names_its_extra(launcher, tmp_path):
    script = """
        import importlib.util, pkgutil, runpy, sys
        find, walk = importlib.util.find_spec, pkgutil.walk_packages
        importlib.util.find_spec = lambda name, *args: None if "_launcher" in name else find(name, *args)
        pkgutil.walk_packages = lambda *args, **kwargs: (m for m in walk(*args, **kwargs) if "_launcher" not in m.name)
        runpy.run_module("benchmarl.run", run_name="__main__", alter_sys=True)
    """
    (tmp_path / "hidden.py").write_text(textwrap.dedent(script))
    command = ["hidden.py", "-m", f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=2", "algorithm=mars", *TINY]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert f'hydra/launcher={launcher} is not installed: pip install "benchmarl_trust[sweep]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hidden.py"]


def test_help_lists_our_algorithms(answers):
    code, output = answers["help"]
    assert code == 0
    line = next(line for line in output.splitlines() if line.startswith("algorithm:"))
    assert {"mappo", *OURS} <= set(line.removeprefix("algorithm:").replace(",", "").split())
    line = next(line for line in output.splitlines() if line.startswith("experiment:"))
    assert {"base_experiment", "vmas_laptop"} <= set(line.removeprefix("experiment:").replace(",", "").split())


def test_without_a_choice_ours_are_offered(answers):
    code, output = answers["no choice"]
    assert code == 1
    assert {"mappo", *OURS} <= set(output.split("Available options:")[1].split())


def test_script_without_hydra(tmp_path):
    script = f"""
        from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
        from benchmarl.benchmark import Benchmark
        from benchmarl.environments import VmasTask
        from benchmarl.experiment import Experiment, ExperimentConfig
        from benchmarl.models.mlp import MlpConfig
        from benchmarl_trust import MarsConfig, MaspoConfig

        config = ExperimentConfig.get_from_yaml()
        for override in {TINY[1:-1]}:
            key, value = override.removeprefix("experiment.").split("=")
            value = value.replace("null", "None").replace("[csv]", "['csv']")
            setattr(config, key, eval(value))
        config.save_folder = "."
        model = MlpConfig.get_from_yaml()

        def task(name):
            task = VmasTask[name].get_from_yaml()
            task.config["max_steps"] = 5
            return task

        Experiment(task("BALANCE"), MarsConfig.get_from_yaml(), model, 0, config).run()
        Benchmark(
            [MarsConfig.get_from_yaml(), MaspoConfig.get_from_yaml(), MappoConfig.get_from_yaml()],
            model, [task("BALANCE")], {{0}}, config,
        ).run_sequential()
        ensemble = EnsembleAlgorithmConfig(
            {{"adversary": MarsConfig.get_from_yaml(), "agent": MappoConfig.get_from_yaml()}}
        )
        Experiment(task("SIMPLE_TAG"), ensemble, model, 0, config).run()
        from hydra.core.global_hydra import GlobalHydra
        assert not GlobalHydra.instance().is_initialized()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    python("script.py", cwd=tmp_path)
    found = sorted((task, name) for r in results(tmp_path) for task, names in r.items() for name in names)
    balance = [("balance", name) for name in ("mappo", "mars", "mars", "maspo")]
    assert found == [*balance, ("simple_tag", "ensemblealgorithm")]


@pytest.fixture
def other_program(tmp_path):
    """A Hydra program of somebody else, with an algorithm group of its own."""
    (tmp_path / "conf" / "algorithm").mkdir(parents=True)
    (tmp_path / "conf" / "algorithm" / "sorting.yaml").write_text("stable: true\n")
    (tmp_path / "conf" / "config.yaml").write_text("defaults:\n  - algorithm: sorting\n")
    (tmp_path / "program.py").write_text(
        textwrap.dedent(
            """
            import sys, hydra
            from hydra.core.hydra_config import HydraConfig

            @hydra.main(version_base=None, config_path="conf", config_name="config")
            def main(cfg):
                assert cfg.algorithm.stable
                print("providers", [s.provider for s in HydraConfig.get().runtime.config_sources])
                loaded = {name.split(".")[0] for name in sys.modules}
                print("loaded", sorted(loaded & {"torch", "benchmarl", "benchmarl_trust"}))

            main()
            """
        )
    )
    return tmp_path


def test_another_hydra_program_is_not_changed(other_program):
    output = python("program.py", cwd=other_program)
    assert "loaded []" in output
    assert "benchmarl_trust" not in output.split("providers")[1].splitlines()[0]
    assert "mars" not in python("program.py", "--help", cwd=other_program)


def test_another_hydra_program_is_not_slowed(tmp_path):
    """The plugin imports nothing that Hydra has not imported already."""
    script = """
        import sys, hydra.main, hydra.core.plugins, hydra.core.config_search_path, hydra.plugins.search_path_plugin
        before = set(sys.modules)
        from hydra_plugins.benchmarl_trust_searchpath import BenchmarlTrustSearchPath
        class Path:
            def append(self, *args, **kwargs): raise AssertionError("touched")
        BenchmarlTrustSearchPath().manipulate_search_path(Path())
        print("new", sorted(set(sys.modules) - before))
    """
    output = python("-c", textwrap.dedent(script), cwd=tmp_path)
    assert "new ['hydra_plugins', 'hydra_plugins.benchmarl_trust_searchpath']" in output
