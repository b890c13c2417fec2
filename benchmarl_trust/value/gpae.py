"""GPAE as a TorchRL value estimator."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives.value import ValueEstimatorBase

from benchmarl_trust import functional as F
from benchmarl_trust.policy import parameter_keys, policy_features

#: So many numbers, copies included, does the critic read at once (but never less than one environment's): this bounds
#: the memory, and what stays in a cache is computed faster.
CHUNK = 2**23


class GPAE(ValueEstimatorBase):
    r"""Generalized per-agent advantage estimation: each agent its own advantage, from on- or off-policy data.

    .. math::
        A_{i,t} = δ_{i,t} + γ c_{i,t+1} A_{i,t+1}, \qquad
        δ_{i,t} = r_t + γ EQ_i(s_{t+1}, a_{-i,t+1}) - EQ_i(s_t, a_{-i,t})

    See :mod:`benchmarl_trust.functional.gpae` for the traces c, the target of the critic, and sources.

    Inside a trajectory :math:`a_{t+1}` are the actions that were executed. At its end (``done``) and at the end of the
    batch nothing was: there the critic is evaluated at ("next", observation) with actions sampled from the policy.
    Truncation bootstraps so, termination does not, and nothing crosses a reset. To that end the batch is laid out anew
    with a slot for the true next observation behind each trajectory, and policy and critic are run over it once:
    recurrent ones over each sequence and one step further.

    The policy is asked once per call, as it then is. What it says is written to the batch and is data from then on:
    features of its distribution, which the critic reads, and with ``off_policy`` the log-probs of the executed actions
    and their ratios to those of collection. A :class:`~benchmarl_trust.losses.SurrogateLoss` reads the ratios as
    weights by itself; ``loss.set_keys(sample_log_prob="old_log_prob", mask="valid")`` puts its trust region around this
    policy and leaves out what cannot be weighted.

    Args:
        gamma (float): γ in [0, 1].
        lmbda (float): λ in [0, 1].
        actor_network (ProbabilisticTensorDictSequential): the policy of all agents. It is not registered here; its
            parameters are those of the moment of the call.
        value_network (TensorDictModuleBase): reads observations, ``action`` and ``policy_features``, writes ``value``,
            [*, T, N, 1]; usually a :class:`~benchmarl_trust.value.CounterfactualCritic`.
        truncation (str): of the traces, ``dt``, ``st``, ``it`` or ``none``.
        eta (float): η ≥ 1, the cap on the teammates' joint ratio in ``dt``.
        off_policy (bool): the data may come from older policies: compute ratios to the log-probs stored at
            collection. Otherwise all ratios are 1 and none is computed.

    Keys (``set_keys``): ``reward`` [*, T, N, 1] or the team's [*, T, 1], ``done`` and ``terminated`` of the team
    [*, T, 1], all under "next"; ``action``; ``sample_log_prob`` [*, T, N], read if ``off_policy``; ``mask``
    [*, T, N], optional, True where an agent takes part. Written: ``value``, ``advantage``, ``value_target``
    [*, T, N, 1], ``policy_features`` [*, T, N, F], and if ``off_policy`` ``old_log_prob`` [*, T, N], the log-prob under
    the policy of the call, ``importance_weight`` [*, T, N], its ratio to the stored one, and ``valid`` [*, T, N], True
    where an agent takes part and that ratio is finite. The last batch dimension is time.

    An absent agent, or one whose ratio is NaN, counts as one of ratio 1 and gets advantage 0. An absent agent's value
    goes on, and so does its target: what a death costs or spares the team is part of the advantage of the last action
    before it. The critic must therefore be trained on absent agents too.

    Nothing written has a gradient.

    Raises:
        ValueError: at construction for a setting out of range; on a batch whose shapes do not fit.
        KeyError: if the batch lacks an entry.

    Examples:
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Prob, TensorDictModule as Mod
        >>> from tensordict.nn import TensorDictSequential as Seq
        >>> from benchmarl_trust.value import CounterfactualCritic
        >>> head = Prob(["logits"], ["action"], distribution_class=torch.distributions.Categorical)
        >>> policy = ProbabilisticTensorDictSequential(Mod(torch.nn.Linear(4, 3), ["obs"], ["logits"]), head)
        >>> flat = Mod(lambda x, table: torch.cat([x.flatten(-2), table], -1), ["obs", "table"], ["input"])
        >>> network = Seq(flat, Mod(torch.nn.Linear(2 * (4 + 3 + 1), 1), ["input"], ["value"]))
        >>> critic = CounterfactualCritic(network, (2 * 4,), "table", "action", "policy_features", "state_value")
        >>> batch = policy(TensorDict(obs=torch.randn(5, 10, 2, 4), batch_size=(5, 10)))
        >>> no = torch.zeros(5, 10, 1, dtype=torch.bool)
        >>> batch["next"] = dict(obs=torch.randn(5, 10, 2, 4), reward=torch.ones(5, 10, 1), done=no, terminated=no)
        >>> estimator = GPAE(gamma=0.99, lmbda=0.95, actor_network=policy, value_network=critic)
        >>> estimator(batch)["advantage"].shape
        torch.Size([5, 10, 2, 1])
    """

    @dataclass
    class _AcceptedKeys(ValueEstimatorBase._AcceptedKeys):
        """The base's keys and those of GPAE; all of them, since ``set_keys`` knows those declared here alone."""

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        sample_log_prob: NestedKey | None = None
        action: NestedKey = "action"
        policy_features: NestedKey = "policy_features"
        old_log_prob: NestedKey = "old_log_prob"
        importance_weight: NestedKey = "importance_weight"
        valid: NestedKey = "valid"
        mask: NestedKey = "mask"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    actor_network: ProbabilisticTensorDictSequential
    value_network: TensorDictModuleBase

    def __init__(
        self,
        *,
        gamma: float,
        lmbda: float,
        actor_network: ProbabilisticTensorDictSequential,
        value_network: TensorDictModuleBase,
        truncation: str = "dt",
        eta: float = 1.02,
        off_policy: bool = False,
    ):
        F.check_gpae(truncation, eta, lmbda, gamma)
        # It takes any module; its annotation is narrower.
        super().__init__(value_network=value_network)  # pyright: ignore[reportArgumentType]
        self.__dict__["actor_network"] = actor_network  # as value_network: not a submodule, no parameters here
        self.gamma, self.lmbda = gamma, lmbda
        self.truncation, self.eta = truncation, eta
        self.off_policy = off_policy

    @property
    def in_keys(self):
        """What is read."""
        keys = self.tensor_keys
        now = [*self._observation_keys, keys.action, *([keys.sample_log_prob] if self.off_policy else [])]
        observed = [key for key in self._observation_keys if key != "is_init"]
        following = [*observed, keys.reward, keys.done, keys.terminated]
        return [*now, *(unravel_key(("next", key)) for key in following)]

    @property
    def out_keys(self):
        """What is written."""
        keys = self.tensor_keys
        out = [keys.advantage, keys.value_target, keys.value, keys.policy_features]
        return [*out, keys.old_log_prob, keys.importance_weight, keys.valid] if self.off_policy else out

    @property
    def _observation_keys(self) -> list[NestedKey]:
        """What policy and critic read of a state."""
        keys = self.tensor_keys
        read = dict.fromkeys([*self.actor_network.in_keys, *self.value_network.in_keys])
        return [key for key in read if key not in (keys.action, keys.policy_features)]

    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
    ) -> TensorDictBase:
        """Write values, advantages, targets and features.

        Args:
            tensordict (TensorDictBase): [*, T], as a collector returns it.
            params (TensorDictBase, optional): the value network's parameters; if None, its own.
            target_params (TensorDictBase, optional): taken for the interface's sake; the target needs no other network.

        Returns: the same tensordict.
        """
        out = self._estimate(self._checked(tensordict), params)
        for key, value in out.items():
            tensordict.set(key, value.reshape(*tensordict.shape, *value.shape[2:]))
        return tensordict

    def value_estimate(
        self,
        tensordict: TensorDictBase,
        target_params: TensorDictBase | None = None,
        next_value: Tensor | None = None,
        params: TensorDictBase | None = None,
        **kwargs,
    ) -> Tensor:
        """The critic's target alone; the tensordict stays as it is.

        Raises:
            ValueError: if ``next_value`` is given, which here depends on sampled actions.
        """
        if next_value is not None:
            raise ValueError("GPAE computes next_value itself: at executed actions, or at sampled ones at an end.")
        return self(tensordict.copy(), params=params).get(self.tensor_keys.value_target)

    def _estimate(self, batch: TensorDictBase, params: TensorDictBase | None) -> dict[NestedKey, Tensor]:
        """Everything that is written, [B, T, ...]."""
        keys = self.tensor_keys
        value, next_value, features, old_log_prob = self._evaluate(batch, params)
        mask, log_ratio = batch.get(keys.mask, None), None
        if old_log_prob is not None:
            log_ratio = F.log_ratio(old_log_prob, self._behaviour_log_prob(batch))
            mask = ~log_ratio.isnan() if mask is None else mask & ~log_ratio.isnan()
        advantage = F.per_agent_advantage(
            reward=self._reward(batch, value, mask),
            value=value,
            next_value=next_value,
            trace=self._trace(log_ratio, mask),
            gamma=self.gamma,
            done=batch.get(("next", keys.done)),
            terminated=batch.get(("next", keys.terminated)),
        )
        target = F.per_agent_value_target(value, advantage, log_ratio, mask)
        advantage = advantage if mask is None else torch.where(mask, advantage, 0)
        out = {keys.value: value, keys.advantage: advantage, keys.value_target: target}
        out = {key: entry.unsqueeze(-1) for key, entry in out.items()}
        out[keys.policy_features] = features
        if old_log_prob is not None and log_ratio is not None:
            out[keys.old_log_prob] = old_log_prob
            out[keys.importance_weight] = F.importance_weight(log_ratio)
            present = batch.get(keys.mask, None)
            out[keys.valid] = log_ratio.isfinite() if present is None else present & log_ratio.isfinite()
        return out

    def _evaluate(
        self, batch: TensorDictBase, params: TensorDictBase | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Each step's value, the value that follows it, the policy's features and, if ``off_policy``, the executed
        actions' log-prob.
        """
        keys = self.tensor_keys
        layout = _layout(batch.get(("next", keys.done)).squeeze(-1))
        data = self._laid_out(batch, layout)
        dist, features = self._policy(data)
        action, sampled = layout.spread(batch.get(keys.action)), dist.sample()
        action[layout.end_row, layout.end_slot] = sampled[layout.end_row, layout.end_slot]
        data.set(keys.action, action)
        data.set(keys.policy_features, features)
        values = self._values(data, params)
        self._check_values(values, features)
        log_prob = layout.now(dist.log_prob(action)) if self.off_policy else None
        return layout.now(values).squeeze(-1), layout.following(values).squeeze(-1), layout.now(features), log_prob

    def _trace(self, log_ratio: Tensor | None, mask: Tensor | None) -> Tensor | float:
        if log_ratio is None:
            return self.lmbda
        return F.trace_coefficient(log_ratio, self.lmbda, self.truncation, self.eta, mask)

    def _policy(self, data: TensorDictBase) -> tuple[Distribution, Tensor]:
        read = data.select(*self.actor_network.in_keys, strict=False)
        params = cast(TensorDictBase, self.actor_network.get_dist_params(read))  # annotated as a pair, which it is not
        head = cast(ProbabilisticTensorDictModule, self.actor_network[-1])
        mask_key = parameter_keys(head).get("mask")
        if mask_key is not None:  # the last observation of a trajectory may allow no action, as no one will act on it
            mask = params.get(mask_key)
            params.set(mask_key, mask | ~mask.any(-1, keepdim=True))
        return head.get_dist(params), policy_features(head, params)

    def _values(self, data: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """The critic on some environments at a time, since it may copy all that it reads for each agent."""
        n_agents = data.get(self.tensor_keys.policy_features).shape[-2]
        read = (data.get(key, None) for key in self.value_network.in_keys)
        numbers = n_agents * sum(value[0].numel() for value in read if value is not None)
        rows = max(1, CHUNK // numbers)
        with nullcontext() if params is None else params.to_module(self.value_network):
            parts = [self.value_network(part).get(self.tensor_keys.value) for part in data.split(rows)]
        return torch.cat(parts)

    def _laid_out(self, batch: TensorDictBase, layout: "_Layout") -> TensorDict:
        """Observations, and what goes with them, with the true next ones in their slots."""
        data = TensorDict(batch_size=layout.step.shape)
        for key in [*self._observation_keys, self.tensor_keys.mask]:
            if batch.get(key, None) is None:
                continue  # a recurrent network's state, or no mask
            following = batch.get(("next", key), None)
            if key == "is_init":
                data.set(key, layout.spread(batch.get(key) | layout.after_end.unsqueeze(-1), False))
            elif following is None:
                raise KeyError(f"The batch has {key!r} but not {('next', key)!r}, from which the last step bootstraps.")
            else:
                data.set(key, layout.spread(batch.get(key), following))
        return data

    def _behaviour_log_prob(self, batch: TensorDictBase) -> Tensor:
        key = self.tensor_keys.sample_log_prob
        log_prob = batch.get(key, None)
        if log_prob is None:
            raise KeyError(
                f"The batch has no {key!r}, the log-prob of the policy that collected it, without which data of older "
                "policies has no ratio: collect with return_log_prob=True, or use only the newest batch."
            )
        return log_prob

    def _reward(self, batch: TensorDictBase, value: Tensor, mask: Tensor | None) -> Tensor:
        reward = batch.get(("next", self.tensor_keys.reward))
        team, each = (*value.shape[:2], 1), (*value.shape, 1)
        if reward.shape not in (team, each):
            raise ValueError(
                f"The reward of key {('next', self.tensor_keys.reward)!r} has shape {tuple(reward.shape)}; it must be "
                f"one number per agent, {each}, or one for the team, {team}."
            )
        reward = reward.squeeze(-1) if reward.shape == each else reward.expand(value.shape)
        # An absent agent's reward may be padding that is not finite.
        return reward if mask is None else torch.where(mask | reward.isfinite(), reward, 0)

    def _check_values(self, values: Tensor, features: Tensor) -> None:
        expected = (*features.shape[:-1], 1)
        if values.shape != expected:
            raise ValueError(
                f"The value network wrote {tuple(values.shape)} at {self.tensor_keys.value!r}; one value per agent is "
                f"expected, {expected}."
            )

    def _checked(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The batch as [B, T]."""
        if not tensordict.ndim:
            raise ValueError("GPAE needs a batch whose last dimension is time, this tensordict has no dimension.")
        keys, nested = self.tensor_keys, set(tensordict.keys(True))
        for key in (keys.action, *(unravel_key(("next", key)) for key in (keys.reward, keys.done, keys.terminated))):
            if key not in nested:
                raise KeyError(f"The batch has no {key!r}: name the keys that it has with set_keys.")
        if tensordict._has_names() and "time" in tensordict.names[:-1]:
            raise ValueError(f"Time must be the last batch dimension, the dimensions are {tensordict.names}.")
        for name in (self.tensor_keys.done, self.tensor_keys.terminated):
            flag = tensordict.get(("next", name))
            if flag.shape != (*tensordict.shape, 1):
                raise ValueError(
                    f"{('next', name)!r} has shape {tuple(flag.shape)}; a trajectory ends for the whole team at once, "
                    f"so it must be {(*tensordict.shape, 1)}: name the team's flag with set_keys."
                )
        return tensordict.reshape(-1, tensordict.shape[-1])


class _Layout(NamedTuple):
    """Where the steps of [B, T] lie in [B, T + ends], which has one slot more behind the last step of a trajectory.

    step: [B, T + ends], the step that a slot shows; unused slots at the end show the last one again.
    slot: [B, T], the slot of each step. row: [B, 1].
    end_row, end_step, end_slot: of each end its environment, its step, and the slot of its true next observation.
    after_end: [B, T], the step is the first of a trajectory that begins in this batch.
    """

    step: Tensor
    slot: Tensor
    row: Tensor
    end_row: Tensor
    end_step: Tensor
    end_slot: Tensor
    after_end: Tensor

    def spread(self, now: Tensor, following: Tensor | bool | None = None) -> Tensor:
        """[B, T, ...] to [B, T + ends, ...]; ``following``, [B, T, ...], goes to the slots of the ends."""
        out = now[self.row, self.step]
        if isinstance(following, Tensor):
            following = following[self.end_row, self.end_step]
        if following is not None:
            out[self.end_row, self.end_slot] = following
        return out

    def now(self, spread: Tensor) -> Tensor:
        """[B, T + ends, ...] to [B, T, ...]: the steps."""
        return spread[self.row, self.slot]

    def following(self, spread: Tensor) -> Tensor:
        """[B, T + ends, ...] to [B, T, ...]: what follows each step, be it the next step or the slot of an end."""
        return spread[self.row, self.slot + 1]


def _layout(done: Tensor) -> _Layout:
    """The layout for trajectories that end where ``done`` [B, T] says, and with the batch."""
    batch, length = done.shape
    ends = done.clone()
    ends[:, -1] = True
    index = torch.arange(length, device=done.device).expand(batch, length)
    row = torch.arange(batch, device=done.device).unsqueeze(-1)
    slot = index + ends.cumsum(1) - ends.long()
    count = ends.sum(1)
    most, total = torch.stack([count.max(), count.sum()]).tolist()  # the one wait for a GPU, once per iteration
    width = length + most
    step = torch.full((batch, width), length - 1, device=done.device).scatter(1, slot, index)
    end_row, end_step = torch.nonzero_static(ends, size=total).unbind(1)
    after_end = torch.cat([torch.zeros_like(done[:, :1]), done[:, :-1]], 1)
    return _Layout(step, slot, row, end_row, end_step, slot[end_row, end_step] + 1, after_end)
