"""What a task tells of its evaluations is logged, with any algorithm."""

import json

import pytest
import torch
from benchmarl.algorithms import IppoConfig
from conftest import scalars

from benchmarl_trust import HappoConfig
from benchmarl_trust.environments import TrustGamesClass, TrustGamesTask


@pytest.mark.parametrize("config", [HappoConfig, IppoConfig])
@pytest.mark.parametrize("create_json", [True, False])
def test_means_are_logged_and_each_episode_is_reported(config, create_json, run, monkeypatch):
    def evaluation_info(rollouts):
        return {"first_action": torch.stack([rollout["agents", "action"][0, 0].squeeze() for rollout in rollouts])}

    monkeypatch.setattr(TrustGamesClass, "evaluation_info", staticmethod(evaluation_info), raising=False)
    experiment = run(
        config.get_from_yaml(),
        task=TrustGamesTask.DIFFERENTIAL.get_from_yaml(),
        evaluation=True,
        create_json=create_json,
    )
    logged = scalars(experiment)["eval_info_first_action"]
    assert len(logged) == experiment.n_iters_performed
    reports = list(experiment.folder_name.glob("*.json"))
    assert len(reports) == create_json
    for report in reports:
        (seeds,) = (own for task in json.loads(report.read_text())["trust_games"].values() for own in task.values())
        steps = [step for name, step in seeds["seed_0"].items() if name.startswith("step_")]
        assert all(len(step["first_action"]) == experiment.config.evaluation_episodes for step in steps)
        means = [sum(step["first_action"]) / len(step["first_action"]) for step in steps]
        assert means == pytest.approx(logged, abs=1e-5)


def test_what_a_task_tells_is_asked_anew_for_each_experiment(run, monkeypatch):
    """A check of its class against a protocol would be remembered."""

    def experiment():
        task = TrustGamesTask.DIFFERENTIAL.get_from_yaml()
        return run(HappoConfig.get_from_yaml(), task=task, evaluation=True)

    def evaluation_info(rollouts):
        return {"one": torch.ones(len(rollouts))}

    with monkeypatch.context() as patched:
        patched.setattr(TrustGamesClass, "evaluation_info", staticmethod(evaluation_info), raising=False)
        assert set(scalars(experiment())["eval_info_one"]) == {1.0}
    assert "eval_info_one" not in scalars(experiment())
