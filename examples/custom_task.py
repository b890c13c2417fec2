"""A task of one's own: robots in VMAS that are paid for meeting, trained with HATRPO.

python examples/custom_task.py --iterations 40
"""

import argparse
import copy
from collections.abc import Callable

import torch
from benchmarl.environments.vmas.common import VmasClass
from benchmarl.experiment import Experiment
from benchmarl.models import MlpConfig
from torch import Tensor
from torchrl.envs import EnvBase, VmasEnv
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario

from benchmarl_trust import HatrpoConfig, experiment_config


class Meeting(BaseScenario):
    """Each robot sees itself and the way to the middle of the team; all are paid for being near it."""

    def make_world(self, batch_dim: int, device: torch.device, n_agents: int = 3, **kwargs) -> World:
        """A plane with the robots."""
        world = World(batch_dim, device)
        for i in range(n_agents):
            world.add_agent(Agent(name=f"robot_{i}", collide=False, u_multiplier=0.5))
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        """Somewhere, each by itself; None: in all environments."""
        shape = (self.world.batch_dim, 2) if env_index is None else (2,)
        for agent in self.world.agents:
            agent.set_pos(torch.rand(shape, device=self.world.device) * 2 - 1, batch_index=env_index)

    def reward(self, agent: Agent) -> Tensor:
        """Minus the mean distance from the middle, the same for all robots: [environments]."""
        positions = torch.stack([other.state.pos for other in self.world.agents])
        return -(positions - positions.mean(0)).norm(dim=-1).mean(0)

    def observation(self, agent: Agent) -> Tensor:
        """[environments, 6]."""
        middle = torch.stack([other.state.pos for other in self.world.agents]).mean(0)
        return torch.cat([agent.state.pos, agent.state.vel, middle - agent.state.pos], dim=-1)


class MeetingTask(VmasClass):
    """The scenario as a BenchMARL task. All but the environment itself is as in BenchMARL's VMAS tasks."""

    def get_env_fun(self, num_envs: int, continuous_actions: bool, seed: int | None, device) -> Callable[[], EnvBase]:
        """A function that makes the environment."""
        config = copy.deepcopy(self.config)
        return lambda: VmasEnv(
            scenario=Meeting(),
            num_envs=num_envs,
            continuous_actions=continuous_actions,
            seed=seed,
            device=device,
            categorical_actions=True,
            clamp_actions=True,
            **config,
        )


def make_experiment(iterations: int, frames: int = 3_000) -> Experiment:
    """BenchMARL's Experiment on the task."""
    config = experiment_config(
        "vmas_laptop",
        max_n_iters=iterations,
        max_n_frames=None,
        on_policy_collected_frames_per_batch=frames,
        on_policy_n_envs_per_worker=60,
        evaluation_interval=15_000,
    )
    return Experiment(
        task=MeetingTask(name="MEETING", config={"max_steps": 50, "n_agents": 3}),
        algorithm_config=HatrpoConfig.get_from_yaml(),
        model_config=MlpConfig.get_from_yaml(),
        seed=0,
        config=config,
    )


def main() -> None:
    """Train, and compare the first iteration with the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=40)
    experiment = make_experiment(parser.parse_args().iterations)
    experiment.run()
    file = experiment.folder_name / experiment.name / "scalars" / "collection_reward_episode_reward_mean.csv"
    returns = [float(row.split(",")[1]) for row in file.read_text().splitlines()]
    print(f"mean return {returns[0]:.2f} in the first iteration, {returns[-1]:.2f} in the last")


if __name__ == "__main__":
    main()
