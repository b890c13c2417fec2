"""Yaml values, dataclass fields and MAPPO's conventions agree; bad values are refused by name."""

from dataclasses import MISSING, fields

import pytest
import yaml
from benchmarl.algorithms import MappoConfig, algorithm_config_registry
from benchmarl.experiment import ExperimentConfig
from benchmarl.hydra_config import load_algorithm_config_from_hydra, load_experiment_config_from_hydra
from cases import CASES
from hydra import compose, initialize_config_module

from benchmarl_trust import ALGORITHMS, MarsConfig, MaspoConfig, experiment_config, register
from benchmarl_trust.algorithms.sequential_gradient import SequentialGradientConfig
from benchmarl_trust.algorithms.sequential_natural import SequentialNaturalConfig
from benchmarl_trust.paths import conf_folder

names = pytest.mark.parametrize("name", sorted(ALGORITHMS))


@names
def test_yaml_and_dataclass_have_the_same_keys(name):
    text = yaml.safe_load((conf_folder() / "algorithm" / f"{name}.yaml").read_text())
    assert text.pop("defaults") == [f"{name}_config", "_self_"]
    assert set(text) == {field.name for field in fields(ALGORITHMS[name])}
    assert all(field.default in ("???", MISSING) for field in fields(ALGORITHMS[name])), "values live in the yaml only"


@names
def test_mappo_keys_and_defaults_are_kept(name):
    ours, mappo = ALGORITHMS[name].get_from_yaml(), MappoConfig.get_from_yaml()
    other = {"gpae": {"lmbda": 0.95}, "a2po": {"share_param_critic": False}}.get(name, {})  # their authors'
    for field in fields(MappoConfig):
        key = field.name
        if key == "clip_epsilon":
            if hasattr(ours, "kl_threshold"):
                continue  # its trust region is a bound on the KL
            key = "epsilon"
        assert getattr(ours, key) == other.get(key, getattr(mappo, field.name))


#: What makes a preset, and what its authors set otherwise: the values that are not the other presets'.
OWN = {
    "maspo": {"surrogate": "quadratic"},
    "mars": {"surrogate": "reciprocal"},
    "gpae": {"estimator": "gpae", "normalize_advantage": "batch", "lmbda": 0.95},
    "cliphappo": {"factor": "capped"},
    "a2po": {"factor": "inside_clip", "estimator": "preopc", "epsilon_by_position": True, "order": "semi_greedy"},
    "cliphatrpo": {"factor": "capped"},
    "hatrpow": {"allocation": "kkt"},
    "hatrpog": {"allocation": "greedy"},
}
OWN["a2po"] |= {"normalize_advantage": "batch", "share_param_critic": False}
#: Families whose value and words for a key are their own: natural steps have one gain, who moves at once no factor.
OWN_OF_FAMILY = {"surrogate": "natural", "factor": "simultaneous"}
HEADS = ("share_param_critic", "entropy_coef")  # below a line about all keys that follow


def family(name):
    kinds = {"natural": SequentialNaturalConfig, "gradient": SequentialGradientConfig}
    found = [kind for kind, config in kinds.items() if issubclass(ALGORITHMS[name], config)]
    return found[0] if found else "simultaneous"


def words_of_keys(name):
    """key -> the comment lines right above it."""
    words, above = {}, []
    for line in (conf_folder() / "algorithm" / f"{name}.yaml").read_text().splitlines():
        if line.startswith("#"):
            above.append(line)
            continue
        if ":" in line and not line.startswith(" "):
            words[line.split(":")[0]] = above
        above = []
    return words


def test_shared_keys_have_the_same_values_and_words_everywhere():
    values, words = {}, {}
    for name, config in ALGORITHMS.items():
        for key, value in vars(config.get_from_yaml()).items():
            group = family(name) == OWN_OF_FAMILY.get(key)
            if key in OWN.get(name, {}):
                assert value == OWN[name][key], (name, key)
            else:
                values.setdefault((key, group), set()).add(str(value))
            if key not in HEADS:
                words.setdefault((key, group), set()).add(tuple(words_of_keys(name)[key]))
    assert {key: found for key, found in values.items() if len(found) > 1} == {}
    assert {key: found for key, found in words.items() if len(found) > 1} == {}


@names
def test_names(name):
    config = ALGORITHMS[name]
    assert config.associated_class().__name__.lower() == name
    assert config.__name__ == config.associated_class().__name__ + "Config"
    assert algorithm_config_registry[name] is config
    for static in ("on_policy", "supports_continuous_actions", "supports_discrete_actions", "has_centralized_critic"):
        assert getattr(config, static)() == getattr(MappoConfig, static)()
    assert config.get_from_yaml().has_critic()


@names
def test_hydra_and_yaml_give_the_same_config(name):
    with initialize_config_module("benchmarl.conf", version_base=None):
        cfg = compose("config", overrides=[f"algorithm={name}", "task=vmas/balance"])
    assert load_algorithm_config_from_hydra(cfg.algorithm) == ALGORITHMS[name].get_from_yaml()


PRESETS = ["base_experiment", *sorted(p.stem for p in (conf_folder() / "experiment").glob("*.yaml"))]


def composed(preset, *overrides):
    """What BenchMARL's command line makes of it."""
    with initialize_config_module("benchmarl.conf", version_base=None):
        choices = ["algorithm=mars", "task=vmas/balance", f"experiment={preset}"]
        cfg = compose("config", overrides=[*choices, *overrides])
    return load_experiment_config_from_hydra(cfg.experiment)


def with_types(value):
    """A value with the types of all that is in it: 10 is not 10.0."""
    if isinstance(value, dict):
        return {key: with_types(item) for key, item in value.items()}
    return (type(value), [with_types(item) for item in value]) if isinstance(value, list) else (type(value), value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compose_and_are_the_same_from_python(preset):
    config = composed(preset)
    config.validate(on_policy=True)
    config.validate(on_policy=False)
    assert with_types(vars(experiment_config(preset))) == with_types(vars(config))


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_presets_of_ours_need_no_account_and_no_display(preset):
    config = experiment_config(preset)
    assert (config.loggers, config.render, config.create_json) == (["csv"], False, True)


def test_without_a_preset_the_experiment_is_benchmarls():
    assert experiment_config() == experiment_config("base_experiment")
    config = ExperimentConfig.get_from_yaml()
    assert vars(experiment_config()) == vars(config) | {"clip_grad_val": 5.0}


def test_overrides_of_a_preset_are_the_command_lines():
    words = ["clip_grad_val=7", "loggers=[]", "restore_map_location={cuda:cpu}"]
    words = [f"experiment.{word}" for word in ("max_n_frames=12000", "exploration_anneal_frames=null", *words)]
    words.append("++experiment.adam_extra_kwargs.amsgrad=true")
    values = {"max_n_frames": 12_000, "exploration_anneal_frames": None, "clip_grad_val": 7, "loggers": []}
    values |= {"restore_map_location": {"cuda": "cpu"}, "adam_extra_kwargs": {"amsgrad": True}}
    config = experiment_config("vmas_fine_tuned", **values)
    assert with_types(vars(config)) == with_types(vars(composed("vmas_fine_tuned", *words)))


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("vmas_desktop", {}, "no experiment preset vmas_desktop. Did you mean vmas_laptop.*sequential_papers"),
        ("x", {}, "no experiment preset x. There are base_experiment, .*sequential_papers"),
        (None, {"max_frames": 1}, "no experiment key max_frames. Did you mean max_n_frames"),
        ("vmas_laptop", {"defaults": []}, "no experiment key defaults"),
        ("vmas_laptop", {"lr": "fast"}, "(?s)'fast'.*full_key: lr"),
    ],
)
def test_bad_presets_and_keys_are_refused(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        experiment_config(preset, **overrides)


def test_config_from_a_path(tmp_path):
    text = (conf_folder() / "algorithm" / "mars.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("epsilon: 0.2", "epsilon: 0.3"))
    assert MarsConfig.get_from_yaml(str(path)).epsilon == 0.3


def test_registering_twice_is_safe():
    before = dict(algorithm_config_registry)
    register()
    assert algorithm_config_registry == before


def test_every_algorithm_has_a_case():
    assert {case.name for case in CASES} == set(ALGORITHMS)


@pytest.mark.parametrize(
    ("config", "key", "value", "cure"),
    [
        (MarsConfig, "epsilon", 0.0, "0 < algorithm.epsilon < 0.5"),
        (MarsConfig, "epsilon", -0.2, "0 < algorithm.epsilon < 0.5"),
        (MarsConfig, "epsilon", 0.5, "0 < algorithm.epsilon < 0.5"),
        (MarsConfig, "epsilon", float("nan"), "0 < algorithm.epsilon < 0.5"),
        (MarsConfig, "surrogate", "square", "clip, quadratic, reciprocal, log"),
        (MarsConfig, "estimator", "td", "gae, gpae"),
        (MarsConfig, "normalize_advantage", "agents", "none, batch, per_agent"),
        (MarsConfig, "normalize_value", "batch", "none, running"),
        (MaspoConfig, "epsilon", 1.0, "0 < algorithm.epsilon < 1.0"),
        (MaspoConfig, "epsilon_negative", 0.0, "0 < algorithm.epsilon_negative < 1.0"),
    ],
)
def test_bad_values_are_refused_before_collection(config, key, value, cure, make_experiment):
    config = config.get_from_yaml()
    setattr(config, key, value)
    with pytest.raises(ValueError, match=f"algorithm.{key}=") as error:
        make_experiment(config)
    assert cure in str(error.value)
