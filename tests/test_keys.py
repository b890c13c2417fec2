"""Every key of every configuration: what it may not be is refused by name, before anything is made or written."""

import importlib.util
import sys
from dataclasses import fields, replace
from decimal import Decimal

import pytest
import torch
import yaml
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment
from cases import configured

from benchmarl_trust import ALGORITHMS, GpaeConfig, HappoConfig, HatrpoConfig, MarsConfig
from benchmarl_trust.algorithms.keys import (
    HOST,
    Choice,
    Flag,
    Number,
    Only,
    Order,
    Radius,
    ScaleMapping,
    TeamLists,
    check_fields,
)
from benchmarl_trust.functional import SURROGATES
from benchmarl_trust.paths import conf_folder
from benchmarl_trust.runtime.before import LOGGERS, check_folder

NAN, INF = float("nan"), float("inf")
KEYS = [(name, field.name) for name in sorted(ALGORITHMS) for field in fields(ALGORITHMS[name])]
PRESETS = {name: config.get_from_yaml() for name, config in ALGORITHMS.items()}
TASK = VmasTask.SIMPLE_SPREAD.get_from_yaml()
#: Of a wrong type for any number.
NO_NUMBER = [True, False, "3", "", [1], (1,), {}, 1j, Decimal(1), torch.ones(2)]


def bad_numbers(rule):
    yield from [*NO_NUMBER, NAN, INF, -INF]
    yield from [] if rule.null else [None]
    yield from [-1, 0.0, 2.0, 1.5] if rule.whole else [-1, 10**400]
    for bound, beyond in ((rule.above, -1), (rule.least, -1), (rule.most, 1), (rule.below, 1)):
        yield from [] if bound is None else [bound + beyond]
    for bound in (rule.above, rule.below):
        yield from [] if bound is None else [bound]
    yield from [] if rule.most is None else [10**13, 1e30]


def bad_names(rule):
    yield from [True, 0, 1.5, NAN, "", "unknown", ["clip"], [], {}, b"clip", *rule.elsewhere]
    yield from [] if rule.null else [None]


BAD = {  # rule -> values that it refuses
    Number: bad_numbers,
    Radius: bad_numbers,
    Choice: bad_names,
    Flag: lambda rule: [None, 0, 1, 1.0, NAN, "True", "False", "", [], [True]],
    Only: lambda rule: [True, False, 1, -0.1, NAN, INF, "0", "full", [], [0.0], *([None] * (rule.usual is not None))],
    ScaleMapping: lambda rule: [
        *[None, True, 1.0, NAN, [], "", "softmax", "biased_softplus_", "biased_softplus_x", "biased_softplus_nan"],
        *["biased_softplus_inf", "biased_softplus_1.0_0.1_0.1"],
    ],
    Order: lambda rule: [
        *[True, 0, 2, 1.5, NAN, "", "largest", [], {}, (), (2, 0, 1), [0.0, 1.0, 2.0], [False, True, 2], [0, 1, 1]],
        *[[1, 2, 3], [-1, 0, 1], ["0", "1"], [None], [[0, 1, 2]], (0.0, 1.0), (False, True), [10**12], [NAN]],
    ],
    TeamLists: lambda rule: [
        *[True, 0, NAN, "agents", "", [[]], ["agents"], [["agents"], []], [["agents"], "agents"], [[1]], [[None]]],
        *[(), (("agents",),), [("agents",)], {"agents": ["agents"]}, [[["agents"]]]],
    ],
}


def rule_of(name, key):
    (field,) = (field for field in fields(ALGORITHMS[name]) if field.name == key)
    return field.metadata["rule"]


class _AcceptedError(Exception):
    """BenchMARL has begun to set the experiment up."""


def begin(self):
    raise _AcceptedError


@pytest.fixture
def refused(make_experiment, monkeypatch, tmp_path):
    """A function: what is said of an experiment that is refused before BenchMARL does anything."""

    monkeypatch.setattr(Experiment, "_setup", begin)

    def message(*args, **kwargs):
        try:
            make_experiment(*args, **{"task": TASK, **kwargs})
        except ValueError as error:
            assert not [*tmp_path.iterdir()]
            return str(error)
        raise AssertionError("accepted")

    return message


def test_every_key_has_a_rule_and_every_rule_bad_values():
    rules = {(name, field.name): field.metadata.get("rule") for name in PRESETS for field in fields(PRESETS[name])}
    assert [key for key, rule in rules.items() if type(rule) not in BAD] == []


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_every_key_refuses_what_it_may_not_be(name, key, refused):
    rule = rule_of(name, key)
    for value in BAD[type(rule)](rule):
        said = refused(replace(PRESETS[name], **{key: value}))
        assert said.startswith(f"algorithm.{key}="), (value, said)
        if not isinstance(rule, Only) and value not in [*getattr(rule, "elsewhere", ())]:
            assert "The usual value is" in said, (value, said)


@pytest.mark.parametrize("key", HOST)
def test_so_does_every_key_of_the_host_that_our_updates_need(key, refused):
    rule = HOST[key]
    for value in BAD[type(rule)](rule):
        said = refused(MarsConfig.get_from_yaml(), **{"evaluation": True, key: value})
        assert said.startswith(f"experiment.{key}="), (value, said)


@pytest.mark.parametrize("name", PRESETS)
def test_the_rules_take_the_values_of_the_presets(name):
    check_fields(PRESETS[name])
    for field in fields(PRESETS[name]):
        values = [getattr(preset, field.name) for preset in PRESETS.values() if hasattr(preset, field.name)]
        assert rule_of(name, field.name).usual in values, f"{field.name}: the usual value is that of a preset"


GOOD = [
    *((HappoConfig, "surrogate", name) for name in SURROGATES if name not in ("linear", "reciprocal")),
    *((HappoConfig, "order", order) for order in (None, "random", "fixed", "semi_greedy", [2, 0, 1], [0])),
    *((HappoConfig, "teams", teams) for teams in (None, [], [["agents"]], [["a", "b"], ["c"]])),
    *((HappoConfig, "scale_mapping", name) for name in ("softplus", "exp", "expln", "relu", "none")),
    *((HappoConfig, "scale_mapping", f"biased_softplus{rest}") for rest in ("", "_0.5", "_1.0_0.1")),
    *((HappoConfig, "loss_critic_type", name) for name in ("l1", "l2", "smooth_l1")),
    *((HappoConfig, key, value) for key in ("actor_epochs", "actor_minibatch_size") for value in (None, 1, 40)),
    *((HappoConfig, "normalize_value", name) for name in ("none", "running")),
    *((HappoConfig, "lmbda", value) for value in (0, 1, 0.0, 1.0)),
    *((HappoConfig, "epsilon_negative", value) for value in (None, 0.1)),
    (HatrpoConfig, "cg_iters", 1000),
    (HatrpoConfig, "entropy_coef", 0),
    (HatrpoConfig, "kl_total", 1),
    (GpaeConfig, "n_rollouts", 8),
    *((GpaeConfig, "eta", eta) for eta in (1, 1e9)),
]


@pytest.mark.parametrize(("config", "key", "value"), GOOD)
def test_what_has_a_meaning_is_taken(config, key, value, make_experiment, monkeypatch):
    monkeypatch.setattr(Experiment, "_setup", begin)
    with pytest.raises(_AcceptedError):
        make_experiment(configured(config, **{key: value}))


MISSES = [
    *((MarsConfig, "critic_coef", value, "above 0") for value in (0, 0.0, -1, NAN)),
    *((MarsConfig, "lmbda", value, "at least 0 and at most 1") for value in (NAN, 2)),
    *((HappoConfig, "entropy_coef", value, "at least 0") for value in (NAN, -0.1, INF)),
    (MarsConfig, "loss_critic_type", "l3", "l2, l1, smooth_l1"),
    *((HappoConfig, "order", order, "as a list") for order in ([0.0, 1.0, 2.0], [False, True], (2, 0, 1))),
    *((HappoConfig, "teams", teams, "[[speaker,listener]]") for teams in ([[]], ["agents"], (("agents",),))),
    *((HappoConfig, "actor_epochs", value, "a whole number") for value in (1.5, "3")),
    (HappoConfig, "actor_minibatch_size", 100.0, "a whole number"),
    (HappoConfig, "actor_minibatch_size", 10**9, "between 1 and the 40 frames"),
    *((GpaeConfig, "n_rollouts", value, "a whole number") for value in (1.5, "2")),
    (GpaeConfig, "n_rollouts", 10**12, "take at least 1,280,000 GB"),
    (GpaeConfig, "eta", None, "at least 1"),
    (HatrpoConfig, "cg_iters", 10**6, "at most 1000"),
]


@pytest.mark.parametrize(("config", "key", "value", "cure"), MISSES)
def test_what_was_once_accepted(config, key, value, cure, refused):
    said = refused(configured(config, **{key: value}))
    assert f"algorithm.{key}=" in said
    assert cure in said


def test_past_batches_that_memory_does_not_hold(refused):
    said = refused(configured(GpaeConfig, n_rollouts=10**8), on_policy_collected_frames_per_batch=6000)
    assert "algorithm.n_rollouts=100000000: as many batches of 6000 frames take at least 19,200 GB, and cpu has" in said


def test_past_batches_by_what_a_frame_of_the_task_takes(make_experiment, monkeypatch):
    """simple_spread's three agents observe 14 numbers and act with 2: 456 bytes a frame at least, 40 frames a batch."""
    monkeypatch.setattr("benchmarl_trust.algorithms.checks._memory", lambda device: 1e6)
    make_experiment(configured(GpaeConfig, n_rollouts=54))
    with pytest.raises(ValueError, match=r"algorithm\.n_rollouts=55: as many batches of 40 frames take at least"):
        make_experiment(configured(GpaeConfig, n_rollouts=55))


@pytest.mark.parametrize("key", ["on_policy_minibatch_size", "on_policy_n_minibatch_iters", "gamma"])
def test_the_hosts_keys_are_looked_at_for_ours_alone(key, refused, make_experiment):
    value = 1.5 if key == "gamma" else 0
    assert f"experiment.{key}={value} must be" in refused(HappoConfig.get_from_yaml(), **{key: value})
    with pytest.raises(_AcceptedError):
        make_experiment(MappoConfig.get_from_yaml())


def test_an_inner_configuration_of_an_ensemble_too(refused):
    ensemble = {"adversary": configured(MarsConfig, critic_coef=0.0), "agent": MappoConfig.get_from_yaml()}
    said = refused(EnsembleAlgorithmConfig(ensemble), task=VmasTask.SIMPLE_TAG.get_from_yaml())
    assert said.startswith("algorithm.critic_coef=0.0")


@pytest.fixture
def without(monkeypatch):
    """A function that hides an installed package."""
    found = importlib.util.find_spec

    def hide(package):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == package else found(name, *a))

    return hide


@pytest.mark.parametrize("algorithm", [MarsConfig, MappoConfig])
@pytest.mark.parametrize("logger", ["wandb", "tensorboard", "mlflow"])
def test_a_logger_without_its_package(logger, algorithm, refused, without):
    without(logger)
    said = refused(algorithm.get_from_yaml(), loggers=["csv", logger])
    assert "experiment.loggers=" in said
    assert "experiment.loggers=[csv]" in said
    assert f'pip install "{logger if logger == "mlflow" else f"benchmarl_trust[{logger}]"}"' in said


@pytest.mark.parametrize("loggers", [["csv", "csv"], ["paper"], ["csv", "CSV"], [None], [""], "csv", None])
def test_unknown_loggers(loggers, refused):
    assert "experiment.loggers=" in refused(MarsConfig.get_from_yaml(), loggers=loggers)


@pytest.mark.parametrize("algorithm", [MarsConfig, MappoConfig])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
@pytest.mark.parametrize("key", ["sampling_device", "train_device", "buffer_device"])
def test_a_gpu_that_is_not_there(key, device, algorithm, refused, make_experiment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if algorithm is MappoConfig and key == "buffer_device":
        with pytest.raises(_AcceptedError):  # which does not ask for it
            make_experiment(algorithm.get_from_yaml(), **{key: device})
        return
    said = refused(algorithm.get_from_yaml(), **{key: device})
    assert said.startswith(f"experiment.{key}={device}: PyTorch finds 0 CUDA devices")
    assert "experiment.sampling_device=cpu experiment.train_device=cpu experiment.buffer_device=cpu" in said


def test_the_second_gpu_where_there_is_one(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "finds 1 CUDA devices" in refused(MarsConfig.get_from_yaml(), train_device="cuda:1")


@pytest.mark.parametrize("key", ["sampling_device", "train_device", "buffer_device"])
def test_what_is_no_device(key, refused):
    assert f"experiment.{key}=gpu is no device" in refused(MarsConfig.get_from_yaml(), **{key: "gpu"})


def test_the_preset_for_a_gpu_without_one(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    preset = yaml.safe_load((conf_folder() / "experiment" / "vmas_fine_tuned.yaml").read_text())
    preset.pop("defaults")
    preset.pop("save_folder", None)
    assert "experiment.sampling_device=cpu" in refused(MarsConfig.get_from_yaml(), **preset)


def test_a_folder_that_is_not_there(refused):
    said = refused(MarsConfig.get_from_yaml(), save_folder="no/such/folder")
    assert said.startswith("experiment.save_folder=no/such/folder")
    assert "mkdir -p no/such/folder" in said
    with pytest.raises(ValueError, match=r"experiment\.save_folder=3"):
        check_folder(3)


def test_a_file_to_restore_that_is_no_path(refused):
    assert "experiment.restore_file=5 must be" in refused(MarsConfig.get_from_yaml(), restore_file=5)


@pytest.mark.parametrize(
    ("logger", "needs"), [("csv", "torchvision"), ("mlflow", "torchvision"), ("tensorboard", "moviepy")]
)
def test_pictures_that_no_logger_can_write(logger, needs, make_experiment, monkeypatch, without):
    without("moviepy")
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    monkeypatch.setitem(LOGGERS, logger, (None, None))  # as if it were installed
    settings = {"loggers": [logger], "render": True, "evaluation": True}
    with pytest.raises(ValueError, match=rf"experiment\.render=True.* {needs}") as error:
        make_experiment(MarsConfig.get_from_yaml(), **settings)
    assert "experiment.render=False" in str(error.value)
    make_experiment(MarsConfig.get_from_yaml(), **{**settings, "loggers": []})
