"""Surrogate, factor, estimator, schedule and allocation, each a key: each counts; what has no meaning is refused.

The whole grid is in the matrix (``make matrix``); here a part of it in which every two values of two keys, kinds of
task included, come together once.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from benchmarl.hydra_config import load_algorithm_config_from_hydra
from benchmarl.models import GruConfig
from cases import configured
from combinations import ALLOCATIONS, ESTIMATORS, FACTORS, SURROGATES, combination, grid
from conftest import policy_parameters, scalars
from environments import StandInTask
from hydra import compose, initialize_config_module
from problems import RNN

from benchmarl_trust import ALGORITHMS
from benchmarl_trust.algorithms import sequential_gradient
from benchmarl_trust.algorithms.estimators import ESTIMATORS as ESTIMATORS_BY_NAME

KINDS = {
    "continuous": dict,
    "discrete": lambda: {"task": StandInTask(mask=True)},
    # The recurrent network is run step by step: 8 environments of 5 steps are faster than 4 of 10.
    "recurrent": lambda: {"model": GruConfig(**RNN), "critic": GruConfig(**RNN), "on_policy_n_envs_per_worker": 8},
}
#: mars is the simultaneous one, the others are sequential.
SCHEDULES = ("simultaneous", *FACTORS)


class Run(NamedTuple):
    """A combination on a kind of task: every field is a key, ``surrogate`` or ``allocation`` that of its family."""

    kind: str
    share: str
    schedule: str
    estimator: str
    surrogate: str = ""
    allocation: str = ""

    @property
    def combination(self):
        if self.allocation:
            keys = {"allocation": self.allocation, "factor": self.schedule, "estimator": self.estimator}
            return combination("hatrpo", **keys)
        if self.schedule == "simultaneous":
            return combination("mars", surrogate=self.surrogate, estimator=self.estimator)
        return combination("happo", surrogate=self.surrogate, factor=self.schedule, estimator=self.estimator)


#: Key, its values, and the rest: runs that differ in this key alone.
LINES = [
    ("surrogate", SURROGATES, Run("continuous", "separate", "full", "gae")),
    ("surrogate", SURROGATES, Run("discrete", "shared", "capped", "gpae")),
    ("surrogate", SURROGATES, Run("recurrent", "separate", "simultaneous", "gae")),
    ("schedule", SCHEDULES, Run("continuous", "shared", "", "gpae", surrogate="clip")),
    ("schedule", SCHEDULES, Run("discrete", "separate", "", "gae", surrogate="reciprocal")),
    ("schedule", SCHEDULES, Run("recurrent", "shared", "", "gpae", surrogate="clip")),
    ("estimator", ESTIMATORS, Run("continuous", "separate", "full", "", surrogate="log")),
    ("estimator", ESTIMATORS, Run("discrete", "separate", "simultaneous", "", surrogate="reciprocal")),
    ("estimator", ESTIMATORS, Run("recurrent", "shared", "capped", "", surrogate="clip")),
    ("allocation", ALLOCATIONS, Run("continuous", "separate", "full", "gae")),
    ("allocation", ALLOCATIONS, Run("discrete", "shared", "capped", "gpae")),
    ("allocation", ALLOCATIONS, Run("recurrent", "separate", "capped", "gae")),
    ("schedule", FACTORS, Run("continuous", "shared", "", "gpae", allocation="kkt")),
    ("schedule", FACTORS, Run("discrete", "separate", "", "gpae", allocation="greedy")),
    ("schedule", FACTORS, Run("recurrent", "shared", "", "gpae", allocation="uniform")),
    ("estimator", ESTIMATORS, Run("discrete", "shared", "capped", "", allocation="greedy")),
]
RUNS = [rest._replace(**{key: value}) for key, values, rest in LINES for value in values]
FAMILIES = {
    "gradient": {"surrogate": SURROGATES, "schedule": SCHEDULES, "estimator": ESTIMATORS},
    "natural": {"allocation": ALLOCATIONS, "schedule": FACTORS, "estimator": ESTIMATORS},
}
#: Parameters at the start and the end of runs that several lines have in common.
DONE: dict[Run, tuple[dict, dict]] = {}


def start_and_end(make_experiment, config, **settings):
    """The policy's parameters before and after; larger steps than usual, so that ratios leave their trust regions."""
    experiment = make_experiment(config, **{"loggers": [], "lr": 0.01, "max_n_iters": 1} | settings)
    start = policy_parameters(experiment)
    experiment.run()
    end = policy_parameters(experiment)
    assert all(value.isfinite().all() for value in end.values())
    return start, end


def distance(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("key", "values", "rest"), LINES, ids=["-".join(filter(None, (key, *rest))) for key, _, rest in LINES]
)
def test_each_value_of_a_key_trains_and_makes_a_difference(key, values, rest, make_experiment):
    results = []
    for run in (rest._replace(**{key: value}) for value in values):
        if run not in DONE:
            settings = KINDS[run.kind]() | {"share_policy_params": run.share == "shared"}
            DONE[run] = start_and_end(make_experiment, run.combination.config(), **settings)
        results.append(DONE[run])
    for start, end in results:
        assert all(torch.equal(start[name], results[0][0][name]) for name in start)
        assert all(not torch.equal(start[name], end[name]) for name in start)
    for (_, one), (_, other) in itertools.combinations(results, 2):
        assert distance(one, other) > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_these_runs_bring_every_two_values_together(family):
    axes = {"kind": tuple(KINDS), "share": ("shared", "separate")} | FAMILIES[family]
    runs = [run for run in RUNS if bool(run.allocation) == (family == "natural")]
    for (one, values), (other, others) in itertools.combinations(axes.items(), 2):
        met = {(getattr(run, one), getattr(run, other)) for run in runs}
        assert met == set(itertools.product(values, others))


def test_the_grid_is_whole():
    names = [combination.name for combination in grid()]
    assert len(names) == len(set(names)) == 36
    assert {run.combination.name for run in RUNS} <= set(names)


def discrete(make_experiment, preset, n_agents=3, **keys):
    """The policy's parameters after a preset with these keys, on the fastest task; older data wants an iteration."""
    settings = {"task": StandInTask(n_agents=n_agents), "max_n_iters": keys.get("n_rollouts", 1)}
    return start_and_end(make_experiment, configured(ALGORITHMS[preset], **keys), **settings)[1]


GPAE = {"estimator": "gpae"}
OLDER = GPAE | {"n_rollouts": 2}
#: At first all advantages of the task are positive.
BOTH_SIGNS = {"normalize_advantage": "batch"}
#: Preset, and keys that end at different parameters each.
DIFFERENT = {
    "epsilon": ("mars", [BOTH_SIGNS | keys for keys in ({}, {"epsilon": 0.05}, {"epsilon_negative": 0.05})]),
    "epsilon by position": ("happo", [{"surrogate": "log"}, {"surrogate": "log", "epsilon_by_position": True}]),
    "order": ("happo", [{"order": "fixed"}, {"order": [2, 0, 1]}]),
    "factor": ("happo", [{"factor": "full"}, {"factor": "inside_clip"}, {"factor": "capped"}]),
    "estimator": ("happo", [{}, GPAE, {"estimator": "preopc"}]),
    "values": ("mars", [{}, {"normalize_value": "running"}]),
    "values of gpae": ("happo", [OLDER, OLDER | {"normalize_value": "running"}]),
    "normalisation": ("happo", [GPAE, GPAE | {"normalize_advantage": "per_agent"}]),
    "advantage": ("hatrpo", [{}, {"advantage": "team"}, {"normalize_advantage": "batch"}]),
    "older data": ("mars", [OLDER, OLDER | {"truncation": "it"}, OLDER | {"eta": 1.5}]),
    "older data in sequence": ("happo", [OLDER, OLDER | {"truncation": "it"}, OLDER | {"truncation": "none"}]),
}
#: Preset, agents, and keys that all end at the same parameters.
EQUAL = {
    "gae has no ratios": ("happo", 3, [{}, {"truncation": "none", "eta": 3.0}]),
    "nor has gpae of one rollout": ("happo", 3, [GPAE, GPAE | {"truncation": "none"}, GPAE | {"eta": 3.0}]),
    "a cap out of reach": ("mars", 3, [OLDER | {"truncation": "st"}, OLDER | {"eta": 1e9}]),
    "equal radii": ("mars", 3, [BOTH_SIGNS, BOTH_SIGNS | {"epsilon_negative": 0.2}]),
    "factor of one agent": ("happo", 1, [{"factor": factor} for factor in ("full", "capped", "inside_clip")]),
    "and with natural steps": ("hatrpo", 1, [GPAE | {"factor": factor} for factor in FACTORS]),
    "budget of one agent": ("hatrpo", 1, [{}, {"allocation": "kkt"}, {"allocation": "greedy"}]),
}


@pytest.mark.parametrize(("preset", "variants"), DIFFERENT.values(), ids=DIFFERENT)
def test_further_keys_make_a_difference(preset, variants, make_experiment):
    results = [discrete(make_experiment, preset, **keys) for keys in variants]
    for one, other in itertools.combinations(results, 2):
        assert distance(one, other) > 1e-5


@pytest.mark.parametrize(("preset", "n_agents", "variants"), EQUAL.values(), ids=EQUAL)
def test_what_must_make_no_difference(preset, n_agents, variants, make_experiment):
    first, *others = (discrete(make_experiment, preset, n_agents, **keys) for keys in variants)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("surrogate", "share"), [("clip", False), ("reciprocal", True)])
def test_one_agent_in_sequence_with_gpae_is_simultaneous_gpae(surrogate, share, make_experiment):
    """For one agent the factor is 1; with one minibatch of all frames both make the same steps."""
    keys = {"surrogate": surrogate, "estimator": "gpae", "normalize_advantage": "batch", "lmbda": 0.95}
    settings = {"on_policy_minibatch_size": 40, "on_policy_n_minibatch_iters": 5, "share_policy_params": share}
    results = []
    for preset in ("gpae", "happo"):
        experiment = make_experiment(
            configured(ALGORITHMS[preset], **keys), task=StandInTask(n_agents=1), max_n_iters=3, loggers=[], **settings
        )
        start = policy_parameters(experiment)
        experiment.run()
        results.append((start, policy_parameters(experiment), dict(experiment.losses["agents"].named_parameters())))
    (start, simultaneous, loss), (other_start, sequential, other_loss) = results
    assert all(torch.equal(start[name], other_start[name]) for name in start)
    assert all((start[name] - simultaneous[name]).abs().max() > 1e-3 for name in start)
    for name in start:
        torch.testing.assert_close(sequential[name], simultaneous[name], rtol=1e-4, atol=1e-5)
    assert any("critic" in name for name in loss)
    for name in loss:
        torch.testing.assert_close(other_loss[name], loss[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "share"),
    [("discrete", False), ("discrete", True), pytest.param("recurrent", False, marks=pytest.mark.slow)],
)
def test_older_data_in_sequence(kind, share, make_experiment, monkeypatch):
    """As many optimizer steps as without it; the chain starts where the data was collected."""
    settings = KINDS[kind]() | {"task": StandInTask(), "share_policy_params": share, "max_n_iters": 3, "lr": 0.01}
    seen, steps, original = [], [], sequential_gradient.sweep

    def sweep(agents, order, *args, **kwargs):
        infos = original(agents, order, *args, **kwargs)
        seen.append((agents, infos))
        return infos

    monkeypatch.setattr(sequential_gradient, "sweep", sweep)
    for n_rollouts in (1, 3):
        seen.clear()
        experiment = make_experiment(configured(ALGORITHMS["happo"], **GPAE, n_rollouts=n_rollouts), **settings)
        experiment.run()
        optimizers = experiment.optimizers["agents"]
        steps.append({name: {int(s["step"]) for s in o.state.values()} for name, o in optimizers.items()})
    assert steps[0] == steps[1]
    logged = scalars(experiment)
    assert all(math.isfinite(value) for values in logged.values() for value in values)
    assert logged["train_agents_data_age"] == [0, 0.5, 1]
    assert set(logged["train_agents_skipped_steps"]) == {0}

    agents, infos = seen[-1]
    kept = experiment.replay_buffers["agents"].storage[:]
    assert len(kept) == len(agents[0].data) == 3 * (8 if kind == "recurrent" else 40)
    for agent in agents:
        i, data = agent.policy.index, agent.data
        torch.testing.assert_close(data["log_importance"], data["old_log_prob"] - kept["agents", "log_prob"][..., i])
        assert data["log_importance"].abs().max() > 0.01
    if not share:  # then the first agent has moved once in the iteration, and its policy is what it was after that
        data = agents[infos[0].agent].data
        now = data["old_log_prob"] + infos[0].log_ratio
        factor = (now - kept["agents", "log_prob"][..., infos[0].agent]).exp()
        torch.testing.assert_close(infos[1].factor_mean, factor.mean())
        assert factor.mean() != 1


TEAM = {"estimator": "gpae", "advantage": "team"}
OWN_SCALES = {"normalize_advantage": "per_agent"}
#: Preset, keys, the one that is refused, why, and what to do.
REFUSED = [
    *(
        ("hatrpo", {"surrogate": gain}, "surrogate", "a natural step bounds the KL", "Leave it at linear")
        for gain in SURROGATES
    ),
    ("cliphatrpo", {"factor": "inside_clip"}, "factor", "a natural step has no clip", "Take full or capped"),
    ("hatrpow", OLDER, "n_rollouts", "older batches have other states", "Use n_rollouts=1, or gradient steps"),
    ("hatrpog", OLDER, "n_rollouts", "older batches have other states", "Use n_rollouts=1, or gradient steps"),
    *(
        (preset, {"factor": factor}, "factor", "all agents move at once", "Leave it at null")
        for preset in ("mars", "maspo", "gpae")
        for factor in FACTORS
    ),
    ("mars", {"factor": "inside_clip"}, "factor", "all agents move at once", "Leave it at null"),
    *(
        (preset, {"n_rollouts": 2}, "n_rollouts", "older batches need the ratios", "estimator=gpae")
        for preset in ("mars", "happo", "hatrpo")
    ),
    *(
        (preset, {"estimator": "preopc"}, "estimator", "sequential gradient steps alone", "Take algorithm=a2po")
        for preset in ("mars", "gpae", "hatrpo", "hatrpow")
    ),
    *(
        (
            "happo",
            {"factor": "inside_clip", "surrogate": gain},
            "factor",
            f"surrogate={gain} has no clip",
            "Take algorithm.surrogate=clip",
        )
        for gain in SURROGATES[1:]
    ),
    *(
        (preset, TEAM, "advantage", "see this agent's action", "advantage=per_agent, or algorithm.estimator=gae")
        for preset in ("happo", "hatrpo")
    ),
    *(
        (preset, OWN_SCALES, "normalize_advantage", "in units of squared advantage", "Use batch or none")
        for preset in ("hatrpow", "hatrpog")
    ),
    ("hatrpo", {"order": "score"}, "order", "scores before anybody moves", "algorithm.allocation=kkt"),
    ("hatrpog", {"order": "score"}, "order", "scores before anybody moves", "algorithm.allocation=kkt"),
    ("hatrpo", {"order": "greedy"}, "order", "compares scores before each turn", "algorithm.allocation=greedy"),
    ("hatrpow", {"order": "greedy"}, "order", "compares scores before each turn", "algorithm.allocation=greedy"),
    ("happo", {"order": "score"}, "order", "only natural steps have scores", "one of random, fixed, semi_greedy"),
    *(
        (
            preset,
            {"estimator": "gpae", "share_param_critic": False},
            "share_param_critic",
            "GPAE has one critic",
            "Set algorithm.share_param_critic=True",
        )
        for preset in ("mars", "happo", "a2po", "hatrpo")
    ),
]


@pytest.mark.parametrize(
    ("preset", "keys", "refused", "reason", "cure"),
    REFUSED,
    ids=[f"{case[0]} {' '.join(f'{key}={value}' for key, value in case[1].items())}" for case in REFUSED],
)
def test_what_has_no_meaning_is_refused_before_collection(preset, keys, refused, reason, cure, make_experiment):
    with pytest.raises(ValueError, match=rf"^algorithm\.{refused}={keys[refused]}\b") as error:
        make_experiment(configured(ALGORITHMS[preset], **keys), task=StandInTask())
    assert reason in str(error.value)
    assert cure in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "algorithm=happo algorithm.surrogate=reciprocal",
        "algorithm=happo algorithm.estimator=gpae",
        "algorithm=cliphappo algorithm.estimator=gpae algorithm.surrogate=quadratic",
        "algorithm=mars algorithm.estimator=gpae algorithm.n_rollouts=4",
        "algorithm=hatrpow algorithm.factor=capped algorithm.estimator=gpae",
        "algorithm=hatrpo algorithm.allocation=greedy",
    ],
)
def test_combinations_on_the_command_line(overrides, make_experiment):
    with initialize_config_module("benchmarl.conf", version_base=None):
        config = load_algorithm_config_from_hydra(
            compose("config", overrides=[*overrides.split(), "task=vmas/balance"]).algorithm
        )
    algorithm = make_experiment(config, task=StandInTask()).algorithm
    for key, value in (item.removeprefix("algorithm.").split("=") for item in overrides.split()[1:]):
        assert str(getattr(config, key)) == value
        if key == "estimator":
            assert type(algorithm.estimator) is ESTIMATORS_BY_NAME[value]
        elif key == "n_rollouts":
            assert str(algorithm.estimator.n_rollouts) == value
        else:
            assert getattr(algorithm, key) == value
