"""Which agents form a team, through which the compound ratio runs."""

import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig
from benchmarl.experiment import Experiment
from tensordict import TensorDictBase
from torch import Tensor

from benchmarl_trust.algorithms.checks import refuse


class Teams:
    """The teams of an experiment: groups that were put together, and every other group by itself.

    Args:
        asked (list of list of str, optional): groups that form one team; None: each group is its own team.
        experiment (Experiment): whose groups they are.
        group_map (dict): the agents of each group.

    Raises:
        ValueError: if the teams do not fit the groups.
    """

    def __init__(self, asked: list[list[str]] | None, experiment: Experiment, group_map: dict[str, list[str]]):
        self.experiment, self.group_map = experiment, group_map
        teams = [list(team) for team in asked or []]
        named = [group for team in teams for group in team]
        if teams and isinstance(experiment.algorithm_config, EnsembleAlgorithmConfig):
            raise ValueError(
                "algorithm.teams cannot be used in an ensemble, where every group has an algorithm of its own: give "
                "all groups of the team one algorithm, or leave teams at null."
            )
        unknown = sorted(set(named) - set(group_map))
        if unknown:
            raise ValueError(f"algorithm.teams names {unknown}; the groups of this task are {list(group_map)}.")
        if len(set(named)) < len(named):
            refuse("teams", teams, "a group can be in one team only.")
        self.teams = teams + [[group] for group in group_map if group not in named]

    def of(self, group: str) -> list[str]:
        """The groups of the group's team."""
        return next(team for team in self.teams if group in team)

    def size(self, team: list[str]) -> int:
        """The number of its agents."""
        return sum(len(self.group_map[group]) for group in team)

    def ends_with(self, group: str) -> bool:
        """Whether the group is the last of its team that BenchMARL trains in an iteration."""
        return group == [name for name in self.experiment.train_group_map if name in self.of(group)][-1]

    def check_rewards(self, batch: TensorDictBase) -> None:
        """One joint advantage needs one joint reward: compare the groups of each team, in every batch, by what those
        present are paid.
        """
        for team in self.teams:
            missing = [group for group in team if group not in self.experiment.train_group_map]
            if missing and len(team) > 1:
                raise ValueError(
                    f"algorithm.teams: of the team {'+'.join(team)} the group {missing[0]} is not trained; a team's "
                    "compound ratio needs all of its groups. Take it out of the team, or train it."
                )
            first, *others = (_paid(group, batch) for group in team)
            for group, other in zip(team[1:], others, strict=True):
                if first is None or other is None:
                    continue  # a reward at the root belongs to all groups
                (one, here), (two, there) = first, other
                if not torch.allclose(one[here & there], two[here & there], rtol=1e-4, atol=1e-5):
                    raise ValueError(
                        f"algorithm.teams: the groups {team[0]} and {group} are paid differently (their mean rewards "
                        "differ in the collected batch), so they have no joint advantage. Put only groups with the "
                        "same reward into a team."
                    )


def _paid(group: str, batch: TensorDictBase) -> tuple[Tensor, Tensor] | None:
    """The mean reward of the group's agents that are present, and where any is, both [*, 1]."""
    reward = batch.get(("next", group, "reward"), None)
    if reward is None:
        return None
    mask = batch.get((group, "mask"), torch.ones_like(reward[..., 0], dtype=torch.bool)).unsqueeze(-1)
    total = torch.where(mask, reward, 0).sum(-2)
    return total / mask.sum(-2).clamp(min=1), mask.any(-2)
