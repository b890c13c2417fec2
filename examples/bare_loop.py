"""Runs exported policies in a plain VMAS environment: BenchMARL, TorchRL, tensordict and this package are not imported.

    python -m benchmarl.run algorithm=mars task=vmas/balance experiment=vmas_laptop experiment.checkpoint_at_end=True
    python -m benchmarl_trust.export outputs/<day>/<time>/<run>/checkpoints/latest.pt --out policies
    python examples/bare_loop.py policies

prints the mean return, over agents and environments, of one episode in each environment. docs/export.md explains it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from vmas import make_env
from vmas.simulator.environment import Environment

Policies = dict[str, tuple[Callable, dict]]


def load(folder: Path) -> Policies:
    """Each agent's policy, and what its JSON file says; a shared policy is the same one for several agents."""
    policies = {}
    for file in sorted(folder.glob("*.pt2")):
        description = json.loads(file.with_name(f"{file.name}.json").read_text())
        policies |= dict.fromkeys(description["agents"], (torch.export.load(file).module(), description))
    return policies


def environment(policies: Policies, envs: int) -> Environment:
    """The environment that the policies were trained in, made by VMAS itself."""
    _, description = next(iter(policies.values()))
    return make_env(
        scenario=description["task"].removeprefix("vmas/"),
        num_envs=envs,
        continuous_actions="low" in description["outputs"][0],
        clamp_actions=True,
        **description["task_config"],
    )


@torch.no_grad()
def episode(policies: Policies, env: Environment, seed: int) -> Tensor:
    """The return of each agent in each environment up to its first end, [N, B]."""
    observations = env.reset(seed=seed)
    states = [first_state(policies[agent.name][1], env.num_envs) for agent in env.agents]
    returns, going = torch.zeros(len(env.agents), env.num_envs), torch.ones(env.num_envs, dtype=torch.bool)
    while going.any():
        actions = []
        for i, agent in enumerate(env.agents):
            action, *states[i] = policies[agent.name][0](observations[i], *states[i])
            actions.append(action if action.ndim > 1 else action.unsqueeze(-1))  # VMAS wants discrete ones as [B, 1]
        observations, rewards, done, _ = env.step(actions)
        returns += going * torch.stack(rewards)
        going &= ~done
    return returns


def first_state(description: dict, batch: int) -> list[Tensor]:
    """The state before the first step: zeros, if the policy has one."""
    return [torch.zeros(batch, *entry["shape"][1:]) for entry in description["inputs"] if entry["kind"] == "state"]


def main() -> None:
    """Run the policies of a folder, and say what they earn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the policies of all agents are")
    parser.add_argument("--envs", type=int, default=60, help="environments; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the environments; default: %(default)s")
    arguments = parser.parse_args()
    policies = load(arguments.folder)
    if not policies:
        parser.error(f"there is no .pt2 file in {arguments.folder}")
    returns = episode(policies, environment(policies, arguments.envs), arguments.seed)
    print(f"mean return {returns.mean():.4f} of {len(policies)} agents in {arguments.envs} environments")


if __name__ == "__main__":
    main()
