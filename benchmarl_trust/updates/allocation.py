"""Who gets how much of the team's KL budget: equal shares, HATRPO-W's by KKT, HATRPO-G's by greed.

An allocation is asked for the next :class:`~benchmarl_trust.updates.natural.Turn` and told what it has cost
(:class:`~benchmarl_trust.updates.natural.Allocation`).
:mod:`benchmarl_trust.functional.kl_budget` has the formulas.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarl_trust import functional as F
from benchmarl_trust.policy import Agent
from benchmarl_trust.updates.natural import (
    LocalModel,
    Models,
    NaturalGradient,
    Proposal,
    StackedModel,
    Tensors,
    Turn,
    gradients_of,
)

#: Share of the iterations by which a direction is brought up to date when only the weight w(M) has changed.
REFINE = 0.4

#: How scores are estimated, see :func:`scores`.
SCORES = ("plugin", "split")


class UniformAllocation:
    """Each agent the same bound: HATRPO.

    Args:
        agents (sequence of Agent): the team.
        total (float): D, the sum of the bounds.
        solver (NaturalGradient): computes the directions.
        order (sequence of int): who moves when.
    """

    def __init__(self, agents: Sequence[Agent], total: float, solver: NaturalGradient, order: Sequence[int]):
        self.agents, self.order = agents, order
        self.kl_bound = F.uniform_budget(_like_scores(agents, 1.0).expand(len(agents)), total)[0]
        self.solver = solver

    def next(self, weight: Tensor, moved: list[int]) -> Turn:
        """The turn of the next in order."""
        i = self.order[len(moved)]
        model = LocalModel(self.agents[i], self.agents[i].data)
        objective, gradient = model.gradient(weight)
        proposal = self.solver([model], [gradient])
        return Turn(i, objective, proposal, self.kl_bound, proposal.score[0])

    def spend(self, kl: Tensor) -> None:
        """Nobody else has this agent's share."""


class KktAllocation:
    """HATRPO-W: scores of all agents at M = 1 decide the bounds before anybody moves.

    Separate policies keep the direction of that first solve as the start of their turn's, when their gradient has
    changed with M and their Fisher matrix has not; the turn adds REFINE times the iterations.

    Args:
        agents (sequence of Agent): the team.
        total (float): D, the team's budget.
        low (float): least bound of an agent.
        high (float): largest bound of an agent.
        solver (NaturalGradient): computes the directions.
        order (sequence of int, optional): who moves when; None: the largest score first.
        estimator (str): of the scores, see :func:`scores`.
    """

    def __init__(
        self,
        agents: Sequence[Agent],
        total: float,
        low: float,
        high: float,
        solver: NaturalGradient,
        order: Sequence[int] | None = None,
        estimator: str = "plugin",
    ):
        self.agents = agents
        self.solver = solver
        self._warm = not _shared(agents)
        self._proposals, found = [], []
        weight = torch.ones_like(agents[0].data["advantage"])
        one_by_one = ([LocalModel(agent, agent.data)] for agent in agents)  # so that only one graph is in memory
        for models in [StackedModel(agents)] if solver.stacks(agents) else one_by_one:
            proposal = solver(models, gradients_of(models, weight)[1])
            self._proposals += [proposal.of(k) for k in range(len(models))]
            found.append(scores(estimator, models, weight, solver, proposal))
        self.score = torch.cat(found)
        self.kl_bound = F.kkt_budget(self.score, total, low, high)
        self.order = self.score.argsort(descending=True).tolist() if order is None else order

    def next(self, weight: Tensor, moved: list[int]) -> Turn:
        """The turn of the next in order."""
        i = self.order[len(moved)]
        model = LocalModel(self.agents[i], self.agents[i].data)
        objective, gradient = model.gradient(weight)
        if self._warm:
            proposal = _refining(self.solver)([model], [gradient], self._proposals[i])
        else:
            proposal = self.solver([model], [gradient])
        return Turn(i, objective, proposal, self.kl_bound[i], self.score[i])

    def spend(self, kl: Tensor) -> None:
        """What an agent leaves of its share is not given to another."""


class GreedyAllocation:
    """HATRPO-G: before each turn all agents that have not moved are compared under the present M.

    Separate policies keep their graphs until their turn and bring their directions up to date by REFINE times the
    iterations: the gradient changes with M, the Fisher matrix does not. So memory grows with the number of agents. Once
    no candidate has a positive score, the rest take no step.

    Args:
        agents (sequence of Agent): the team.
        total (float): D, the team's budget.
        low (float): least bound of an agent.
        high (float): largest bound of an agent; what is left of D wins over ``low``.
        solver (NaturalGradient): computes the directions.
        order (sequence of int, optional): who moves when; None: the largest score first, compared before each turn.
        estimator (str): of the scores, see :func:`scores`.
        cap (float, optional): if given, δ = min(cap, what is left) in place of the agent's share.
    """

    def __init__(
        self,
        agents: Sequence[Agent],
        total: float,
        low: float,
        high: float,
        solver: NaturalGradient,
        order: Sequence[int] | None = None,
        estimator: str = "plugin",
        cap: float | None = None,
    ):
        self.agents = agents
        self.remaining = _like_scores(agents, total)
        self.low, self.high, self.cap = low, high, cap
        self.solver, self.estimator, self.order = solver, estimator, order
        self._shared = _shared(agents)
        self._models: Models | None = None
        self._proposal: Proposal | None = None

    def next(self, weight: Tensor, moved: list[int]) -> Turn:
        """The turn of the agent with the largest score, which is the largest predicted gain per KL; or of the next in
        the given order.
        """
        candidates = [i for i in range(len(self.agents)) if i not in moved]
        models, objectives, proposal, score = self._compare(candidates, weight)
        place = int(score.argmax()) if self.order is None else candidates.index(self.order[len(moved)])
        if self.cap is None:
            kl_bound = F.greedy_bound(score, place, self.remaining, self.low, self.high)
        else:
            kl_bound = self.remaining.clamp(min=0, max=self.cap)
        kl_bound = torch.where(score[place] > 0, kl_bound, 0)
        models.pop(place)
        self._proposal = proposal.without(place)
        return Turn(candidates[place], objectives[place], proposal.of(place), kl_bound, score[place])

    def _compare(self, candidates: list[int], weight: Tensor) -> tuple[Models, Tensors, Proposal, Tensor]:
        if self._shared or self._models is None:  # a step on shared parameters makes every model stale
            agents = [self.agents[i] for i in candidates]
            stacks = self.solver.stacks(agents)
            self._models = StackedModel(agents) if stacks else [LocalModel(agent, agent.data) for agent in agents]
            self._proposal = None
        models = self._models
        objectives, gradients = gradients_of(models, weight)
        solver = self.solver if self._proposal is None else _refining(self.solver)
        proposal = solver(models, gradients, self._proposal)
        return models, objectives, proposal, scores(self.estimator, models, weight, self.solver, proposal)

    def spend(self, kl: Tensor) -> None:
        """What the turn really cost leaves the budget."""
        self.remaining = self.remaining - kl


def scores(estimator: str, models: Models, weight: Tensor, solver: NaturalGradient, proposal: Proposal) -> Tensor:
    r"""What the agents can gain per root of KL, s, [n].

    ``plugin``: :math:`s = (g^T d)^2 / q` of the proposal itself. It is too large by about parameters / samples, and so
    favours agents with large networks.

    ``split``: :math:`s = \max(0, g_a^T (F + λI)^{-1} g_b)` with the gradients of the two halves of the batch, whose
    noise is nearly independent: batches are ordered by environment, so at most one trajectory is in both. It costs
    another solve.

    Source: reconstructed.
    """
    if estimator == "plugin":
        return proposal.score
    half = len(weight) // 2
    first, second = (gradients_of(models, weight, rows)[1] for rows in (slice(half), slice(half, None)))
    other = solver(models, second)
    found = torch.stack([g.double() @ d[: len(g)] for g, d in zip(first, other.direction, strict=True)])
    return torch.where(other.finite & found.isfinite(), found.clamp(min=0), 0)


def _refining(solver: NaturalGradient) -> NaturalGradient:
    return replace(solver, cg_iters=math.ceil(REFINE * solver.cg_iters))


def _like_scores(agents: Sequence[Agent], value: float) -> Tensor:
    """A scalar as scores are: float64, on the agents' device, without a copy from the host."""
    return torch.full((), value, dtype=torch.float64, device=agents[0].data["advantage"].device)


def _shared(agents: Sequence[Agent]) -> bool:
    return len({id(agent.policy.parameters[0]) for agent in agents}) < len(agents)
