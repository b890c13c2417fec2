"""The extras ``tensorboard`` and ``video``: scalars and pictures of evaluations, in TensorBoard."""

import numpy as np
import pytest
from torchrl.envs import VmasEnv

from benchmarl_trust import MarsConfig


def test_tensorboard_with_pictures(run, monkeypatch):
    pytest.importorskip("tensorboard")
    pytest.importorskip("moviepy.editor")  # torch imports it, which moviepy 2 has no longer
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(VmasEnv, "render", lambda env, mode: np.zeros((20, 30, 3), np.uint8), raising=False)
    experiment = run(MarsConfig.get_from_yaml(), loggers=["tensorboard"], evaluation=True, render=True)
    (file,) = (experiment.folder_name / experiment.name).glob("events*")
    events = EventAccumulator(str(file)).Reload()
    assert len(events.Scalars("train_agents_policy_kl")) == 2
    assert len(events.Scalars("eval_reward_episode_reward_mean")) == 2
    pictures = events.Images("eval_video")
    assert pictures
    assert all(picture.encoded_image_string.startswith(b"GIF89a") for picture in pictures)
