r"""One agent's natural-gradient step: a direction times a search along it, under a bound on the KL divergence.

.. math:: (F + λI) d = g, \qquad q = d^T (F + λI) d, \qquad Δ = \sqrt{2δ / q}\; d, \qquad s = (g^T d)^2 / q

g is the gradient of the surrogate (:func:`~benchmarl_trust.policy.surrogate_of` with the gain r A) and F the Hessian of
the mean KL (:func:`~benchmarl_trust.policy.kl_of`) where the agent stands;
:func:`~benchmarl_trust.functional.line_search` walks back from Δ.
√(2 s δ) is what the step is to gain.

Shapes: n agents, P parameters each (padded with zeros to the largest), [*] the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarl_trust import functional as F
from benchmarl_trust.policy import (
    Agent,
    AgentPolicy,
    StackedPolicy,
    forward,
    kl_of,
    kl_product_of,
    log_ratio_of,
    old_outputs,
    surrogate_of,
)

Other = TypeVar("Other")


class NaturalInfo(NamedTuple):
    """What a natural step leaves behind: scalars on the agent's device, not finite if the gradient or curvature was.

    Attributes:
        loss (Tensor): -J before the step.
        grad_norm (Tensor): of g.
        kl_bound (Tensor): δ, what the agent was allocated, in nats.
        kl_spent (Tensor): KL(old ‖ after), for shared parameters what the turn has added to the joint one (a step back
            towards the old policy gives a negative number); 0 if the step was rejected.
        score (Tensor): s.
        step_size (Tensor): √(2δ/q), the length of the natural-gradient step.
        accepted_fraction (Tensor): of Δ, 0 if rejected.
        backtracks (Tensor): fractions that failed.
        rejected (Tensor): 1 if no fraction was accepted.
        gain_predicted (Tensor): fraction · gᵀΔ.
        gain_realised (Tensor): J after - J before.
        cg_residual (Tensor): ‖g - (F + λI) d‖ / ‖g‖.
    """

    loss: Tensor
    grad_norm: Tensor
    kl_bound: Tensor
    kl_spent: Tensor
    score: Tensor
    step_size: Tensor
    accepted_fraction: Tensor
    backtracks: Tensor
    rejected: Tensor
    gain_predicted: Tensor
    gain_realised: Tensor
    cg_residual: Tensor


class LocalModel:
    r"""An agent's surrogate to first order and its KL to second, where its policy stands.

    The Fisher product is Gauss-Newton's, exact for a KL: :math:`F v = J^T H (J v)` with J the Jacobian of the
    distribution's parameters and H the Hessian of the mean KL in them, which has a closed form
    (:func:`~benchmarl_trust.policy.kl_product_of`). The network's graph is built once: J v is the derivative of Jᵀu,
    linear in u, along v. That takes four matrix products per layer where the double backward of the KL takes six, and
    needs no second derivative of the network.

    Args:
        agent (Agent): its policy.
        data (TensorDict): its data, [*].
    """

    def __init__(self, agent: Agent, data: TensorDict):
        self.policy = agent.policy
        self.data = data
        with torch.enable_grad():
            outputs = agent.policy.forward(cast(TensorDict, data["inputs"]).copy())
            self._moving = [i for i, output in enumerate(outputs) if output.requires_grad]  # an action mask does not
            self._roots = tuple(outputs[i] for i in self._moving)
            self._duals = tuple(torch.zeros_like(root, requires_grad=True) for root in self._roots)
            self._pulled_back = self.policy.gradient(self._roots, self._duals, create_graph=True)
        self._here = tuple(output.detach() for output in outputs)
        self._kl_product = kl_product_of(agent.policy, self._here, data)

    def gradient(self, weight: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """J on the given rows under w(M), and its gradient [P]."""
        leaves = tuple(root.detach().requires_grad_() for root in self._roots)
        with torch.enable_grad():
            outputs = tuple(output[rows] for output in self._placed(self._here, leaves))
            objective = self._objective(outputs, cast(TensorDict, self.data[rows]), weight[rows])
            slope = _grad(objective.sum(), leaves)
        return objective.detach(), self.policy.gradient(self._roots, slope, retain_graph=True)

    def fisher_product(self, vector: Tensor) -> Tensor:
        """F v, [P]."""
        pushed = _grad(self._pulled_back, self._duals, vector, retain_graph=True)
        curved = self._kl_product(self._placed([None] * len(self._here), pushed))
        return self.policy.gradient(self._roots, tuple(curved[i] for i in self._moving), retain_graph=True)

    def _objective(self, outputs: tuple[Tensor, ...], data: TensorDict, weight: Tensor) -> Tensor:
        return objective_of(self.policy, outputs, data, weight)

    def _placed(self, among: Sequence[Other], values: Sequence[Tensor]) -> list[Other | Tensor]:
        """Values for those of the distribution's parameters that move, among those for all."""
        placed: list[Other | Tensor] = list(among)
        for i, value in zip(self._moving, values, strict=True):
            placed[i] = value
        return placed


class StackedModel(LocalModel):
    """The local models of all agents of a group at once, of a policy that is stacked by agent.

    J is [n], vectors are [n, P], a row for each agent that has not been taken out. Those that have are computed all the
    same: for a GPU it is the number of operations that counts.

    Args:
        agents (sequence of Agent): all of the group, in its order.
    """

    def __init__(self, agents: Sequence[Agent]):
        stack = cast(StackedPolicy, agents[0].policy.stack)  # the caller has asked NaturalGradient.stacks
        data = stack.columns(agents)
        super().__init__(Agent(cast(AgentPolicy, stack), None, data), data)  # which asks no more than a stack can
        self._in = list(range(len(agents)))
        self._size = len(agents)

    def __len__(self) -> int:
        return len(self._in)

    def pop(self, place: int) -> None:
        """Take one out."""
        self._in.pop(place)

    def gradient(self, weight: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """J on the given rows under w(M), [n], and its gradients [n, P]."""
        objective, gradient = super().gradient(weight, rows)
        return self._taken(objective), self._taken(gradient)

    def fisher_product(self, vector: Tensor) -> Tensor:
        """F v of each, [n, P]."""
        if len(self) < self._size:
            nothing = torch.zeros_like(vector[0])
            own = dict(zip(self._in, vector, strict=True))
            vector = torch.stack([own.get(i, nothing) for i in range(self._size)])
        return self._taken(super().fisher_product(vector))

    def _taken(self, values: Tensor) -> Tensor:
        return values if len(self) == self._size else torch.stack([values[i] for i in self._in])

    def _objective(self, outputs: tuple[Tensor, ...], data: TensorDict, weight: Tensor) -> Tensor:
        x = log_ratio_of(self.policy.head, outputs, data)
        gain = F.weighted_gain("linear", x, data["advantage"], weight.unsqueeze(-1), 1.0, None)
        return F.mean_of_each(gain, data.get("mask", None))


#: Local models of several agents: one by one, or all at once.
Models = list[LocalModel] | StackedModel
#: One for each of them: apart, or as rows.
Tensors = Sequence[Tensor] | Tensor


def gradients_of(models: Models, weight: Tensor, rows: slice = slice(None)) -> tuple[Tensors, Tensors]:
    """J of each model and its gradient, see :meth:`LocalModel.gradient`."""
    if isinstance(models, StackedModel):
        return models.gradient(weight, rows)
    objectives, gradients = zip(*(model.gradient(weight, rows) for model in models), strict=True)
    return objectives, gradients


def objective_of(policy: AgentPolicy, outputs: tuple[Tensor, ...], data: TensorDict, weight: Tensor) -> Tensor:
    """J = mean(w(M) r A): a natural step bounds the KL, so its gain has no trust region of its own."""
    return surrogate_of(policy, outputs, data, weight, "linear", 1.0)


def _grad(values, inputs, weights=None, **kwargs) -> tuple[Tensor, ...]:
    """torch.autograd.grad, with zeros for what ``values`` do not depend on."""
    return torch.autograd.grad(values, inputs, weights, materialize_grads=True, **kwargs)


class Proposal(NamedTuple):
    """Directions of n agents, each [n, P] in float64."""

    gradient: Tensor
    direction: Tensor
    residual: Tensor
    finite: Tensor
    """[n]."""

    @property
    def product(self) -> Tensor:
        """(F + λI) d."""
        return self.gradient - self.residual

    @property
    def curvature(self) -> Tensor:
        """q, [n]."""
        return (self.direction * self.product).sum(-1)

    @property
    def score(self) -> Tensor:
        """s, [n]; 0 where there is no direction to go."""
        slope = (self.gradient * self.direction).sum(-1).clamp(min=0)
        usable = self.finite & (self.curvature > 0)
        return torch.where(usable, slope.square() / self.curvature, 0)

    def of(self, place: int) -> "Proposal":
        """That of one of the agents, n = 1."""
        return Proposal(*(value[place : place + 1] for value in self))

    def without(self, place: int) -> "Proposal":
        """Those of the others."""
        return Proposal(*(torch.cat([value[:place], value[place + 1 :]]) for value in self))


@dataclass
class NaturalGradient:
    """Directions of steepest ascent in the KL metric, by conjugate gradients for several agents at once.

    The network's products are of its own type; the vectors of the solve are float64. With float32 vectors ten
    iterations lose conjugacy by 1e-2 in place of 5e-4, and rounding moves the solution by 2e-4 in place of 1e-5
    (``benchmarks/natural_update.py --precision``). Both are small beside what ten iterations leave unsolved, but
    float64 costs next to nothing.

    Products of several agents are taken one by one on a CPU, where one for all at once is slower (the same script,
    ``--products``), and at once on a GPU, if the agents are those of a stacked policy.
    Recurrent models need no special route: TorchRL's cells are plain operations, with derivatives of all orders.

    Args:
        cg_iters (int): iterations of conjugate gradients.
        cg_damping (float): λ.
        cg_tolerance (float): a solve is done at ‖residual‖² < tolerance · ‖g‖².
        stacked (bool, optional): whether to take products of several agents at once, where that can be; None: on a GPU.
    """

    cg_iters: int = 10
    cg_damping: float = 0.1
    cg_tolerance: float = 1e-10
    stacked: bool | None = None

    def stacks(self, agents: Sequence[Agent]) -> bool:
        """Whether these agents are to be solved for with a :class:`StackedModel`."""
        stack = agents[0].policy.stack
        if stack is None or [(a.policy.stack, a.policy.index) for a in agents] != [
            (stack, i) for i in range(len(agents))
        ]:
            return False
        whole = len(agents) == len(stack.parameters[0])
        return whole and (agents[0].data["advantage"].is_cuda if self.stacked is None else self.stacked)

    def __call__(self, models: Models, gradients: Tensors, start: Proposal | None = None) -> Proposal:
        """Solve for n agents.

        Args:
            models (sequence of LocalModel, or StackedModel): of the agents.
            gradients (sequence of Tensor): g of each.
            start (Proposal, optional): directions for other gradients of the same models, to start from.
        """
        size = max(len(gradient) for gradient in gradients) if start is None else start.direction.shape[-1]

        def stacked(vectors: Sequence[Tensor]) -> Tensor:
            padded = [v if len(v) == size else torch.nn.functional.pad(v, (0, size - len(v))) for v in vectors]
            return padded[0].unsqueeze(0) if len(padded) == 1 else torch.stack(padded)

        def matvec(vectors: Tensor) -> Tensor:
            own = vectors.to(gradients[0].dtype)
            if isinstance(models, StackedModel):
                products = models.fisher_product(own)
            else:
                rows = zip(models, own, gradients, strict=True)
                products = stacked([model.fisher_product(v[: len(g)]) for model, v, g in rows])
            return torch.add(products, vectors, alpha=self.cg_damping)

        g = gradients.double() if isinstance(gradients, Tensor) else stacked(gradients).double()
        warm = None if start is None else (start.direction, start.product)
        solution = F.conjugate_gradient(matvec, g, self.cg_iters, self.cg_tolerance, start=warm)
        return Proposal(g, solution.x, solution.residual, solution.finite)


class Turn(NamedTuple):
    """What an allocation gives to the agent whose turn it is."""

    agent: int
    """Whose it is."""
    objective: Tensor
    """J before the step."""
    proposal: Proposal
    """Its direction, n = 1."""
    kl_bound: Tensor
    """δ."""
    score: Tensor
    """The s that decided δ."""


class Allocation(Protocol):
    """Who moves next, how far; see :mod:`benchmarl_trust.updates.allocation`."""

    def next(self, weight: Tensor, moved: list[int]) -> Turn:
        """The next turn, given w(M) [*] and the agents that have moved."""
        ...

    def spend(self, kl: Tensor) -> None:
        """What that turn has cost of the KL budget, in nats."""


@dataclass
class NaturalStep:
    """The natural-gradient step, for :func:`~benchmarl_trust.updates.sweep`: ``sweep(agents, step.choose, step)``.

    Where agents share their parameters the step of one moves all. What a turn costs is then what it adds to their joint
    KL from the old policies, Σ KL(old ‖ now), so that after a sweep that is at most the sum of the bounds.

    Args:
        agents (sequence of Agent): the team.
        allocation (Allocation): says whose turn it is, along which direction and how far.
        ls_step (int): fractions that the line search tries.
        accept_ratio (float): share of the predicted gain that must be realised.
        backtrack_coeff (float): from one fraction to the next.
    """

    agents: Sequence[Agent]
    allocation: Allocation
    ls_step: int = 10
    accept_ratio: float = 0.5
    backtrack_coeff: float = 0.8

    def choose(self, weight: Tensor, moved: list[int]) -> int:
        """The next agent, as the allocation has it."""
        self._turn = self.allocation.next(weight, moved)
        return self._turn.agent

    def __call__(self, agent: Agent, data: TensorDict, weight: Tensor, place: float = 1.0) -> NaturalInfo:
        """Move the agent that was chosen."""
        turn = self._turn
        gradient, direction = turn.proposal.gradient.squeeze(0), turn.proposal.direction.squeeze(0)
        curvature = turn.proposal.curvature.squeeze(0)
        step_size = torch.where(curvature > 0, (2 * turn.kl_bound / curvature).sqrt(), 0)
        # No trial is made along what is left of a solve that broke, so that nothing is spent or reported as gained.
        expected = torch.where(turn.proposal.finite.squeeze(0), step_size * (gradient * direction).sum(), 0)
        search = F.line_search(
            agent.policy.parameters,
            agent.policy.unflatten(step_size * direction),
            self._evaluate(agent, data, weight, turn.objective),
            expected,
            turn.kl_bound,
            self.ls_step,
            self.accept_ratio,
            self.backtrack_coeff,
        )
        self.allocation.spend(search.kl)
        rejected = ((search.trials > 0) & (search.fraction == 0)).to(expected.dtype)
        norm = gradient.norm()
        residual = torch.where(norm > 0, turn.proposal.residual.norm() / norm, norm)
        return NaturalInfo(
            loss=-turn.objective,
            grad_norm=norm,
            kl_bound=turn.kl_bound,
            kl_spent=search.kl,
            score=turn.score,
            step_size=step_size,
            accepted_fraction=search.fraction,
            backtracks=(search.trials - 1 + rejected).clamp(min=0),
            rejected=rejected,
            gain_predicted=search.fraction * expected,
            gain_realised=search.gain,
            cg_residual=torch.where(turn.proposal.finite.squeeze(0), residual, torch.nan),
        )

    def _evaluate(self, agent: Agent, data: TensorDict, weight: Tensor, objective: Tensor):
        """A function that gives, at the parameters of the moment, the gain and the KL that the turn has added."""
        sharing = [other for other in self.agents if other.policy.parameters[0] is agent.policy.parameters[0]]

        def joint_kl(outputs: list[tuple[Tensor, ...]]) -> Tensor:
            rows = zip(sharing, outputs, strict=True)
            return torch.stack([kl_of(a.policy, old_outputs(a.data), now, a.data) for a, now in rows]).sum()

        alone = len(sharing) == 1  # then the turn begins at the old policy
        before = 0.0 if alone else joint_kl([forward(other, other.data) for other in sharing])

        def evaluate() -> tuple[Tensor, Tensor]:
            now = [forward(other, other.data) for other in sharing]
            own = next(outputs for other, outputs in zip(sharing, now, strict=True) if other.policy is agent.policy)
            return objective_of(agent.policy, own, data, weight) - objective, joint_kl(now) - before

        return evaluate
