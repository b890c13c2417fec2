"""A parallel environment of PettingZoo's kind as one of TorchRL's, with agents of unlike sizes in one group.

Shapes: N agents, O and D the lengths of the longest observation and action, S that of the state.
"""

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


class PaddedEnv(EnvBase):
    """One environment whose agents all act until the episode ends for all of them at once.

    Observations are padded with zeros at their end. Entries of an action beyond those that its agent has are not
    executed. TorchRL's ``PettingZooWrapper`` refuses such agents, and is slower on padded ones.

    Args:
        env (pettingzoo.ParallelEnv): with vectors as observations, boxes of vectors as actions, and ``state()``.
        seed (int, optional): of the first reset; those that follow go on from there.
        device (torch.device, str or int): where tensors are put. The environment itself computes on the CPU.
        whole (bool): whether each agent observes the state and behind it N numbers, 1 at its own place, else 0.

    Attributes:
        executed (Tensor): boolean, [N, D], True where an agent's action has an entry.
    """

    executed: torch.Tensor

    def __init__(self, env: "ParallelEnv", seed: int | None = None, device: DEVICE_TYPING = "cpu", whole: bool = False):
        super().__init__(device=device, batch_size=torch.Size(()))
        self._suite, self._seed, self._whole = env, seed, whole
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
        shape = torch.Size((n_agents, max(self._lengths)))
        self.action_spec = self._of_agents(action=Bounded(low, high, low.shape, dtype=torch.float32))
        self.reward_spec = self._of_agents(reward=Unbounded(torch.Size((n_agents, 1))))
        self.observation_spec = self._of_agents(observation=Unbounded(shape))
        self.observation_spec["state"] = Unbounded(torch.Size(np.shape(env.state())), device=self.device)
        flags = {name: Binary(1, torch.Size((1,)), dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags).to(device)

    def _of_agents(self, **spec) -> Composite:
        return Composite({GROUP: Composite(spec, shape=(len(self._names),))}).to(self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        observations, _ = self._suite.reset(seed=self._seed)
        self._seed = None
        return self._pack(observations, terminated=False, truncated=False)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        rows = tensordict[GROUP, "action"].detach().cpu().numpy()
        actions = {name: row[:size] for name, row, size in zip(self._names, rows, self._sizes, strict=True)}
        observations, rewards, terminated, truncated, _ = self._suite.step(actions)
        reward = torch.tensor([[rewards[name]] for name in self._names], dtype=torch.float32)
        first = self._names[0]
        return self._pack(observations, terminated[first], truncated[first], reward=reward)

    def _pack(self, observations: dict, terminated: bool, truncated: bool, **more: torch.Tensor) -> TensorDict:
        state = self._suite.state().astype(np.float32)
        observation = np.zeros((len(self._names), max(self._lengths)), dtype=np.float32)
        if self._whole:
            observation[:, : len(state)] = state
            observation[:, len(state) :] = np.eye(len(self._names))
        else:
            for row, name, length in zip(observation, self._names, self._lengths, strict=True):
                row[:length] = observations[name]
        agents = {"observation": torch.from_numpy(observation), **more}
        flags = torch.tensor([[terminated or truncated], [terminated], [truncated]])
        packed = {
            GROUP: TensorDict(agents, batch_size=(len(self._names),), device=self.device),
            "state": torch.from_numpy(state),
            **dict(zip(("done", "terminated", "truncated"), flags, strict=True)),
        }
        return TensorDict(packed, batch_size=(), device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        """The next reset is made with it."""
        self._seed = seed

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environment within too, and with it what it renders with."""
        self._suite.close()
        super().close(raise_if_closed=raise_if_closed)
