"""What the configuration says reaches the loss; with the clip in place of the penalty it is BenchMARL's MAPPO."""

import pytest
import torch
from benchmarl.algorithms import MappoConfig
from cases import configured
from conftest import policy_parameters, scalars

from benchmarl_trust import ClipHappoConfig, HappoConfig, MarsConfig, MaspoConfig
from benchmarl_trust.functional import normalize_advantage

MAPPO = {
    "share_param_critic": False,
    "entropy_coef": 0.02,
    "critic_coef": 0.7,
    "loss_critic_type": "smooth_l1",
    "lmbda": 0.6,
    "scale_mapping": "exp",
    "use_tanh_normal": False,
    "minibatch_advantage": True,
}


@pytest.mark.parametrize("changed", ["nothing", *MAPPO])
def test_with_the_clip_it_is_mappo(changed, run):
    settings = {} if changed == "nothing" else {changed: MAPPO[changed]}
    mappo = configured(MappoConfig, clip_epsilon=0.15, **settings)
    ours = configured(MarsConfig, surrogate="clip", epsilon=0.15, **settings)
    one, other = (run(config, lr=0.01, gamma=0.8) for config in (mappo, ours))
    for p, q in zip(one.losses["agents"].parameters(), other.losses["agents"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "settings", "surrogate", "epsilon", "factor"),
    [
        (MarsConfig, {"epsilon": 0.3}, "reciprocal", (0.3, 0.3), None),
        (MarsConfig, {"epsilon": 0.7, "surrogate": "log"}, "log", (0.7, 0.7), None),
        (MaspoConfig, {"epsilon": 0.3}, "quadratic", (0.3, 0.3), None),
        (MaspoConfig, {"epsilon": 0.3, "epsilon_negative": 0.1}, "quadratic", (0.1, 0.3), None),
        (HappoConfig, {"epsilon": 0.3}, "clip", (0.3, 0.3), "full"),
        (HappoConfig, {"epsilon": 0.3, "surrogate": "reciprocal"}, "reciprocal", (0.3, 0.3), "full"),
        (ClipHappoConfig, {"epsilon": 0.3, "epsilon_negative": 0.2}, "clip", (0.2, 0.3), "capped"),
    ],
)
def test_the_configuration_reaches_the_loss(config, settings, surrogate, epsilon, factor, make_experiment):
    experiment = make_experiment(configured(config, **settings))
    loss = experiment.losses["agents"]
    assert (loss.surrogate, loss.epsilon) == (surrogate, epsilon)
    if config in (HappoConfig, ClipHappoConfig):
        step = experiment.algorithm._gradient_step()
        assert (step.surrogate, step.epsilon) == (surrogate, epsilon)
    assert experiment.algorithm.factor == factor


@pytest.mark.parametrize("over", ["none", "batch", "per_agent"])
def test_advantages_are_mappos_normalised(over, make_experiment):
    ours = make_experiment(configured(MarsConfig, normalize_advantage=over))
    batch = next(iter(ours.collector))
    mappo = make_experiment(MappoConfig.get_from_yaml())
    raw = mappo.algorithm.process_batch("agents", batch.clone())["agents", "advantage"]
    got = ours.algorithm.process_batch("agents", batch.clone())["agents", "advantage"]
    torch.testing.assert_close(got, normalize_advantage(raw, over))


@pytest.mark.parametrize("model", ["gru", "lstm", "gru-mlp"])
def test_ratios_of_recurrent_policies_start_at_one(model, make_experiment):
    """Also where an episode goes on from one batch to the next and collection had a state that training has not."""
    from test_smoke import MODELS

    experiment = make_experiment(
        MarsConfig.get_from_yaml(), model=MODELS[model](), critic=MODELS[model](), max_n_iters=3
    )
    collected = [batch.clone() for batch in experiment.collector][-1]
    loss = experiment.losses["agents"]
    with torch.no_grad():
        for p in loss.parameters():
            p += 0.1
    stale = experiment.algorithm.loss_class.current_log_prob(loss, collected) - collected["agents", "log_prob"]
    assert stale.abs().max() > 1e-3
    processed = experiment.algorithm.process_batch("agents", collected)
    out = loss(processed)
    assert out["ratio_min"].item() == pytest.approx(1, abs=1e-5)
    assert out["ratio_max"].item() == pytest.approx(1, abs=1e-5)


def test_extremes_over_the_whole_iteration_are_logged(run):
    logged = scalars(run(MarsConfig.get_from_yaml(), lr=0.01))
    for smallest, mean in zip(logged["train_agents_policy_ratio_min"], logged["train_agents_ratio_min"], strict=True):
        assert 0 < smallest < mean < 1


def test_parameters_move_as_they_would_without_the_guard(make_experiment):
    """A guarded experiment and one whose hooks are removed end at the same parameters."""
    results = []
    for guarded in (True, False):
        experiment = make_experiment(MarsConfig.get_from_yaml())
        if not guarded:
            for optimizer in experiment.optimizers["agents"].values():
                optimizer._optimizer_step_pre_hooks.clear()
        experiment.run()
        results.append(policy_parameters(experiment))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
