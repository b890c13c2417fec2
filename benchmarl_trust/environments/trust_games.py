"""Games of one step with a shared reward: which of several optima does an algorithm end in?

Shapes: ``[*]`` stands for any batch dimensions; B is the number of environments, N of agents.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarl.environments import TaskClass
from benchmarl.utils import DEVICE_TYPING
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from benchmarl_trust.environments.task import PackagedTask


def differential_reward(action: Tensor) -> Tensor:
    r"""Two hills: a broad one that is higher, thanks to a slope, and a narrow one.

    .. math:: R(a) = 10\, N(a; (5, 5), (1, 3)) + 0.1\, a_1 + 5.3\, N(a; (1, 1), (1, 1))

    N(a; m, s) is the density of a Gaussian with independent components of means m and standard deviations s. In
    [0, 7]² the maxima are R = 1.0400 at (5.192, 5.000) and R = 0.9496 at (1.120, 1.000).

    Source: the differential game of the paper on KL budgets for HATRPO (HATRPO-W, HATRPO-G).

    Args:
        action (Tensor): the joint action that is executed, [*, 2].

    Returns: [*].

    Examples:
        >>> differential_reward(torch.tensor([[5.192, 5.0], [1.120, 1.0]]))
        tensor([1.0400, 0.9496])
    """
    first, second = action.unbind(-1)
    high = 10 * _normal_density(first, 5, 1) * _normal_density(second, 5, 3)
    low = 5.3 * _normal_density(first, 1, 1) * _normal_density(second, 1, 1)
    return high + 0.1 * first + low


def _normal_density(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def matrix_reward(payoff: Tensor, action: Tensor) -> Tensor:
    r"""The entry of the payoff tensor that the agents choose together.

    .. math:: R(a) = payoff[a_1, ..., a_N]

    Args:
        payoff (Tensor): one dimension per agent.
        action (Tensor): the index that each agent chooses in its dimension, [*, N].

    Returns: [*].

    Examples:
        >>> matrix_reward(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[0, 1], [1, 0]]))
        tensor([1., 2.])
    """
    return payoff[action.unbind(-1)]


class _OneStepGame(EnvBase):
    """B copies of a game in which N agents act once, all at the same time, for one shared reward.

    The observation of agent i is the i-th row of the identity, always. It tells nothing of the game. Were it equal for
    all agents, agents that share one policy would have to act alike, which rules out most joint actions.
    """

    def __init__(self, action_spec: TensorSpec, num_envs: int, device: DEVICE_TYPING):
        super().__init__(device=device, batch_size=torch.Size((num_envs,)))
        n_agents = action_spec.shape[0]

        def agents(**spec: TensorSpec) -> Composite:
            # Specs are made on the CPU, and a Composite takes in none of another device: moved once they are together.
            return Composite(agents=Composite(spec, shape=(n_agents,))).to(device)

        self.full_action_spec_unbatched = agents(action=action_spec)
        self.full_observation_spec_unbatched = agents(observation=Unbounded(torch.Size((n_agents, n_agents))))
        self.full_reward_spec_unbatched = agents(reward=Unbounded(torch.Size((n_agents, 1))))
        flag = Binary(1, torch.Size((1,)), dtype=torch.bool)
        self.full_done_spec_unbatched = Composite(done=flag, terminated=flag.clone()).to(device)

    def _joint_reward(self, action: Tensor) -> Tensor:
        """[B] from the agents' actions."""
        raise NotImplementedError

    def _state(self, done: bool) -> TensorDict:
        n_agents = self.full_observation_spec["agents"].shape[-1]
        observation = torch.eye(n_agents, device=self.device).repeat(*self.batch_size, 1, 1)
        flag = torch.full((*self.batch_size, 1), done, device=self.device)
        return TensorDict(
            {
                "agents": TensorDict({"observation": observation}, batch_size=observation.shape[:-1]),
                "done": flag,
                "terminated": flag.clone(),
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        return self._state(done=False)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        state = self._state(done=True)
        reward = self._joint_reward(tensordict["agents", "action"])
        state["agents", "reward"] = reward[:, None, None].repeat(1, state["agents"].shape[-1], 1)
        return state

    def _set_seed(self, seed: int | None) -> None:
        """Nothing here is random."""


class DifferentialGame(_OneStepGame):
    r""":func:`differential_reward` for two agents with continuous actions.

    .. math:: r = R(clip(start + a, low, high))

    Args:
        start (list of two floats): where the agents stand; a policy with mean 0 acts around it.
        low (float): lower bound of the executed action.
        high (float): upper bound of the executed action. Beyond 7 the slope 0.1 a_1 makes a third maximum.
        action_range (float): an action is in [-action_range, action_range].
        num_envs (int): B.
        device (torch.device, str or int): where everything is computed.

    Raises:
        ValueError: on a bad setting, with the key of the task that is to be changed.

    Examples:
        >>> env = DifferentialGame(start=[2.0, 2.0], low=0.0, high=7.0, action_range=5.0)
        >>> choice = env.reset().set(("agents", "action"), torch.tensor([[[3.192], [3.0]]]))
        >>> env.step(choice)["next", "agents", "reward"]
        tensor([[[1.0400],
                 [1.0400]]])
    """

    start: Tensor

    def __init__(
        self,
        start: list[float],
        low: float,
        high: float,
        action_range: float,
        num_envs: int = 1,
        device: DEVICE_TYPING = "cpu",
    ):
        self._check(start, low, high, action_range)
        action = Bounded(-float(action_range), float(action_range), torch.Size((2, 1)), dtype=torch.float32)
        super().__init__(action, num_envs, device)
        self.low, self.high = low, high
        self.register_buffer("start", torch.tensor(start, dtype=torch.float32, device=device))

    @staticmethod
    def _check(start: list[float], low: float, high: float, action_range: float) -> None:
        for key, value in (("low", low), ("high", high), ("action_range", action_range)):
            if not _is_number(value):
                raise ValueError(f"task.{key}={value} must be a finite number, such as task.{key}=7.0.")
        if low >= high:
            raise ValueError(f"task.low={low} must be below task.high={high}: lower the one or raise the other.")
        if action_range <= 0:
            raise ValueError(f"task.action_range={action_range} must be above 0, such as task.action_range=5.5.")
        if not isinstance(start, (list, tuple)) or len(start) != 2 or not all(map(_is_number, start)):
            raise ValueError(f"task.start={start} must be two numbers, one per agent, such as task.start=[1.5,1.5].")
        if not all(low <= x <= high for x in start):
            raise ValueError(
                f"task.start={start} must lie within [task.low, task.high] = [{low}, {high}]: move it inside, or widen "
                "the bounds."
            )

    def _joint_reward(self, action: Tensor) -> Tensor:
        return differential_reward((self.start + action.squeeze(-1)).clamp(self.low, self.high))


class MatrixGame(_OneStepGame):
    """:func:`matrix_reward` for N agents with discrete actions.

    Args:
        payoff (nested lists of numbers): N levels deep, equally long at each level; the action of ``agent_0`` indexes
            the outermost list.
        num_envs (int): B.
        device (torch.device, str or int): where everything is computed.

    Raises:
        ValueError: on a bad payoff.

    Examples:
        >>> env = MatrixGame([[11, -30, 0], [-30, 7, 6], [0, 0, 5]])
        >>> choice = env.reset().set(("agents", "action"), torch.tensor([[1, 2]]))
        >>> env.step(choice)["next", "agents", "reward"]
        tensor([[[6.],
                 [6.]]])
    """

    payoff: Tensor

    def __init__(self, payoff: list, num_envs: int = 1, device: DEVICE_TYPING = "cpu"):
        tensor = self._check(payoff)
        super().__init__(Categorical(tensor.shape[0], torch.Size((tensor.ndim,))), num_envs, device)
        self.register_buffer("payoff", tensor.to(device))

    @staticmethod
    def _check(payoff: list) -> Tensor:
        cure = "give nested lists of numbers, one level per agent, such as task.payoff=[[10,0],[0,2]]."
        try:
            tensor = torch.tensor(payoff, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"task.payoff={payoff} is not a tensor of numbers ({error}): {cure}") from error
        if tensor.ndim < 2 or not tensor.isfinite().all():
            raise ValueError(f"task.payoff={payoff} must be finite and of two agents or more: {cure}")
        if len(set(tensor.shape)) > 1 or tensor.shape[0] < 2:
            raise ValueError(
                f"task.payoff has {tuple(tensor.shape)} actions of its agents: all agents must have the same number, "
                "two or more. Repeat rows or add bad ones to make the lists equally long."
            )
        return tensor

    def _joint_reward(self, action: Tensor) -> Tensor:
        return matrix_reward(self.payoff, action)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class DifferentialConfig:
    """Schema of ``trust_games/differential``: the settings of :class:`DifferentialGame`."""

    start: list[float]
    low: float
    high: float
    action_range: float


@dataclass
class MatrixConfig:
    """Schema of the matrix games: the settings of :class:`MatrixGame`."""

    payoff: Any  # lists as deep as there are agents


class TrustGamesClass(TaskClass):
    """One of the games as BenchMARL's task, with its agents in one group ``agents``."""

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: DEVICE_TYPING
    ) -> Callable[[], EnvBase]:
        """A function that makes the game. The games are not random: the seed is not used."""
        game = DifferentialGame if self._is_differential() else MatrixGame
        config = copy.deepcopy(self.config)
        return lambda: game(**config, num_envs=num_envs, device=device)

    def _is_differential(self) -> bool:
        return self.name == TrustGamesTask.DIFFERENTIAL.name

    def supports_continuous_actions(self) -> bool:
        """The differential game."""
        return self._is_differential()

    def supports_discrete_actions(self) -> bool:
        """The matrix games."""
        return not self._is_differential()

    def max_steps(self, env: EnvBase) -> int:
        """1."""
        return 1

    def has_render(self, env: EnvBase) -> bool:
        """No."""
        return False

    def group_map(self, env: EnvBase) -> dict[str, list[str]]:
        """All agents in one group."""
        n_agents = env.full_observation_spec["agents"].shape[-1]
        return {"agents": [f"agent_{i}" for i in range(n_agents)]}

    def observation_spec(self, env: EnvBase) -> Composite:
        """Observation [N, N] of the group."""
        return env.full_observation_spec_unbatched

    def action_spec(self, env: EnvBase) -> Composite:
        """Action [N, 1] of the group in the differential game, [N] in a matrix game."""
        return env.full_action_spec_unbatched

    def info_spec(self, env: EnvBase) -> Composite | None:
        """None."""
        return None

    def state_spec(self, env: EnvBase) -> Composite | None:
        """None."""
        return None

    def action_mask_spec(self, env: EnvBase) -> Composite | None:
        """None."""
        return None

    @staticmethod
    def env_name() -> str:
        """The folder of the yaml files."""
        return "trust_games"


class TrustGamesTask(PackagedTask):
    """The games, by name.

    Examples:
        >>> TrustGamesTask.DIFFERENTIAL.get_from_yaml().config["start"]
        [1.5, 1.5]
    """

    DIFFERENTIAL = None
    CLIMBING = None
    PENALTY = None

    @staticmethod
    def associated_class() -> type[TaskClass]:
        """:class:`TrustGamesClass`."""
        return TrustGamesClass

    def schema(self) -> type:
        """Bounds and start of the differential game, payoffs of the others."""
        return DifferentialConfig if self is TrustGamesTask.DIFFERENTIAL else MatrixConfig
