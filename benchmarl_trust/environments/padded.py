"""Parallel environments of PettingZoo's kind as one of TorchRL's, with agents of unlike sizes in one group.

Shapes: B copies, N agents, O and D the lengths of the longest observation and action, S that of the state.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from benchmarl.utils import DEVICE_TYPING
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

if TYPE_CHECKING:
    from gymnasium.spaces import Box
    from pettingzoo import ParallelEnv

#: The group of all agents.
GROUP = "agents"
#: TorchRL's names for the ends of episodes.
FLAGS = ("done", "terminated", "truncated")


class PaddedEnv(EnvBase):
    """Copies of an environment whose agents all act until the episode ends for all of them at once.

    Observations are padded with zeros at their end. Entries of an action beyond those that its agent has are not
    executed. TorchRL's ``PettingZooWrapper`` refuses such agents, and is slower on padded ones. The copies take turns
    within each step, so that TorchRL's own work of a step is done once for all of them.

    Args:
        copies (sequence of pettingzoo.ParallelEnv): alike, with vectors as observations, boxes of vectors as actions,
            and ``state()``.
        seed (int, optional): what the seeds of the copies' first resets follow from; resets after them go on from
            there. A copy that is not batched takes it itself.
        device (torch.device, str or int): where tensors are put. The environment itself computes on the CPU.
        whole (bool): whether each agent observes the state and behind it N numbers, 1 at its own place, else 0.
        batched (bool): whether the batch size is [B]; else there is one copy, and it is [].

    Attributes:
        executed (Tensor): boolean, [N, D], True where an agent's action has an entry.
    """

    executed: torch.Tensor

    def __init__(
        self,
        copies: Sequence["ParallelEnv"],
        seed: int | None = None,
        device: DEVICE_TYPING = "cpu",
        whole: bool = False,
        batched: bool = True,
    ):
        super().__init__(device=device, batch_size=torch.Size((len(copies),) if batched else ()))
        env, self._copies, self._whole = copies[0], copies, whole
        self._names = list(env.possible_agents)
        boxes = [cast("Box", env.action_space(name)) for name in self._names]
        self._sizes = [len(box.low) for box in boxes]
        n_agents, longest = len(self._names), max(self._sizes)
        self._lengths = [len(cast("Box", env.observation_space(name)).low) for name in self._names]
        if whole:
            self._lengths = n_agents * [len(env.state()) + n_agents]
        self.register_buffer("executed", torch.arange(longest) < torch.tensor(self._sizes)[:, None])

        low, high = (
            torch.tensor(np.stack([np.pad(bound, (0, longest - len(bound)), mode="edge") for bound in bounds]))
            for bounds in ([box.low for box in boxes], [box.high for box in boxes])
        )
        n_state = len(env.state())
        self.full_action_spec_unbatched = self._of_agents(action=Bounded(low, high, low.shape, dtype=torch.float32))
        self.full_reward_spec_unbatched = self._of_agents(reward=Unbounded(torch.Size((n_agents, 1))))
        observation = self._of_agents(observation=Unbounded(torch.Size((n_agents, max(self._lengths)))))
        observation["state"] = Unbounded(torch.Size((n_state,)), device=self.device)
        self.full_observation_spec_unbatched = observation
        flags = {key: Binary(1, torch.Size((1,)), dtype=torch.bool) for key in FLAGS}
        self.full_done_spec_unbatched = Composite(flags).to(self.device)
        self._observation = np.zeros((len(copies), n_agents, max(self._lengths)), dtype=np.float32)
        self._state = np.zeros((len(copies), n_state), dtype=np.float32)
        self._set_seed(seed)

    def _of_agents(self, **spec) -> Composite:
        return Composite({GROUP: Composite(spec, shape=(len(self._names),))}).to(self.device)

    def _set_seed(self, seed: int | None) -> None:
        """The next resets are made with those that follow from it."""
        if self.batch_size and seed is not None:
            own = np.random.SeedSequence(seed).spawn(len(self._copies))
            self._seeds: list[int | None] = [int(sequence.generate_state(1)[0]) for sequence in own]
        else:
            self._seeds = len(self._copies) * [seed]

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        """New episodes where ``_reset`` says so. The others go on: TorchRL takes what is seen there from its input."""
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        if chosen is None:
            chosen = torch.ones(len(self._copies), dtype=torch.bool)
        for i in chosen.flatten().nonzero().flatten().tolist():
            observations, _ = self._copies[i].reset(seed=self._seeds[i])
            self._seeds[i] = None
            self._look(i, observations)
        return self._pack(np.zeros((3, len(self._copies), 1), dtype=bool))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        actions = tensordict[GROUP, "action"].detach().cpu().numpy().reshape(len(self._copies), len(self._names), -1)
        reward = np.zeros((*actions.shape[:2], 1), dtype=np.float32)
        ends = np.zeros((3, len(self._copies), 1), dtype=bool)  # as FLAGS has them
        for i, (env, rows) in enumerate(zip(self._copies, actions, strict=True)):
            own = {name: row[:size] for name, row, size in zip(self._names, rows, self._sizes, strict=True)}
            observations, rewards, terminated, truncated, _ = env.step(own)
            self._look(i, observations)
            reward[i, :, 0] = [rewards[name] for name in self._names]
            first = self._names[0]
            ends[:, i, 0] = terminated[first] or truncated[first], terminated[first], truncated[first]
        return self._pack(ends, reward=self._batch(reward))

    def _look(self, i: int, observations: dict) -> None:
        """Write what copy ``i`` shows where it is kept."""
        self._state[i] = state = self._copies[i].state()
        if self._whole:
            self._observation[i, :, : len(state)] = state
            self._observation[i, :, len(state) :] = np.eye(len(self._names))
        else:
            for row, name, length in zip(self._observation[i], self._names, self._lengths, strict=True):
                row[:length] = observations[name]

    def _batch(self, values: np.ndarray) -> torch.Tensor:
        """A copy of [B, ...] with the batch size in place of [B]."""
        return torch.tensor(values).reshape(*self.batch_size, *values.shape[1:]).to(self.device)

    def _pack(self, ends: np.ndarray, **more: torch.Tensor) -> TensorDict:
        agents = {"observation": self._batch(self._observation), **more}
        packed = {
            GROUP: TensorDict(agents, batch_size=(*self.batch_size, len(self._names)), device=self.device),
            "state": self._batch(self._state),
            **{key: self._batch(flags) for key, flags in zip(FLAGS, ends, strict=True)},
        }
        return TensorDict(packed, batch_size=self.batch_size, device=self.device)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the copies too, and with them what they render with."""
        for env in self._copies:
            env.close()
        super().close(raise_if_closed=raise_if_closed)
