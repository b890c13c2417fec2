"""MaMuJoCo: the joints of one robot, divided among agents that share its reward; ``mamujoco/<robot>_<partition>``.

The suite is ``mamujoco_v1`` of Gymnasium-Robotics, on the robots of Gymnasium (v5). Its packages come with the extra
``mamujoco`` and are imported when an environment is built.
"""

import copy
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import numpy as np
from benchmarl.environments import TaskClass
from benchmarl.experiment import ExperimentConfig
from benchmarl.utils import DEVICE_TYPING
from torch import Tensor
from torchrl.data import Composite
from torchrl.envs import EnvBase

from benchmarl_trust.environments.padded import GROUP, PaddedEnv
from benchmarl_trust.environments.task import PackagedTask

if TYPE_CHECKING:
    import gymnasium
    from pettingzoo import ParallelEnv

#: The library's own partitions, by robot. Robots of many segments have any <agents>x<segments of each>.
PARTITIONS = {
    "Ant": ("2x4", "2x4d", "4x2"),
    "CoupledHalfCheetah": ("1p1",),
    "HalfCheetah": ("2x3", "6x1"),
    "Hopper": ("3x1",),
    "Humanoid": ("9|8",),
    "HumanoidStandup": ("9|8",),
    "ManySegmentAnt": (),
    "ManySegmentSwimmer": (),
    "Pusher": ("3p",),
    "Reacher": ("2x1",),
    "Swimmer": ("2x1",),
    "Walker2d": ("2x3",),
}
_MANY_SEGMENTS = {"ManySegmentAnt": "Ant", "ManySegmentSwimmer": "Swimmer"}
_NO_EXTRA = 'MaMuJoCo is not installed. Run pip install "benchmarl_trust[mamujoco]".'
_NO_OPENGL = (
    "MuJoCo cannot render: it found neither a display nor OpenGL without one. Install EGL (on Debian and Ubuntu "
    "apt-get install libegl1 libgl1) or OSMesa (libosmesa6) and set the environment variable MUJOCO_GL to egl or "
    "osmesa, or run with experiment.render=False."
)


class MamujocoEnv(PaddedEnv):
    """A robot of MaMuJoCo, as :class:`~benchmarl_trust.environments.padded.PaddedEnv`.

    An episode terminates when the robot is unhealthy, where the robot knows that, and is truncated at ``max_steps``.

    Args:
        scenario (str): the robot, a key of :data:`PARTITIONS`.
        agent_conf (str, optional): the library's name of a partition, see :data:`PARTITIONS`.
        agent_factorization (list of list of str, optional): the joints of each agent, by name; in place of
            ``agent_conf``, which of robots of many segments then says how many there are.
        agent_obsk (int, optional): an agent sees its own joints, and of others those up to so many joints away; None:
            the robot's whole observation, and which agent it is, as in the published code of HAPPO and HATRPO.
        max_steps (int): where an episode is truncated.
        num_envs (int, optional): how many robots there are, which is the batch size; None: one, without batch size.
        seed (int, optional): what the seeds of the first resets follow from; a robot without batch size takes it.
        device (torch.device, str or int): where tensors are put.

    Raises:
        ImportError: without the extra.
        ValueError: on a bad setting, with the key of the task that is to be changed.

    Examples:
        >>> env = MamujocoEnv("Hopper", "3x1", None, 1, 1000, num_envs=20, seed=0)  # doctest: +SKIP
        >>> env.reset()["agents", "observation"].shape  # doctest: +SKIP
        torch.Size([20, 3, 9])
    """

    def __init__(
        self,
        scenario: str,
        agent_conf: str | None,
        agent_factorization: list[list[str]] | None,
        agent_obsk: int | None,
        max_steps: int,
        num_envs: int | None = None,
        seed: int | None = None,
        device: DEVICE_TYPING = "cpu",
    ):
        whole = agent_obsk is None  # the library would make one agent of all
        obsk = 0 if agent_obsk is None else agent_obsk
        _check(scenario, agent_conf, agent_factorization, obsk, max_steps)
        robots = [
            _suite(scenario, agent_conf, agent_factorization, obsk, max_steps)
            for _ in range(1 if num_envs is None else num_envs)
        ]
        super().__init__(robots, seed, device, whole=whole, batched=num_envs is not None)

    def render(self) -> np.ndarray:
        """A picture of the first robot, [height, width, 3].

        Raises:
            RuntimeError: where there is no OpenGL.
        """
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # what MuJoCo looks at when it renders first
        try:
            return cast(np.ndarray, self._copies[0].render())
        except Exception as error:  # what OpenGL's backends raise is of many kinds
            raise RuntimeError(_NO_OPENGL) from error


def _check(scenario: str, conf: str | None, factorization: list[list[str]] | None, obsk: int, max_steps: int) -> None:
    if scenario not in PARTITIONS:
        raise ValueError(f"task.scenario={scenario} must be one of {', '.join(PARTITIONS)}.")
    for key, value, least in (("agent_obsk", obsk, 0), ("max_steps", max_steps, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"task.{key}={value} must be a whole number, {least} or more.")
    if scenario in _MANY_SEGMENTS:
        parts = str(conf).split("x")
        numbers = [int(part) for part in parts if part.isdecimal()]
        if len(parts) != 2 or len(numbers) != 2 or math.prod(numbers) < 2:
            raise ValueError(
                f"task.agent_conf={conf} must be <agents>x<segments of each> for {scenario}, two segments or more, "
                "such as task.agent_conf=10x2."
            )
        return
    if factorization is None and conf not in PARTITIONS[scenario]:
        raise ValueError(
            f"task.agent_conf={conf} must be one of {', '.join(PARTITIONS[scenario])} for {scenario}; for any other "
            "partition set task.agent_factorization to lists of its joints."
        )
    if factorization is not None and conf is not None:
        raise ValueError(
            f"task.agent_conf={conf} and task.agent_factorization={factorization} both divide the joints: set one of "
            "them to null."
        )


def _suite(
    scenario: str, conf: str | None, factorization: list[list[str]] | None, obsk: int, max_steps: int
) -> "ParallelEnv":
    _quiet()
    try:
        from gymnasium_robotics import mamujoco_v1
        from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges
    except ImportError as error:
        raise ImportError(_NO_EXTRA) from error
    known = conf or PARTITIONS[scenario][0]
    parts, edges, whole = get_parts_and_edges(scenario, known)
    if factorization is not None:
        parts = _regroup(scenario, [joint for part in parts for joint in part], factorization)
    return mamujoco_v1.parallel_env(
        scenario,
        known,
        agent_obsk=obsk,
        agent_factorization={"partition": parts, "edges": edges, "globals": whole},
        gym_env=_robot(scenario, known, max_steps),
    )


def _quiet() -> None:
    """Gymnasium-Robotics prints a notice on a robot's hand, which is not here, in every process that imports it."""
    try:
        from farama_notifications import notifications
    except ImportError:
        return
    notifications.pop("gymnasium_robotics", None)


def _regroup(scenario: str, joints: list, factorization: list[list[str]]) -> list[tuple]:
    named = {joint.label: joint for joint in joints}
    try:
        chosen = [name for part in factorization for name in part]
        fits = sorted(chosen) == sorted(named) and all(factorization)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(
            f"task.agent_factorization={factorization} must be a list of joints for each agent, with all of "
            f"{scenario}'s once: {', '.join(named)}."
        )
    return [tuple(named[name] for name in part) for part in factorization]


def _robot(scenario: str, conf: str, max_steps: int) -> "gymnasium.Env":
    """What MaMuJoCo would make itself, with an episode of our length and without Gymnasium's checks of each step."""
    import gymnasium
    from gymnasium.wrappers import TimeLimit
    from gymnasium_robotics.envs.multiagent_mujoco import coupled_half_cheetah, many_segment_ant, many_segment_swimmer

    settings = {"max_episode_steps": max_steps, "render_mode": "rgb_array", "disable_env_checker": True}
    if scenario == "CoupledHalfCheetah":
        return TimeLimit(coupled_half_cheetah.CoupledHalfCheetahEnv("rgb_array"), max_steps)
    if scenario not in _MANY_SEGMENTS:
        return gymnasium.make(f"{scenario}-v5", **settings)
    agents, segments = map(int, conf.split("x"))
    module = many_segment_ant if scenario == "ManySegmentAnt" else many_segment_swimmer
    with TemporaryDirectory() as folder:  # MaMuJoCo's own file has one name for all processes, which delete it
        file = str(Path(folder) / "robot.xml")
        module.gen_asset(n_segs=agents * segments, asset_path=file)
        return gymnasium.make(f"{_MANY_SEGMENTS[scenario]}-v5", xml_file=file, **settings)


@dataclass
class MamujocoConfig:
    """Schema of the tasks: the settings of :class:`MamujocoEnv`, and whether it has all robots or each has its own."""

    scenario: str
    agent_conf: str | None
    agent_factorization: list[list[str]] | None
    agent_obsk: int | None
    max_steps: int
    vectorized: bool


class MamujocoClass(TaskClass):
    """One of the robots as BenchMARL's task, with its agents in one group ``agents`` and its state."""

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: DEVICE_TYPING
    ) -> Callable[[], EnvBase]:
        """A function that makes the robots, with seeds that follow from ``seed``.

        Without ``task.vectorized`` it makes one, each time with another seed. In processes of their own
        (``experiment.parallel_collection``) copies of the function begin alike: there
        ``examples/parallel_collection.py`` gives each robot its seed.
        """
        config, seeds = copy.deepcopy(self.config), np.random.SeedSequence(seed)
        if config.pop("vectorized"):
            return partial(MamujocoEnv, **config, num_envs=num_envs, seed=seed, device=device)

        def make() -> MamujocoEnv:
            (own,) = seeds.spawn(1)
            return MamujocoEnv(**config, seed=int(own.generate_state(1)[0]), device=device)

        return make

    def check_keys(self, experiment: ExperimentConfig) -> None:
        """Look at what must be known before the robots are made.

        Raises:
            ValueError: on processes that BenchMARL would not start, since it starts none for a vectorized task.
        """
        vectorized = self.config["vectorized"]
        if not isinstance(vectorized, bool):
            raise ValueError(f"task.vectorized={vectorized} must be True or False. The usual value is True.")
        if vectorized and experiment.parallel_collection:
            raise ValueError(
                "experiment.parallel_collection=True: the robots of a vectorized task take turns in one process. Run "
                "examples/parallel_collection.py with task.vectorized=False, or with "
                "experiment.parallel_collection=False."
            )

    def supports_continuous_actions(self) -> bool:
        """Yes."""
        return True

    def supports_discrete_actions(self) -> bool:
        """No."""
        return False

    def max_steps(self, env: EnvBase) -> int:
        """Those of the configuration."""
        return self.config["max_steps"]

    def has_render(self, env: EnvBase) -> bool:
        """Yes, with OpenGL."""
        return True

    def check_render(self, env: EnvBase) -> None:
        """Draw one picture; BenchMARL would draw the first after it has collected and trained.

        Raises:
            ValueError: where there is no OpenGL.
        """
        try:
            cast(MamujocoEnv, env).render()
        except RuntimeError as error:
            raise ValueError(f"experiment.render=True: {error}") from error

    def group_map(self, env: EnvBase) -> dict[str, list[str]]:
        """All agents in one group."""
        return {GROUP: [f"agent_{i}" for i in range(len(self.executed_actions(env)[GROUP]))]}

    def executed_actions(self, env: EnvBase) -> dict[str, Tensor]:
        """Of each group which entries of its actions an agent has, boolean [N, D]; the rest is padding.

        The algorithms of this package ask a task for this where it has the method.
        """
        return {GROUP: cast(Tensor, env.executed)}

    def observation_spec(self, env: EnvBase) -> Composite:
        """Observation [N, O] of the group."""
        return Composite({GROUP: env.full_observation_spec_unbatched[GROUP].clone()})

    def action_spec(self, env: EnvBase) -> Composite:
        """Action [N, D] of the group."""
        return env.full_action_spec_unbatched

    def state_spec(self, env: EnvBase) -> Composite | None:
        """The robot's observation as a whole, [S]."""
        return Composite({"state": env.full_observation_spec_unbatched["state"].clone()})

    def info_spec(self, env: EnvBase) -> Composite | None:
        """None."""
        return None

    def action_mask_spec(self, env: EnvBase) -> Composite | None:
        """None."""
        return None

    @staticmethod
    def env_name() -> str:
        """The folder of the yaml files."""
        return "mamujoco"


class MamujocoTask(PackagedTask):
    """The robots with their partitions, by name.

    Examples:
        >>> MamujocoTask.HALFCHEETAH_6X1.get_from_yaml().config["agent_conf"]
        '6x1'
    """

    HALFCHEETAH_2X3 = None
    HALFCHEETAH_6X1 = None
    ANT_2X4 = None
    ANT_4X2 = None
    ANT_8X1 = None
    WALKER2D_2X3 = None
    WALKER2D_3X2 = None
    WALKER2D_6X1 = None
    HOPPER_3X1 = None
    HUMANOID_9_8 = None
    HUMANOID_17X1 = None
    SWIMMER_10X2 = None
    REACHER_2X1 = None
    COUPLEDHALFCHEETAH = None

    @staticmethod
    def associated_class() -> type[TaskClass]:
        """:class:`MamujocoClass`."""
        return MamujocoClass

    def schema(self) -> type:
        """One for all."""
        return MamujocoConfig
