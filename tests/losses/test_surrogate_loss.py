"""The loss module: equal to TorchRL's PPO where it should be, and clean in its gradients and shapes."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.modules import MaskedCategorical, TanhNormal
from torchrl.objectives import ClipPPOLoss

from benchmarl_trust.functional import SURROGATES
from benchmarl_trust.losses import CriticPhaseLoss, SurrogateLoss

SHAPES = {"flat": (64,), "sequence": (16, 4)}
N = 3


def networks(kind="tanh"):
    torch.manual_seed(0)
    if kind == "tanh":
        body = nn.Sequential(nn.Linear(5, 4), NormalParamExtractor())
        net, keys = TensorDictModule(body, ["observation"], ["loc", "scale"]), ["loc", "scale"]
        dist = TanhNormal
    else:
        net, keys = TensorDictModule(nn.Linear(5, 4), ["observation"], ["logits"]), ["logits"]
        dist = torch.distributions.Categorical
        if kind == "masked":
            keys, dist = {"logits": "logits", "mask": "action_mask"}, MaskedCategorical
    head = ProbabilisticTensorDictModule(
        keys, ["action"], distribution_class=dist, return_log_prob=True, log_prob_key="log_prob"
    )
    actor = ProbabilisticTensorDictSequential(net, head).double()
    critic = TensorDictModule(nn.Linear(5, 1), ["observation"], ["state_value"]).double()
    return actor, critic


def batch_for(actor, shape=(64,), distance=0.3):
    """A batch collected by a policy that differs from ``actor`` by noise on the log-probs."""
    td = TensorDict(observation=torch.randn(*shape, N, 5, dtype=torch.float64), batch_size=shape)
    td["action_mask"] = torch.rand(*shape, N, 4) < 0.6
    td["action_mask"][..., 0] = True
    with torch.no_grad():
        actor(td)
    td["log_prob"] = td["log_prob"] + distance * torch.randn_like(td["log_prob"])
    td["advantage"] = torch.randn(*shape, N, 1, dtype=torch.float64)
    td["value_target"] = torch.randn(*shape, N, 1, dtype=torch.float64)
    return td


def surrogate_loss(actor, critic, surrogate="clip", **kwargs):
    kwargs = {"entropy_coeff": 0.01, "critic_coeff": 0.5, "loss_critic_type": "l2"} | kwargs
    loss = SurrogateLoss(actor, critic, surrogate=surrogate, **kwargs)
    loss.set_keys(sample_log_prob="log_prob")
    return loss


def gradients(loss, out, *names):
    loss.zero_grad()
    sum(out[name].sum() for name in names).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in loss.named_parameters()}


@pytest.mark.parametrize("kind", ["tanh", "categorical", "masked"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_clip_equals_torchrl(kind, shape, reduction):
    actor, critic = networks(kind)
    batch = batch_for(actor, shape)
    ours = surrogate_loss(actor, critic, epsilon=0.2, reduction=reduction)
    theirs = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=0.2,
        entropy_coeff=0.01,
        critic_coeff=0.5,
        loss_critic_type="l2",
        reduction=reduction,
    )
    theirs.set_keys(sample_log_prob="log_prob")
    theirs.clip_epsilon = torch.tensor(0.2, dtype=torch.float64)  # TorchRL keeps it in float32
    results = []
    for loss in (ours, theirs):
        torch.manual_seed(1)  # TanhNormal's entropy is sampled
        out = loss(batch)
        results.append((out, gradients(loss, out, "loss_objective", "loss_entropy", "loss_critic")))
    (out, grads), (expected, expected_grads) = results
    for key in ("loss_objective", "loss_entropy", "loss_critic", "entropy", "kl_approx", "clip_fraction"):
        torch.testing.assert_close(out[key], expected[key], rtol=1e-12, atol=1e-12)
    if shape == SHAPES["flat"] and reduction == "mean":
        torch.testing.assert_close(out["ESS"], expected["ESS"])
    assert list(grads) == list(expected_grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gradients_flow_to_one_network_alone(surrogate):
    actor, critic = networks()
    loss = surrogate_loss(actor, critic, surrogate)
    for names, moved in ((("loss_objective", "loss_entropy"), "actor"), (("loss_critic",), "critic")):
        grads = gradients(loss, loss(batch_for(actor)), *names)
        for name, grad in grads.items():
            if name.startswith(moved):
                assert grad.abs().max() > 0
            else:
                assert grad is None or grad.abs().max() == 0


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_forward_is_actor_loss_and_critic_loss(surrogate):
    actor, critic = networks("categorical")
    loss, batch = surrogate_loss(actor, critic, surrogate), batch_for(actor)
    both = loss(batch)
    parts = loss.actor_loss(batch).update(loss.critic_loss(batch))
    assert set(both.keys()) == set(parts.keys()) >= set(loss.out_keys)
    for key in both.keys():
        torch.testing.assert_close(both[key], parts[key])


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_an_entropy_without_a_coefficient_is_logged_and_has_no_gradient(coefficient):
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    out = surrogate_loss(actor, critic, entropy_coeff=coefficient)(batch)
    assert out["loss_entropy"].requires_grad == (coefficient > 0)
    torch.testing.assert_close(out["loss_entropy"].detach(), -coefficient * out["entropy"])
    expected = actor.get_dist(batch.select("observation")).entropy().mean()
    torch.testing.assert_close(out["entropy"], expected)


def test_without_a_critic_only_the_policy_is_trained():
    actor, _ = networks("categorical")
    loss = surrogate_loss(actor, None, critic_coeff=None)
    assert "loss_critic" not in loss(batch_for(actor)).keys()


def test_statistics_of_the_ratio():
    actor, critic = networks("categorical")
    batch = batch_for(actor, (4,), distance=0.0)
    x = torch.zeros(4, N, dtype=torch.float64)
    x[0, 0], x[1, 0], x[2, 0] = torch.tensor([0.83, 1.25, 3.0]).log()
    batch["log_prob"] = batch["log_prob"] - x
    out = surrogate_loss(actor, critic, "reciprocal")(batch)
    assert out["ratio_min"].item() == pytest.approx(0.83)
    assert out["ratio_max"].item() == pytest.approx(3.0)
    assert out["clip_fraction"].item() == pytest.approx(2 / 12)  # 1.25 and 3 leave 1 ± .2
    assert out["outside_fraction"].item() == pytest.approx(2 / 12)  # .83 and 3 leave [.845, 1.291]
    assert out["kl_approx"].item() == pytest.approx(-x.mean().item())


def test_two_epsilons():
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    out = surrogate_loss(actor, critic, "quadratic", epsilon=(0.1, 0.3))(batch)["loss_objective"]
    negative = batch["advantage"] < 0
    parts = [
        surrogate_loss(actor, critic, "quadratic", epsilon=e, reduction="none")(batch)["loss_objective"]
        for e in (0.1, 0.3)
    ]
    expected = torch.where(negative.squeeze(-1), *parts).mean()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)
    as_list = surrogate_loss(actor, critic, "quadratic", epsilon=[0.1, 0.3])(batch)["loss_objective"]
    assert torch.equal(as_list, out)


class FromHost(TorchDispatchMode):
    """Counts the operations that make a tensor of the host's data, or a number of a tensor's."""

    NAMES = ("lift_fresh", "_to_copy", "scalar_tensor", "_local_scalar_dense", "copy_")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_pair_of_epsilons_copies_nothing_from_the_host(surrogate):
    """In every minibatch, that is: a copy would wait on a GPU."""
    actor, critic = networks("categorical")
    batch, counts = batch_for(actor), {}
    for epsilon in (0.2, (0.1, 0.2)):
        loss = surrogate_loss(actor, critic, surrogate, epsilon=epsilon)
        with FromHost() as mode:
            loss(batch)["loss_objective"].backward()
        counts[epsilon] = mode.count
    assert counts[0.1, 0.2] == counts[0.2]
    with FromHost() as mode:
        torch.tensor(0.1)
        assert mode.count == 1


def test_statistics_leave_absent_agents_out():
    actor, critic = networks("categorical")
    batch = batch_for(actor, (4,), distance=0.0)
    batch["log_prob"] = batch["log_prob"] - torch.tensor(1.35, dtype=torch.float64).log()
    batch["mask"] = torch.tensor([True, True, False]).expand(4, N).clone()
    out = surrogate_loss(actor, critic)(batch)
    for key, value in {"ratio_min": 1.35, "ratio_max": 1.35, "ESS": 1.0, "clip_fraction": 1.0}.items():
        assert out[key].item() == pytest.approx(value), key


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_effective_sample_size_without_a_dimension_of_agents(shape):
    actor, critic = networks("categorical")
    batch = batch_for(actor, shape).select("observation")
    batch["observation"] = batch["observation"][..., 0, :]
    with torch.no_grad():
        actor(batch)
    x = 0.5 * torch.randn(shape, dtype=torch.float64)
    batch["log_prob"] = batch["log_prob"] - x
    batch["advantage"] = batch["value_target"] = torch.ones(*shape, 1, dtype=torch.float64)
    batch["mask"] = torch.rand(shape) < 0.7
    for td, log_weight in ((batch.exclude("mask"), x), (batch, x[batch["mask"]])):
        weight = log_weight.exp()
        expected = weight.sum().square() / weight.square().sum() / weight.numel()
        torch.testing.assert_close(surrogate_loss(actor, critic)(td)["ESS"], expected)


def test_the_factor_weighs_each_step():
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    batch["factor"] = torch.linspace(0.2, 3, 64, dtype=torch.float64).unsqueeze(-1)
    gains = -surrogate_loss(actor, critic, reduction="none")(batch.exclude("factor"))["loss_objective"]
    for kind, weight in (("full", batch["factor"]), ("capped", batch["factor"].clamp(max=1))):
        out = surrogate_loss(actor, critic, factor=kind)(batch)
        torch.testing.assert_close(out["loss_objective"], -(weight * gains).mean())
    with pytest.raises(ValueError, match="one number per step"):
        surrogate_loss(actor, critic)(batch.set("factor", batch["log_prob"]))


def test_called_with_tensors_like_other_torchrl_losses():
    actor, critic = networks("categorical")
    batch, loss = batch_for(actor), surrogate_loss(actor, critic)
    batch["next"] = {"reward": torch.zeros(64, N, 1), "done": torch.zeros(64, N, 1, dtype=torch.bool)}
    batch["next", "terminated"] = batch["next", "done"].clone()
    batch["next", "observation"] = batch["observation"].clone()
    inputs = {"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in loss.in_keys}
    loss.set_keys(advantage="advantage")
    got = loss(**inputs)
    assert len(got) == len(loss.out_keys)
    assert all(value.isfinite().all() for value in got)


def test_the_critic_phase_loss_trains_the_critic_alone():
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    whole = surrogate_loss(actor, critic)
    loss = CriticPhaseLoss(actor, critic, surrogate="clip", critic_coeff=0.5, loss_critic_type="l2")
    out = loss(batch)
    assert set(loss.out_keys) <= set(out.keys())
    assert "loss_objective" not in out.keys()
    torch.testing.assert_close(out["loss_critic"], whole(batch)["loss_critic"])
    assert whole.state_dict().keys() == loss.state_dict().keys()


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_absent_agents_change_nothing(surrogate):
    actor, critic = networks("categorical")
    loss, batch = surrogate_loss(actor, critic, surrogate), batch_for(actor)
    batch["mask"] = torch.rand(64, N) < 0.7
    other = batch.clone()
    absent = ~batch["mask"]
    other["log_prob"][absent] = -torch.inf
    other["advantage"][absent] = torch.nan
    other["value_target"][absent] = 1e30
    results = []
    for td in (batch, other):
        out = loss(td)
        results.append((out, gradients(loss, out, "loss_objective", "loss_entropy", "loss_critic")))
    (out, grads), (expected, expected_grads) = results
    for key in out.keys():
        if key != "explained_variance":  # the host's own, without a mask
            torch.testing.assert_close(out[key], expected[key], msg=key)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])


def test_shapes_that_would_broadcast_are_refused():
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    for key, value in (
        ("log_prob", batch["log_prob"].unsqueeze(-1)),
        ("advantage", batch["advantage"].mean(-2)),
        ("advantage", batch["advantage"].squeeze(-1)),
    ):
        with pytest.raises(ValueError, match="broadcast and mix agents"):
            surrogate_loss(actor, critic)(batch.clone().set(key, value))


def test_bad_settings():
    actor, critic = networks("categorical")
    with pytest.raises(ValueError, match=r"epsilon=0\.5"):
        SurrogateLoss(actor, critic, surrogate="reciprocal", epsilon=0.5)
    with pytest.raises(ValueError, match="epsilon=-1"):
        SurrogateLoss(actor, critic, surrogate="quadratic", epsilon=(-1, 0.2))
    with pytest.raises(ValueError, match="Unknown surrogate"):
        SurrogateLoss(actor, critic, surrogate="none")
    with pytest.raises(ValueError, match="normalize_advantage"):
        SurrogateLoss(actor, critic, surrogate="clip", normalize_advantage=True)


def test_smooth_l1_is_huber_with_delta_1_and_l2_lacks_the_half():
    """As docs/value.md maps HARL's keys."""
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    batch["value_target"] *= 3
    with torch.no_grad():
        value, target = critic(batch.clone())["state_value"], batch["value_target"]
    losses = {"smooth_l1": nn.functional.huber_loss(value, target, delta=1.0), "l2": (value - target).square().mean()}
    for name, expected in losses.items():
        loss = surrogate_loss(actor, critic, loss_critic_type=name, critic_coeff=1.0)
        torch.testing.assert_close(loss(batch)["loss_critic"].detach(), expected)


def test_values_are_clipped_as_harl_does():
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    with torch.no_grad():
        value = critic(batch.clone())["state_value"]
    old = batch["state_value"] = value + 0.3 * torch.randn_like(value)
    clipped = old + (value - old).clamp(-0.2, 0.2)
    expected = torch.maximum((value - batch["value_target"]) ** 2, (clipped - batch["value_target"]) ** 2).mean()
    out = surrogate_loss(actor, critic, clip_value=0.2, critic_coeff=1.0)(batch)
    torch.testing.assert_close(out["loss_critic"].detach(), expected)
    assert 0 < out["value_clip_fraction"] < 1


def test_missing_advantage_is_named():
    actor, critic = networks("categorical")
    with pytest.raises(KeyError, match="advantage"):
        surrogate_loss(actor, critic).actor_loss(batch_for(actor).exclude("advantage"))


def test_missing_log_prob_is_named():
    actor, critic = networks("categorical")
    with pytest.raises(KeyError, match="log_prob"):
        surrogate_loss(actor, critic)(batch_for(actor).exclude("log_prob"))


def test_importance_weights_multiply_each_agents_gain():
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    loss = surrogate_loss(actor, critic, reduction="none")
    plain = loss(batch)["loss_objective"]
    batch["importance_weight"] = torch.rand(64, N, dtype=torch.float64)
    torch.testing.assert_close(loss(batch)["loss_objective"], plain * batch["importance_weight"])
    batch["factor"] = torch.full((64, 1), 2.0, dtype=torch.float64)
    torch.testing.assert_close(loss(batch)["loss_objective"], 2 * plain * batch["importance_weight"])
    with pytest.raises(ValueError, match="one number per agent"):
        loss(batch.set("importance_weight", batch["importance_weight"].unsqueeze(-1)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("surrogate", ["clip", "quadratic", "reciprocal"])
@pytest.mark.parametrize("old", [torch.nan, torch.inf, -torch.inf])
def test_masked_samples_whose_importance_weight_is_not_finite_count_nowhere(surrogate, old, masked):
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    loss = surrogate_loss(actor, critic, surrogate=surrogate, entropy_coeff=0.01)
    batch["importance_weight"] = torch.rand(64, N, dtype=torch.float64) + 0.5
    keep = torch.rand(64, N) < 0.7
    if masked:
        batch["mask"] = torch.rand(64, N) < 0.7
    expected = batch.set("mask", keep & batch["mask"] if masked else keep).clone()
    batch["importance_weight"][~keep] = torch.nan
    batch["log_prob"][~keep] = old
    gradients = []
    for data in (batch, expected):
        out = loss.actor_loss(data)
        total = out["loss_objective"] + out["loss_entropy"]
        gradients.append(torch.autograd.grad(total, list(loss.actor_network_params.values(True, True))))
        assert total.isfinite()
    torch.testing.assert_close(*gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0])
    for name in ("loss_objective", "loss_entropy", "kl_approx", "ratio_min", "ratio_max", "ESS"):
        torch.testing.assert_close(loss.actor_loss(batch)[name], loss.actor_loss(expected)[name])


def test_values_of_absent_agents_are_regressed_only_if_asked():
    actor, critic = networks("categorical")
    batch = batch_for(actor)
    batch["mask"] = torch.rand(64, N) < 0.5
    error = (critic(batch.clone())["state_value"] - batch["value_target"]).squeeze(-1).square()
    for asked, expected in ((False, error[batch["mask"]].mean()), (True, error.mean())):
        loss = surrogate_loss(actor, critic, critic_coeff=1.0, critic_on_absent=asked)
        torch.testing.assert_close(loss(batch)["loss_critic"], expected)
