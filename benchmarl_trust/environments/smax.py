"""SMAX: battles of JaxMARL's, after StarCraft's, against a scripted enemy, ``smax/<map>``.

B is the number of environments, N of allied units, which are the agents. JAX is imported when an environment is made.
"""

import copy
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, cast
from unittest.mock import patch

import torch
from benchmarl.environments import TaskClass
from benchmarl.utils import DEVICE_TYPING
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from benchmarl_trust.environments.task import PackagedTask

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jaxmarl.environments.smax import HeuristicEnemySMAX

#: JaxMARL's maps.
MAPS = (
    "3m",
    "8m",
    "25m",
    "2s3z",
    "3s5z",
    "5m_vs_6m",
    "10m_vs_11m",
    "27m_vs_30m",
    "3s5z_vs_3s6z",
    "3s_vs_5z",
    "6h_vs_8z",
    "smacv2_5_units",
    "smacv2_10_units",
    "smacv2_20_units",
)
#: Whom an enemy attacks of those in its range.
ATTACK_MODES = ("closest", "random")
#: Kinds of settings.
Setting = int | float | str | bool
SWITCHES = ("enemy_shoots", "see_enemy_actions", "walls_cause_death", "mask_dead")


class _Battle(NamedTuple):
    """JaxMARL's environment of one battle, and programs of XLA's for a batch of them.

    blank: B -> a state of zeros. reset: key, state, chosen [B] -> key, state, view. step: key, state, action [B, N] ->
    key, state, view. A view is what is seen of a state, in two arrays, since handing an array over takes time: numbers,
    [B, N O + S + 1], observations, world state and reward; flags, [B, N A + N + 4], allowed actions, who is alive,
    done, terminated, truncated and won.
    """

    env: "HeuristicEnemySMAX"
    blank: Callable
    reset: Callable
    step: Callable


class Smax(EnvBase):
    r"""B battles, stepped as one program of XLA's, whose tensors are taken over without a copy on the CPU.

    The reward is one for all agents, the dead too:

    .. math:: r = \frac{1}{M} \sum_j \frac{h_j - h_j'}{h_j^{max}} + b \, [won]

    h and h' are the M enemies' health before and after the step, b the bonus of a battle won: all enemies are dead, and
    an ally is alive. The return of a battle won is 1 + b.

    An episode ends for all agents at once: ``terminated`` when a side is dead, ``truncated`` after ``max_steps + 1``
    steps, as JaxMARL counts. What is observed there is the last state; the caller resets, as in all of TorchRL.
    ``("info", "battle_won")`` is True at the end of a battle won.

    A dead agent sees zeros and can do one thing, to stop. With ``mask_dead`` it counts as absent:
    ``("agents", "mask")``, [B, N], is True for who is alive.

    Each reset and each step splits JAX's random key, which comes from the seed, into a next one and B others.

    Args:
        map_name (str): one of ``MAPS``.
        max_steps (int): of an episode, but one.
        attack_mode (str): whom an enemy attacks of those in its range, ``closest`` or ``random``.
        enemy_shoots (bool): whether enemies attack.
        see_enemy_actions (bool): whether agents see what the enemies in sight did last.
        walls_cause_death (bool): of units that touch the border of the map.
        won_battle_bonus (float): b.
        mask_dead (bool): whether the dead count as absent.
        num_envs (int): B.
        seed (int, optional): None: drawn from PyTorch's generator.
        device (torch.device, str or int): where JAX computes, and the tensors are.

    Raises:
        ImportError: without JaxMARL.
        ValueError: on a bad setting, with the key of the task that is to be changed; where JAX lacks the device.

    Source: Rutherford et al., "JaxMARL: Multi-Agent RL Environments and Algorithms in JAX", NeurIPS 2024;
    ``HeuristicEnemySMAX`` of jaxmarl 0.2.0.

    Examples:
        >>> Smax("4m")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: task=smax/4m: there is no such map. There are 3m, 8m, 25m, 2s3z, ...
        >>> env = Smax("3m", num_envs=2, seed=0)  # doctest: +SKIP
        >>> env.reset()["agents", "observation"].shape  # doctest: +SKIP
        torch.Size([2, 3, 75])
    """

    def __init__(
        self,
        map_name: str,
        max_steps: int = 100,
        attack_mode: str = "closest",
        enemy_shoots: bool = True,
        see_enemy_actions: bool = True,
        walls_cause_death: bool = True,
        won_battle_bonus: float = 1.0,
        mask_dead: bool = True,
        num_envs: int = 1,
        seed: int | None = None,
        device: DEVICE_TYPING = "cpu",
    ):
        settings = {
            "max_steps": max_steps,
            "attack_mode": attack_mode,
            "enemy_shoots": enemy_shoots,
            "see_enemy_actions": see_enemy_actions,
            "walls_cause_death": walls_cause_death,
            "won_battle_bonus": won_battle_bonus,
        }
        _check(map_name, **settings, mask_dead=mask_dead)
        super().__init__(device=device, batch_size=torch.Size((num_envs,)))
        self._on = _jax_device(torch.device(device))
        self._battle = _battle(map_name, self._on, **settings)
        self.mask_dead = mask_dead
        self._make_specs()
        self._now = [None, self._battle.blank(num_envs)]  # JAX's key, and the state
        self._set_seed(int(torch.randint(2**31, ())) if seed is None else seed)

    @property
    def battle(self) -> "HeuristicEnemySMAX":
        """JaxMARL's environment of one battle."""
        return self._battle.env

    def _make_specs(self) -> None:
        env = self.battle
        n, n_actions = env.num_agents, env.num_ally_actions
        seen = {
            "observation": Unbounded(torch.Size((n, env.obs_size))),
            "action_mask": Binary(n_actions, torch.Size((n, n_actions)), dtype=torch.bool),
        }
        if self.mask_dead:
            seen["mask"] = Categorical(2, torch.Size((n,)), dtype=torch.bool)
        flag = Binary(1, torch.Size((1,)), dtype=torch.bool)
        specs = {
            "observation": Composite(
                agents=Composite(seen, shape=(n,)),
                state=Unbounded(torch.Size((env.state_size,))),
                info=Composite(battle_won=flag),
            ),
            "action": Composite(agents=Composite(action=Categorical(n_actions, torch.Size((n,))), shape=(n,))),
            "reward": Composite(agents=Composite(reward=Unbounded(torch.Size((n, 1))), shape=(n,))),
            "done": Composite({key: flag.clone() for key in ("done", "terminated", "truncated")}),
        }
        for kind, spec in specs.items():
            setattr(self, f"full_{kind}_spec_unbatched", spec.to(self.device))

    def _set_seed(self, seed: int | None) -> None:
        import jax

        self._now[0] = jax.device_put(jax.random.PRNGKey(seed or 0), self._on)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        """New battles where ``_reset`` says so. The others go on; TorchRL takes what is seen there from its input."""
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        if chosen is None:
            chosen = torch.ones(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        *self._now, view = self._battle.reset(*self._now, _to_jax(chosen.reshape(self.batch_size)))
        return self._observed(view)[0]

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        *self._now, view = self._battle.step(*self._now, _to_jax(tensordict["agents", "action"].to(torch.int32)))
        out, reward = self._observed(view)
        out.set(("agents", "reward"), reward.unsqueeze(1).expand(-1, self.battle.num_agents, -1))
        return out

    def _observed(self, view: tuple) -> tuple[TensorDict, Tensor]:
        """What is to be seen, on the CPU without a copy, and the reward of the last step, [B, 1]."""
        env, batch, n = self.battle, self.batch_size, self.battle.num_agents
        numbers, flags = map(torch.from_dlpack, view)
        if self.device.type == "cuda":  # JAX takes its memory back in a stream of its own, which waits for nobody
            numbers, flags = numbers.clone(), flags.clone()
            torch.cuda.current_stream(self.device).synchronize()
        seen, state, reward = numbers.split([n * env.obs_size, env.state_size, 1], 1)
        allowed, alive, ends = flags.split([n * env.num_ally_actions, n, 4], 1)
        done, terminated, truncated, won = ends.split(1, 1)
        agents = {"observation": seen.unflatten(1, (n, -1)), "action_mask": allowed.unflatten(1, (n, -1))}
        if self.mask_dead:
            agents["mask"] = alive
        out = TensorDict(
            {
                "agents": TensorDict(agents, batch_size=(*batch, n), device=self.device),
                "state": state,
                "info": TensorDict({"battle_won": won}, batch_size=batch, device=self.device),
                "done": done,
                "terminated": terminated,
                "truncated": truncated,
            },
            batch_size=batch,
            device=self.device,
        )
        return out, reward


def _check(map_name: str, **settings: Setting) -> None:
    if map_name not in MAPS:
        raise ValueError(f"task=smax/{map_name}: there is no such map. There are {', '.join(MAPS)}.")
    steps, mode, bonus = (settings[key] for key in ("max_steps", "attack_mode", "won_battle_bonus"))
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"task.max_steps={steps} must be a whole number of 1 or more. The usual value is 100.")
    if mode not in ATTACK_MODES:
        raise ValueError(f"task.attack_mode={mode} must be one of {', '.join(ATTACK_MODES)}. The usual one is closest.")
    if isinstance(bonus, bool) or not isinstance(bonus, int | float) or not math.isfinite(bonus):
        raise ValueError(f"task.won_battle_bonus={bonus} must be a finite number. The usual value is 1.0.")
    for key in SWITCHES:
        if not isinstance(settings[key], bool):
            raise ValueError(f"task.{key}={settings[key]} must be True or False. The usual value is True.")


def _jaxmarl_smax() -> ModuleType:
    try:
        # Its modules print which others they did not find, and put the process's first stdout and stderr in the place
        # of those that a notebook, say, has set. Absl's logging keeps the stderr that it meets, and closes it when
        # logging is configured anew, unless it is the process's first.
        with redirect_stdout(sys.stdout), redirect_stderr(sys.__stderr__), patch("builtins.print"):
            from jaxmarl.environments import smax
    except ImportError as error:
        raise ImportError(
            f'task=smax needs JaxMARL, which cannot be imported ({error}): pip install "benchmarl_trust[smax]", with '
            "Python 3.11 or later."
        ) from error
    return smax


def _jax_device(device: torch.device) -> object:
    """JAX's name of the device."""
    _jaxmarl_smax()  # says what to install
    import jax

    try:
        return jax.devices("cpu" if device.type == "cpu" else "gpu")[device.index or 0]
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"experiment.sampling_device={device}: JAX has no such device here ({error}). Run with "
            "experiment.sampling_device=cpu, or install JAX's build for the GPU."
        ) from error


@lru_cache(maxsize=16)
def _battle(map_name: str, device: object, **settings: Setting) -> _Battle:
    """The battle and its programs; a second environment with the same settings and B need not be compiled again."""
    import jax
    import jax.numpy as jnp

    smax = _jaxmarl_smax()
    with jax.default_device(device):
        env = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(map_name), **settings)

    def by_agent(values):
        return jnp.stack([values[agent] for agent in env.agents])

    def view(seen, state, reward=0.0):
        allies, enemies = jnp.split(state.state.unit_alive, [env.num_allies])
        done, over = state.state.done, ~allies.any() | ~enemies.any()
        ends = jnp.stack([done, over, done & ~over, allies.any() & ~enemies.any()])
        numbers = by_agent(seen).ravel(), seen["world_state"], jnp.atleast_1d(reward)
        flags = by_agent(env.get_avail_actions(state)).ravel().astype(bool), allies, ends
        return jnp.concatenate(numbers).astype(jnp.float32), jnp.concatenate(flags)

    def begin(key):
        seen, state = env.reset(key)
        return state, view(seen, state)

    def begin_or_go_on(key, old, chosen):
        new, view = begin(key)
        return jax.tree.map(partial(jnp.where, chosen), new, old), view

    def advance(key, state, action):
        # Not step(), which resets what has ended and shows the next battle's first state in place of the last.
        seen, state, reward, _, _ = env.step_env(key, state, dict(zip(env.agents, action, strict=True)))
        return state, view(seen, state, reward[env.agents[0]])

    def blank(num_envs):
        shapes, _ = jax.eval_shape(jax.vmap(begin), jnp.zeros((num_envs, 2), jnp.uint32))
        return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), device), shapes)

    @jax.jit
    def reset(key, state, chosen):
        keys = jax.random.split(key, len(chosen) + 1)
        return keys[0], *jax.vmap(begin_or_go_on)(keys[1:], state, chosen)

    @jax.jit
    def step(key, state, action):
        keys = jax.random.split(key, len(action) + 1)
        return keys[0], *jax.vmap(advance)(keys[1:], state, action)

    return _Battle(env, blank, reset, step)


def _to_jax(tensor: Tensor) -> "np.ndarray | jax.Array":
    if tensor.device.type == "cpu":
        return tensor.numpy()  # in a third of the time
    from jax.numpy import from_dlpack

    return from_dlpack(tensor.contiguous())


@dataclass
class SmaxConfig:
    """Schema of ``smax/<map>``: the settings of :class:`Smax`."""

    max_steps: int
    attack_mode: str
    enemy_shoots: bool
    see_enemy_actions: bool
    walls_cause_death: bool
    won_battle_bonus: float
    mask_dead: bool


class SmaxClass(TaskClass):
    """A battle as BenchMARL's task, with the allied units in one group ``agents``."""

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: DEVICE_TYPING
    ) -> Callable[[], EnvBase]:
        """A function that makes the battles."""
        config = copy.deepcopy(self.config)
        return lambda: Smax(self.name.lower(), **config, num_envs=num_envs, seed=seed, device=device)

    def supports_continuous_actions(self) -> bool:
        """No."""
        return False

    def supports_discrete_actions(self) -> bool:
        """Yes."""
        return True

    def max_steps(self, env: EnvBase) -> int:
        """One more than the key ``max_steps``, as JaxMARL counts."""
        return self.config["max_steps"] + 1

    def has_render(self, env: EnvBase) -> bool:
        """No."""
        return False

    def group_map(self, env: EnvBase) -> dict[str, list[str]]:
        """The allied units in one group."""
        n_agents = env.full_action_spec_unbatched["agents", "action"].shape[0]
        return {"agents": [f"ally_{i}" for i in range(n_agents)]}

    def observation_spec(self, env: EnvBase) -> Composite:
        """Observation [N, O] of the group."""
        return _of_agents(env, "observation")

    def action_spec(self, env: EnvBase) -> Composite:
        """Action [N] of the group."""
        return env.full_action_spec_unbatched

    def action_mask_spec(self, env: EnvBase) -> Composite | None:
        """Allowed actions [N, A] of the group."""
        return _of_agents(env, "action_mask")

    def state_spec(self, env: EnvBase) -> Composite | None:
        """JaxMARL's world state, [S]."""
        return Composite(state=env.full_observation_spec_unbatched["state"].clone())

    def info_spec(self, env: EnvBase) -> Composite | None:
        """Whether the battle was won."""
        return Composite(info=env.full_observation_spec_unbatched["info"].clone())

    @staticmethod
    def log_info(batch: TensorDictBase) -> dict[str, float]:
        """Shares of the episodes that ended in the batch: won, and out of time. Names are those of SMACv2's task."""
        ended = batch["next", "done"]
        shares = {"win_rate": ("next", "info", "battle_won"), "episode_limit_rate": ("next", "truncated")}
        return {f"collection/info/{name}": batch[key][ended].float().mean().item() for name, key in shares.items()}

    @staticmethod
    def evaluation_info(rollouts: list[TensorDictBase]) -> dict[str, Tensor]:
        """Of each evaluated episode, whether it was won, for
        :class:`~benchmarl_trust.runtime.evaluation.EvaluationInfo`.
        """
        return {"win_rate": torch.stack([rollout["next", "info", "battle_won"].any() for rollout in rollouts]).float()}

    @staticmethod
    def env_name() -> str:
        """The folder of the yaml files."""
        return "smax"


def _of_agents(env: EnvBase, key: str) -> Composite:
    spec = env.full_observation_spec_unbatched["agents"]
    return Composite(agents=Composite({key: spec[key].clone()}, shape=spec.shape))


class _SmaxTask(PackagedTask):
    """The battles, by map."""

    @staticmethod
    def associated_class() -> type[TaskClass]:
        """:class:`SmaxClass`."""
        return SmaxClass

    def schema(self) -> type:
        """The same for all maps."""
        return SmaxConfig


#: The battles, by map. Most names begin with a digit, which a class body does not allow: ``SmaxTask["5M_VS_6M"]``.
SmaxTask = cast(type[PackagedTask], _SmaxTask("SmaxTask", {name.upper(): None for name in MAPS}, module=__name__))
