"""The algorithms whose agents all move at once, in BenchMARL's own loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.common import TrustRegion, TrustRegionConfig
from benchmarl_trust.algorithms.keys import Only, Radius, setting
from benchmarl_trust.algorithms.kl_stop import KlStop
from benchmarl_trust.algorithms.metrics import each_and_mean, to_host
from benchmarl_trust.policy import Head, head_of
from benchmarl_trust.runtime import OwnCallback, own_callback


class Simultaneous(TrustRegion):
    """All agents of a group move at once, in BenchMARL's own loop.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.common.TrustRegion`; ``factor`` must be None.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.policy_metrics = own_callback(self.experiment, PolicyMetrics)
        self.kl_stop = None if self.target_kl is None else own_callback(self.experiment, KlStop)
        self._policies: dict[str, ProbabilisticTensorDictSequential] = {}

    def _get_loss(
        self, group: str, policy_for_loss: ProbabilisticTensorDictSequential, continuous: bool
    ) -> tuple[LossModule, bool]:
        self._policies[group] = policy_for_loss
        # It refuses a distribution whose KL is not known.
        head_of(cast(ProbabilisticTensorDictModule, policy_for_loss[-1]))
        return super()._get_loss(group, policy_for_loss, continuous)

    def process_batch(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """Advantages and value targets, the advantages normalised as configured.

        The log-probs of a recurrent policy are computed anew: training runs it from a zero state at the start of the
        batch, where collection had a state, so that with the collected ones the ratios would not start at 1.
        """
        newest = batch.shape[0]
        batch = super().process_batch(group, batch)
        mask = self.estimator.mask(group, batch)
        advantage = F.normalize_advantage(batch[group, "advantage"], self.normalize_advantage, mask)
        batch.set((group, "advantage"), advantage)
        if self.model_config.is_rnn:
            loss = self._loss(group)
            batch.set(cast(NestedKey, loss.tensor_keys.sample_log_prob), loss.current_log_prob(batch))
        frames = self.experiment_config.train_minibatch_size(self.on_policy)
        parts = cast(TensorDictBase, batch[-newest:]).split(max(1, frames // batch.shape[1]))
        self.policy_metrics.remember(group, self._policies[group], partial(self.as_sampled, group), parts)
        self.normalize_targets(group, batch)
        if self.kl_stop is not None and self.target_kl is not None:
            self.kl_stop.watch(group, self.target_kl, partial(self.policy_metrics.kl, group))
        return batch

    def process_loss_vals(self, group: str, loss_vals: TensorDictBase) -> TensorDictBase:
        """As the base, and without the policy's loss once its KL has exceeded ``target_kl``."""
        loss_vals = super().process_loss_vals(group, loss_vals)
        stopped = self.kl_stop is not None and self.kl_stop.stopped(group)
        return loss_vals.exclude("loss_objective") if stopped else loss_vals


class _Before(NamedTuple):
    """What a group's policy said of the newest batch at the start of the iteration, and how to ask it again."""

    head: Head
    ask: Callable[[], tuple[Tensor, ...]]
    outputs: tuple[Tensor, ...]
    mask: Tensor | None


class PolicyMetrics(OwnCallback):
    """Logs of each iteration what BenchMARL's means over its minibatches do not tell.

    ``train/{group}/policy/ratio_min`` and ``ratio_max``, the smallest and the largest ratio; ``kl`` and ``kl_agent_i``,
    the exact mean KL(old ‖ new) over the newest batch in nats. At equal ε it differs between algorithms by an order of
    magnitude, so it is what tells whether two runs had equal trust regions.
    """

    def __init__(self):
        super().__init__()
        self._before: dict[str, _Before] = {}

    @torch.no_grad()
    def remember(
        self,
        group: str,
        actor: ProbabilisticTensorDictSequential,
        as_sampled: Callable[[TensorDictBase], TensorDictBase],
        parts: Sequence[TensorDictBase],
    ) -> None:
        """Keep what the policy says of this batch before it is trained.

        Args:
            group (str): the policy's.
            actor (ProbabilisticTensorDictSequential): its last module is the distribution.
            as_sampled (callable): makes of a part of the batch what the policy reads. It is called on a part at a time
                and its result not kept: floats of images take four times their bytes. It is called again for the KL,
                and must give the same.
            parts (sequence of TensorDictBase): the batch, [B, T], a forward pass for each.
        """
        head = head_of(cast(ProbabilisticTensorDictModule, actor[-1]))
        # TensorDictSequential annotates each of its modules as a list of them.
        body = TensorDictSequential(*actor.module[:-1])  # pyright: ignore[reportArgumentType, reportCallIssue]
        masks = [part.get((group, "mask"), None) for part in parts]
        mask = None if masks[0] is None else torch.cat(masks)
        ask = partial(_outputs, body, head, as_sampled, parts)
        self._before[group] = _Before(head, ask, ask(), mask)

    @torch.no_grad()
    def kl(self, group: str) -> Tensor:
        """The exact mean KL(old ‖ new) of each agent as it is now, [N]."""
        before = self._before[group]
        return F.mean_of_each(before.head.kl(before.outputs, before.ask()), before.mask)

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        """Log them."""
        if group not in self._before:
            return  # a group of an ensemble with another algorithm
        metrics = each_and_mean("kl", self.kl(group))
        del self._before[group]
        metrics |= {"ratio_min": training_td["ratio_min"].min(), "ratio_max": training_td["ratio_max"].max()}
        self.experiment.logger.log(
            to_host(metrics, prefix=f"train/{group}/policy/"), step=self.experiment.n_iters_performed
        )


def _outputs(
    body: TensorDictSequential,
    head: Head,
    as_sampled: Callable[[TensorDictBase], TensorDictBase],
    parts: Sequence[TensorDictBase],
) -> tuple[Tensor, ...]:
    """The distribution's parameters of all agents, each [B, T, N, ...]."""
    keys = [*body.in_keys, *(key for key in head.keys if key not in body.out_keys)]
    outputs = [body(as_sampled(part).select(*keys, strict=False)) for part in parts]
    return tuple(torch.cat([output.get(key) for output in outputs]) for key in head.keys)


@dataclass
class SimultaneousConfig(TrustRegionConfig):
    """What the configurations of these algorithms have; :class:`Simultaneous` says what the keys mean."""

    factor: str | None = setting(
        Only(
            usual=None,
            why="all agents move at once, so none is weighed by what others did before it. Leave it at null, or take a "
            "sequential algorithm such as algorithm=happo.",
        )
    )
    epsilon: float = setting(Radius(usual=0.2))
    epsilon_negative: float | None = setting(Radius(null=True, usual=None))
