"""One agent's view of a group's policy: twins of one agent equal the group's policy."""

import pytest
import torch
from benchmarl.models import CnnConfig
from environments import StandInTask
from problems import CNN

from benchmarl_trust import HappoConfig


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_image_networks_run_one_agent_at_a_time(nested, share, make_experiment):
    """Also where observations are entries of an entry, as in MeltingPot: an image, and a vector beside it."""
    task, model = StandInTask(rgb=True, nested=nested, state=True), CnnConfig(**CNN)
    experiment = make_experiment(HappoConfig.get_from_yaml(), task=task, model=model, share_policy_params=share)
    group = experiment.algorithm._policies["agents"]
    assert group.fast
    batch = experiment.algorithm.as_sampled("agents", next(iter(experiment.collector)).reshape(-1))
    seen = batch.select(("agents", "observation")).keys(True, True)
    assert len(list(seen)) == (2 if nested else 1)
    with torch.no_grad():
        expected = group.outputs(batch.copy())["agents", "logits"]
        for i, agent in enumerate(group.agents):
            inputs = agent.inputs(batch)
            assert all(inputs[key].shape == (40, 1, *batch[key].shape[2:]) for key in seen)
            torch.testing.assert_close(agent.forward(inputs)[0], expected[:, i])
            assert (expected[:, i] != expected[:, i - 1]).any()
