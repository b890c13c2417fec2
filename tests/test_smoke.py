"""Every algorithm runs, on every kind of action, policy, model and environment that BenchMARL's MAPPO takes.

These tests also assert what a run must show: finite parameters that moved, and the log keys of the docs.
"""

import math

import pytest
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.models import CnnConfig, GnnConfig, GruConfig, LstmConfig, MlpConfig
from benchmarl.models.common import SequenceModelConfig
from cases import CASES, MAIN, POSITIONS, by_family
from conftest import policy_parameters, scalars
from environments import StandInTask
from problems import CNN, LAYERS, RNN

all_cases = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
main_cases = pytest.mark.parametrize("case", MAIN, ids=[case.id for case in MAIN])
family_cases = pytest.mark.parametrize("case", by_family(MAIN))
slow = pytest.mark.slow


def gnn():  # first, since as a critic it must see the agents apart
    from torch_geometric.nn.conv import GATv2Conv

    return SequenceModelConfig(
        model_configs=[
            GnnConfig(topology="full", self_loops=True, gnn_class=GATv2Conv),
            MlpConfig(num_cells=[4], **LAYERS),
        ],
        intermediate_sizes=[5],
    )


MODELS = {
    "gru": lambda: GruConfig(**RNN),
    "lstm": lambda: LstmConfig(**RNN),
    "gnn": gnn,
    "gru-mlp": lambda: SequenceModelConfig(
        model_configs=[GruConfig(**RNN), MlpConfig(num_cells=[4], **LAYERS)], intermediate_sizes=[5]
    ),
}


def check_trained(case, experiment, groups=("agents",)):
    after = policy_parameters(experiment)
    assert all(p.isfinite().all() for p in after.values())
    for optimizers in experiment.optimizers.values():
        for optimizer in optimizers.values():
            assert optimizer.state, "no step was made"
    logged = scalars(experiment)
    for group in groups:
        for key in (*case.logged, "loss_critic", "skipped_steps"):
            values = logged[f"train_{group}_{key}"]
            assert len(values) == experiment.n_iters_performed
            assert all(math.isfinite(value) for value in values), key
        assert set(logged[f"train_{group}_skipped_steps"]) == {0}
        if case.sequential:
            check_positions(logged, group, len(experiment.group_map[group]))
        else:
            assert min(logged[f"train_{group}_ratio_min"]) > 0
            assert all(0 < value <= 1 + 1e-5 for value in logged[f"train_{group}_ESS"])


def check_positions(logged, group, n_agents):
    by_position = {key: [] for key in POSITIONS}
    for position in range(n_agents):
        for key, values in by_position.items():
            values.append(logged[f"train_{group}_policy_{key}_position_{position}"])
    for order in zip(*by_position["order"], strict=True):
        assert sorted(order) == list(range(n_agents))
    assert set(by_position["factor_mean"][0]) == {1}, "the first agent of the order meets no factor"


@all_cases
@pytest.mark.parametrize(
    ("share", "continuous"),
    [(True, False), (False, True), pytest.param(True, True, marks=slow), pytest.param(False, False, marks=slow)],
    ids=["shared-discrete", "separate-continuous", "shared-continuous", "separate-discrete"],
)
def test_vmas(case, continuous, share, run):
    settings = {"prefer_continuous_actions": continuous, "share_policy_params": share}
    experiment = run(case.config(), evaluation=True, **settings)
    check_trained(case, experiment)
    assert len(scalars(experiment)["eval_reward_episode_reward_mean"]) == 2


@main_cases
def test_recurrent_models(case, run):
    check_trained(case, run(case.config(), model=MODELS["gru"](), critic=MODELS["gru"]()))


@family_cases
def test_graph_models(case, run):  # others in the matrix
    check_trained(case, run(case.config(), model=MODELS["gnn"](), critic=MODELS["gnn"]()))


@main_cases
def test_masked_actions_with_state(case, run):
    check_trained(case, run(case.config(), task=StandInTask(mask=True, state=True)))


@family_cases
def test_images(case, run):
    check_trained(case, run(case.config(), task=StandInTask(rgb=True), model=CnnConfig(**CNN)))


@family_cases
def test_absent_agents(case, run):
    check_trained(case, run(case.config(), task=StandInTask(absent=True)))


@family_cases
def test_several_groups(case, run):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    task.config.update(max_steps=5)
    experiment = run(case.config(), task=task)
    assert len(experiment.group_map) == 2
    check_trained(case, experiment, experiment.group_map)


@family_cases
def test_unsquashed_normal_separate_critics_minibatch_advantage(case, run):
    separate = case.name != "gpae"  # which refuses separate critics
    config = case.config(use_tanh_normal=False, share_param_critic=not separate, minibatch_advantage=True)
    check_trained(case, run(config))


@family_cases
def test_normalized_advantage_with_entropy_bonus(case, run):
    over = "per_agent" if case.name == "gpae" else "batch"  # GPAE's own is batch
    check_trained(case, run(case.config(normalize_advantage=over, **case.entropy)))


@family_cases
def test_collect_with_grad(case, run):
    check_trained(case, run(case.config(), collect_with_grad=True))


@family_cases
def test_ensemble_trains_the_critic_it_reads(case, make_experiment):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    task.config.update(max_steps=5)
    rollouts = {"n_rollouts": 1} if case.name == "gpae" else {}  # an ensemble keeps no past batches
    config = EnsembleAlgorithmConfig({"adversary": case.config(**rollouts), "agent": MappoConfig.get_from_yaml()})
    experiment = make_experiment(config, task=task)
    inner = experiment.algorithm.algorithms_map["adversary"]
    assert inner.get_loss_and_updater("adversary")[0] is experiment.losses["adversary"]
    experiment.run()
    check_trained(case, experiment, ["adversary"])
    assert inner.get_loss_and_updater("adversary")[0] is experiment.losses["adversary"]


@family_cases
def test_learns(case, run):
    """Agents are paid for the action that they are shown: after 20 or 30 small iterations most of them know it."""
    experiment = run(
        case.config(),
        task=StandInTask(),
        max_n_iters=30 if case.natural else 20,
        on_policy_n_minibatch_iters=5,
        on_policy_minibatch_size=40,
        lr=0.04,
    )
    reward = scalars(experiment)["collection_agents_reward_episode_reward_mean"]
    assert reward[0] < 2.5  # chance is 5 / 4
    assert sum(reward[-5:]) / 5 > 3.7


@pytest.mark.gpu
@all_cases
@pytest.mark.parametrize(("sampling", "training"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_cuda(case, sampling, training, run):
    devices = {"train_device": training, "buffer_device": training, "sampling_device": sampling}
    experiment = run(case.config(), evaluation=True, **devices)
    check_trained(case, experiment)
    assert len(scalars(experiment)["eval_reward_episode_reward_mean"]) == 2
    assert next(experiment.losses["agents"].parameters()).device.type == training
