"""What all algorithms share: BenchMARL's MAPPO with a surrogate gain in place of its clip and an estimator by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from benchmarl.algorithms import Mappo, MappoConfig
from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.experiment import ExperimentConfig
from benchmarl.models.common import ModelConfig
from benchmarl.utils import _read_yaml_config
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictModuleBase
from tensordict.nn.distributions import NormalParamExtractor
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.envs import Transform
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.checks import check_memory, refuse
from benchmarl_trust.algorithms.estimators import ESTIMATORS
from benchmarl_trust.algorithms.keys import (
    Choice,
    Flag,
    Number,
    ScaleMapping,
    check_fields,
    check_host,
    setting,
)
from benchmarl_trust.algorithms.metrics import each_and_mean, to_host
from benchmarl_trust.algorithms.schedules import SCHEDULES, Schedule, set_lr
from benchmarl_trust.losses import SurrogateLoss
from benchmarl_trust.paths import conf_folder
from benchmarl_trust.policy import PaddedNormal
from benchmarl_trust.runtime import FiniteGuard, LatestCheckpoint, ResumeState, check_video, fused
from benchmarl_trust.value import NormalizedCritic

#: What the critic regresses on: returns as they are, or in units of their running statistics.
VALUE_NORMALIZATIONS = ("none", "running")
#: The gains that bound the ratio by themselves.
GAINS = tuple(name for name in F.SURROGATES if name != "linear")
NO_TRUST_REGION = (
    "r A alone has no trust region, and gradient steps have no other. Take one of "
    f"{', '.join(GAINS)}, or a natural step such as algorithm=hatrpo."
)


class TrustRegion(Mappo):
    """BenchMARL's MAPPO with :class:`~benchmarl_trust.losses.SurrogateLoss` as its loss.

    Policies, critics, GAE, buffers and the training loop are MAPPO's. A subclass says who moves when.

    Args:
        surrogate (str): what one sample contributes, see :data:`benchmarl_trust.functional.SURROGATES`.
        epsilon (float): radius of the trust region.
        epsilon_negative (float, optional): the radius where A < 0; None: ``epsilon``.
        factor (str, optional): how the agents that moved before weigh, see
            :func:`benchmarl_trust.functional.factor_weight`.
        estimator (str): of the advantages, a key of :data:`benchmarl_trust.algorithms.estimators.ESTIMATORS`.
        truncation (str), eta (float), n_rollouts (int): the estimator's, see
            :class:`benchmarl_trust.algorithms.estimators.GpaeEstimator`.
        normalize_advantage (str): ``none``, ``batch`` or ``per_agent``, over the whole collected batch.
        normalize_value (str): ``running``: the critic is a :class:`~benchmarl_trust.value.NormalizedCritic`, with
            statistics of the group, or of each agent where each has a critic of its own. ``none``: it is MAPPO's.
        lr_schedule (str), warmup_frames (int): of the learning rates of all optimizers, see
            :class:`~benchmarl_trust.algorithms.schedules.Schedule`.
        epsilon_schedule (str): of ``epsilon`` and ``epsilon_negative``.
        target_kl (float, optional): an iteration's epochs end once the exact mean KL(old ‖ new) exceeds this.
        **kwargs: those of :class:`benchmarl.algorithms.Mappo`.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    loss_class = SurrogateLoss
    #: Whether an agent's advantages may be computed anew when its turn comes.
    corrects_advantages = False

    def __init__(
        self,
        surrogate: str,
        epsilon: float,
        epsilon_negative: float | None,
        factor: str | None,
        estimator: str,
        truncation: str,
        eta: float,
        n_rollouts: int,
        normalize_advantage: str,
        normalize_value: str,
        lr_schedule: str,
        warmup_frames: int,
        epsilon_schedule: str,
        target_kl: float | None,
        **kwargs,
    ):
        super().__init__(clip_epsilon=epsilon, **kwargs)
        check_video(self.experiment)
        self.surrogate = surrogate
        self.full_epsilon = (epsilon if epsilon_negative is None else epsilon_negative, epsilon)
        #: The radius of this iteration as the gains take it: where A < 0, where A ≥ 0.
        self.epsilon = self.full_epsilon
        self.lr_schedule, self.epsilon_schedule = Schedule(lr_schedule, warmup_frames), Schedule(epsilon_schedule)
        self.target_kl = target_kl
        self.factor = factor
        self.normalize_advantage = normalize_advantage
        self.normalize_value = normalize_value
        self.guard = FiniteGuard.of(self.experiment)
        self.resume_state = ResumeState.of(self.experiment)
        LatestCheckpoint.of(self.experiment)
        self.estimator = ESTIMATORS[estimator](self, truncation, eta, n_rollouts)

    def _get_loss(
        self, group: str, policy_for_loss: ProbabilisticTensorDictSequential, continuous: bool
    ) -> tuple[LossModule, bool]:
        loss = self.loss_class(
            policy_for_loss,
            self.get_critic(group),
            surrogate=self.surrogate,
            epsilon=self.epsilon,
            factor=self.factor or "full",
            entropy_coeff=self.entropy_coef,
            critic_coeff=self.critic_coef,
            loss_critic_type=self.loss_critic_type,
            critic_on_absent=True,  # every estimator bootstraps from the values of absent agents
        )
        loss.set_keys(
            **{key: (group, key) for key in ("reward", "action", "done", "terminated", "mask")},
            advantage=(group, "advantage"),
            value_target=(group, "value_target"),
            value=(group, "state_value" if self.normalize_value == "none" else "normalized_value"),
            sample_log_prob=(group, "log_prob"),
        )
        self.estimator.attach(group, loss, policy_for_loss)
        loss.value_estimator.set_keys(value=(group, "state_value"))  # advantages are in the rewards' units, always
        if self.lr_schedule.moves:
            self.resume_state.scheduled.add(group)
        # An ensemble calls this method on an inner algorithm and keeps the loss to itself; process_batch of the
        # inner algorithm would then build a second, untrained critic. Keeping the loss here prevents that.
        self._losses_and_updaters[group] = (loss, None)
        return loss, False

    def executed_actions(self, group: str) -> Tensor | None:
        """Which entries of its actions each agent executes, boolean [N, D]; None if the task pads none.

        A task that pads actions has a method ``executed_actions(env)``, from the environment to a dictionary of these
        by group.
        """
        of_task = getattr(self.experiment.task, "executed_actions", None)
        executed = {} if of_task is None else of_task(self.experiment.test_env)
        executed = executed.get(group)
        return None if executed is None or executed.all() else executed.to(self.device)

    def _get_policy_for_loss(
        self, group: str, model_config: ModelConfig, continuous: bool
    ) -> ProbabilisticTensorDictSequential:
        """MAPPO's; entries of an action that are padding have a distribution that does not move."""
        policy = super()._get_policy_for_loss(group, model_config, continuous)
        executed = self.executed_actions(group)
        if executed is not None:
            for module in list(policy.modules()):
                if isinstance(module, TensorDictModule) and isinstance(module.module, NormalParamExtractor):
                    module.module = PaddedNormal(module.module, executed)
        return cast(ProbabilisticTensorDictSequential, policy)

    def _get_parameters(self, group: str, loss: LossModule) -> dict[str, list]:
        """MAPPO's, without what is no parameter of the networks: running statistics."""
        # MAPPO names the class of its own loss.
        parameters = super()._get_parameters(group, loss)  # pyright: ignore[reportArgumentType]
        return {name: [p for p in each if isinstance(p, torch.nn.Parameter)] for name, each in parameters.items()}

    def get_critic(self, group: str) -> TensorDictModuleBase:
        """The estimator's value network, normalised as configured."""
        critic = self.estimator.critic(group)
        if self.normalize_value == "none":
            return critic
        shape = () if self.share_param_critic else (len(self.group_map[group]), 1)
        return NormalizedCritic(critic, (group, "state_value"), (group, "normalized_value"), shape, self.device)

    def get_replay_buffer(self, group: str, transforms: list[Transform] | None = None) -> ReplayBuffer:
        """The buffer of the batches that the estimator trains on."""
        return self.estimator.buffer(group, transforms)

    def process_batch(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """Advantages and value targets of this batch, and of those that the estimator keeps. This comes before all
        updates of the group, so it sets what has a schedule.
        """
        for optimizer in self.experiment.optimizers[group].values():
            fused(optimizer)
        scheduled = self._follow_schedules(group)
        batch = self.estimator.with_kept(group, without_absent(group, batch))
        batch = super().process_batch(group, batch)
        metrics = self.estimator.metrics(group, batch) | self._value_metrics(group)
        metrics = to_host(metrics, prefix=f"train/{group}/")
        metrics |= {f"train/{group}/{name}": value for name, value in scheduled.items()}
        if metrics:
            self.experiment.logger.log(metrics, step=self.experiment.n_iters_performed)
        return batch

    def _value_metrics(self, group: str) -> dict[str, Tensor]:
        """The statistics that this iteration's values were made with."""
        if self.normalize_value == "none":
            return {}
        with self._critic_of(group) as critic:
            mean, std = critic.mean_and_std()
        if self.share_param_critic:
            return {"value_norm_mean": mean, "value_norm_std": std}
        return each_and_mean("value_norm_mean", mean.flatten()) | each_and_mean("value_norm_std", std.flatten())

    def normalize_targets(self, group: str, batch: TensorDictBase) -> None:
        """What a subclass does last with a batch, when nothing in it changes the value targets any more: the statistics
        see them, and they become what the critic's network regresses on.
        """
        if self.normalize_value == "none":
            return
        target = batch[group, "value_target"]
        with self._critic_of(group) as critic:
            critic.update(target, self.estimator.mask(group, batch))
            batch.set((group, "value_target"), critic.normalize(target))

    @contextmanager
    def _critic_of(self, group: str) -> Iterator[NormalizedCritic]:
        """The group's critic with its parameters and statistics, which the loss keeps apart from it; with
        ``normalize_value`` alone, which makes it one that has them.
        """
        loss = self._loss(group)
        critic = cast(NormalizedCritic, loss.critic_network)
        with cast(TensorDictParams, loss.critic_network_params).to_module(critic):
            yield critic

    def _loss(self, group: str) -> SurrogateLoss:
        return cast(SurrogateLoss, self.get_loss_and_updater(group)[0])

    def _follow_schedules(self, group: str) -> dict[str, float]:
        """Set the iteration's learning rates and ε, if they have a schedule; returns what is logged of them."""
        values = {}
        if self.lr_schedule.moves:
            values["lr"] = self.experiment.config.lr * self.lr_schedule.factor(self.experiment)
            set_lr(self.experiment.optimizers[group].values(), values["lr"])
        if self.epsilon_schedule.moves:
            factor = self.epsilon_schedule.factor(self.experiment)
            negative, positive = self.full_epsilon
            self.epsilon = (factor * negative, factor * positive)
            self._loss(group).epsilon = self.epsilon
            values["policy/epsilon"] = self.epsilon[1]
        return values

    def process_loss_vals(self, group: str, loss_vals: TensorDictBase) -> TensorDictBase:
        """MAPPO's sum of objective and entropy. A loss that is not finite gets a gradient that is not finite either,
        by which :class:`~benchmarl_trust.runtime.FiniteGuard` knows it and drops the step.
        """
        if "loss_objective" in loss_vals.keys():
            loss_vals = super().process_loss_vals(group, loss_vals)
        for name in self.experiment.optimizers[group].keys() & loss_vals.keys():
            loss_vals.set(name, _nan_gradient_unless_finite(loss_vals.get(name)))
        return loss_vals

    def as_sampled(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """The batch as the loss would see it: with the task's replay-buffer transforms (images to floats, say)."""
        for transform in self.experiment.task.get_replay_buffer_transforms(self.experiment.test_env, group):
            batch = transform(batch.copy())
        return batch


def without_absent(group: str, batch: TensorDictBase) -> TensorDictBase:
    """The batch with what absent agents did set to 0, and rewards of theirs that are NaN or infinite too.

    A finite reward of an absent agent stays: a team's reward goes on after a death, and is part of what the agent's
    last action was worth.
    """
    mask = batch.get((group, "mask"), None)
    if mask is None:
        return batch
    for key in ((group, "action"), (group, "log_prob"), ("next", group, "reward")):
        value = batch.get(key, None)
        if value is None:
            continue
        kept = mask.reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))
        if key[-1] == "reward":
            kept = kept | value.isfinite()
        batch.set(key, torch.where(kept, value, 0))
    return batch


def _nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    value = loss.detach()
    return loss * (1 + (value - value))  # the difference is 0, or NaN


@dataclass
class TrustRegionConfig(AlgorithmConfig):
    """MAPPO's configuration without ``clip_epsilon``, and the choices that all algorithms have.

    Values live in the yaml files; ``get_from_yaml()`` reads the one of the algorithm. :class:`TrustRegion` says what
    the keys mean.
    """

    surrogate: str = setting(Choice(among=F.SURROGATES, elsewhere={"linear": NO_TRUST_REGION}, usual="clip"))
    factor: str | None = setting(Choice(among=F.FACTORS, usual="full"))
    estimator: str = setting(Choice(among=ESTIMATORS, usual="gae"))
    truncation: str = setting(Choice(among=F.TRACES, usual="dt"))
    eta: float = setting(Number(least=1, usual=1.02))
    n_rollouts: int = setting(Number(least=1, most=None, whole=True, usual=1))  # as many as memory holds
    normalize_advantage: str = setting(Choice(among=F.NORMALIZATIONS, usual="none"))
    normalize_value: str = setting(Choice(among=VALUE_NORMALIZATIONS, usual="none"))
    lr_schedule: str = setting(Choice(among=SCHEDULES, usual="constant"))
    warmup_frames: int = setting(Number(least=0, whole=True, usual=0))
    epsilon_schedule: str = setting(Choice(among=SCHEDULES, usual="constant"))
    target_kl: float | None = setting(Number(above=0, null=True, usual=None))

    share_param_critic: bool = setting(Flag(usual=True))
    entropy_coef: float = setting(Number(least=0, usual=0.0))
    critic_coef: float = setting(Number(above=0, usual=1.0))  # with 0 the critic would stay as it is, or count as 1
    loss_critic_type: str = setting(Choice(among=("l2", "l1", "smooth_l1"), usual="l2"))
    lmbda: float = setting(Number(least=0, most=1, usual=0.9))
    scale_mapping: str = setting(ScaleMapping(usual="biased_softplus_1.0"))
    use_tanh_normal: bool = setting(Flag(usual=True))
    minibatch_advantage: bool = setting(Flag(usual=False))

    @classmethod
    def get_from_yaml(cls, path: str | None = None) -> "TrustRegionConfig":
        """The configuration of ``conf/algorithm/<name>.yaml``, or of the file at ``path``."""
        name = f"{cls.associated_class().__name__.lower()}.yaml"
        return cls(**_read_yaml_config(str(path or conf_folder() / "algorithm" / name)))

    def check_keys(self, experiment: ExperimentConfig) -> None:
        """Refuse what can be known to be wrong before the task is: our keys, and the host's that our updates need.

        Raises:
            ValueError: naming the key, what it may be and the usual value.
        """
        check_fields(self)
        check_host(experiment)
        frames = experiment.collected_frames_per_batch(self.on_policy())
        check_memory(self.n_rollouts, frames, experiment.train_device)
        self._check_warmup(experiment.get_max_n_frames(self.on_policy()))

    def _check_warmup(self, frames: int | None) -> None:
        if frames is not None and self.warmup_frames > frames:
            refuse(
                "warmup_frames",
                self.warmup_frames,
                f"the run has {frames} frames (experiment.max_n_frames, experiment.max_n_iters), so the learning rate "
                "would never be experiment.lr. It must be at most that. The usual value is 0.",
            )

    supports_continuous_actions = staticmethod(MappoConfig.supports_continuous_actions)
    supports_discrete_actions = staticmethod(MappoConfig.supports_discrete_actions)
    on_policy = staticmethod(MappoConfig.on_policy)
    has_centralized_critic = staticmethod(MappoConfig.has_centralized_critic)
