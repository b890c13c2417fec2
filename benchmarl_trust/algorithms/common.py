"""What all algorithms share: BenchMARL's MAPPO with a surrogate gain in place of its clip."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from types import MappingProxyType
from typing import Any

from benchmarl.algorithms import Mappo, MappoConfig
from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.experiment import Callback
from benchmarl.utils import _read_yaml_config
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.objectives import LossModule, ValueEstimators

from benchmarl_trust import functional as F
from benchmarl_trust.losses import SurrogateLoss
from benchmarl_trust.paths import conf_folder
from benchmarl_trust.runtime import FiniteGuard, LatestCheckpoint, ResumeState, own_callback


class TrustRegion(Mappo):
    """BenchMARL's MAPPO with :class:`~benchmarl_trust.losses.SurrogateLoss` as its loss.

    Policies, critics, GAE, buffers and the training loop are MAPPO's. A subclass names its surrogate.

    Args:
        epsilon (float or tuple of two floats): radius of the trust region; a pair is (ε for A < 0, ε for A ≥ 0).
        surrogate (str): a key of :data:`benchmarl_trust.functional.SURROGATES`.
        normalize_advantage (str): ``none``, ``batch`` or ``per_agent``, over the whole collected batch.
        **kwargs: those of :class:`benchmarl.algorithms.Mappo`.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    loss_class = SurrogateLoss
    loss_settings: Mapping[str, Any] = MappingProxyType({})
    epsilon_key = "epsilon"

    def __init__(
        self,
        epsilon: float | tuple[float, float],
        surrogate: str,
        normalize_advantage: str,
        **kwargs,
    ):
        low, high = epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)
        F.check_surrogate(surrogate, high, key=f"algorithm.{self.epsilon_key}")
        F.check_surrogate(surrogate, low, key=f"algorithm.{self.epsilon_key}_negative")
        if normalize_advantage not in F.NORMALIZATIONS:
            raise ValueError(
                f"algorithm.normalize_advantage={normalize_advantage} is unknown: choose one of "
                f"{', '.join(F.NORMALIZATIONS)}."
            )
        super().__init__(clip_epsilon=epsilon, **kwargs)
        self.surrogate = surrogate
        self.normalize_advantage = normalize_advantage
        self.guard = FiniteGuard.of(self.experiment)
        self.resume_state = ResumeState.of(self.experiment)
        LatestCheckpoint.of(self.experiment)

    def _get_loss(self, group: str, policy_for_loss: TensorDictModule, continuous: bool) -> tuple[LossModule, bool]:
        loss = self.loss_class(
            policy_for_loss,
            self.get_critic(group),
            surrogate=self.surrogate,
            epsilon=self.clip_epsilon,
            entropy_coeff=self.entropy_coef,
            critic_coeff=self.critic_coef,
            loss_critic_type=self.loss_critic_type,
            **self.loss_settings,
        )
        loss.set_keys(
            **{key: (group, key) for key in ("reward", "action", "done", "terminated", "mask")},
            advantage=(group, "advantage"),
            value_target=(group, "value_target"),
            value=(group, "state_value"),
            sample_log_prob=(group, "log_prob"),
        )
        loss.make_value_estimator(ValueEstimators.GAE, gamma=self.experiment_config.gamma, lmbda=self.lmbda)
        # An ensemble calls this method on an inner algorithm and keeps the loss to itself; process_batch of the
        # inner algorithm would then build a second, untrained critic. Keeping the loss here prevents that.
        self._losses_and_updaters[group] = (loss, None)
        return loss, False

    def process_loss_vals(self, group: str, loss_vals: TensorDictBase) -> TensorDictBase:
        """MAPPO's sum of objective and entropy. A loss that is not finite gets a gradient that is not finite either,
        by which :class:`~benchmarl_trust.runtime.FiniteGuard` knows it and drops the step.
        """
        if "loss_objective" in loss_vals.keys():
            loss_vals = super().process_loss_vals(group, loss_vals)
        for name in self.experiment.optimizers[group].keys() & loss_vals.keys():
            loss_vals.set(name, _nan_gradient_unless_finite(loss_vals.get(name)))
        return loss_vals


class Simultaneous(TrustRegion):
    """All agents of a group move at once, in BenchMARL's own loop."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        own_callback(self.experiment, RatioExtremes)

    def process_batch(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """MAPPO's advantages and value targets, the advantages normalised as configured.

        The log-probs of a recurrent policy are computed anew: training runs it from a zero state at the start of the
        batch, where collection had a state, so that with the collected ones the ratios would not start at 1.
        """
        batch = super().process_batch(group, batch)
        self._on_advantages(group, batch)
        advantage = F.normalize_advantage(
            batch[group, "advantage"], self.normalize_advantage, batch.get((group, "mask"), None)
        )
        batch.set((group, "advantage"), advantage)
        if self.model_config.is_rnn:
            loss, _ = self.get_loss_and_updater(group)
            batch.set(loss.tensor_keys.sample_log_prob, loss.current_log_prob(batch))
        return batch

    def _on_advantages(self, group: str, batch: TensorDictBase) -> None:
        """Called with each batch once its advantages are there, before they are normalised."""


class RatioExtremes(Callback):
    """Logs the smallest and the largest ratio of an iteration, where BenchMARL logs means over its minibatches."""

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        """Log ``train/{group}/policy/ratio_min`` and ``ratio_max``."""
        if "ratio_min" not in training_td.keys():
            return  # a group of an ensemble with another algorithm
        extremes = {"ratio_min": training_td["ratio_min"].min(), "ratio_max": training_td["ratio_max"].max()}
        self.experiment.logger.log(
            {f"train/{group}/policy/{name}": value.item() for name, value in extremes.items()},
            step=self.experiment.n_iters_performed,
        )


def _nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    finite = loss.detach().isfinite()
    return loss * finite.to(loss.dtype).masked_fill(~finite, float("nan"))


@dataclass
class TrustRegionConfig(AlgorithmConfig):
    """MAPPO's configuration without ``clip_epsilon``, and how advantages are normalised.

    Values live in the yaml files; ``get_from_yaml()`` reads the one of the algorithm.
    """

    share_param_critic: bool = MISSING
    entropy_coef: float = MISSING
    critic_coef: float = MISSING
    loss_critic_type: str = MISSING
    lmbda: float = MISSING
    scale_mapping: str = MISSING
    use_tanh_normal: bool = MISSING
    minibatch_advantage: bool = MISSING
    normalize_advantage: str = MISSING

    @classmethod
    def get_from_yaml(cls, path: str | None = None) -> "TrustRegionConfig":
        """The configuration of ``conf/algorithm/<name>.yaml``, or of the file at ``path``."""
        name = f"{cls.associated_class().__name__.lower()}.yaml"
        return cls(**_read_yaml_config(str(path or conf_folder() / "algorithm" / name)))

    supports_continuous_actions = staticmethod(MappoConfig.supports_continuous_actions)
    supports_discrete_actions = staticmethod(MappoConfig.supports_discrete_actions)
    on_policy = staticmethod(MappoConfig.on_policy)
    has_centralized_critic = staticmethod(MappoConfig.has_centralized_critic)
