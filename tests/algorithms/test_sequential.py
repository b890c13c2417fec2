"""HAPPO inside BenchMARL: identities with MAPPO, teams, orders, what is refused, what is not finite."""

import contextlib
import math

import pytest
import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback
from benchmarl.models import GnnConfig, MlpConfig
from benchmarl.models.common import SequenceModelConfig
from cases import CASES, by_family, configured
from conftest import policy_parameters, scalars
from environments import CrewTask, StandInTask

from benchmarl_trust import ALGORITHMS, ClipHappoConfig, HappoConfig
from benchmarl_trust.algorithms import sequential_gradient as sequential_module

sequential = pytest.mark.parametrize(
    "case", [case for case in CASES if case.sequential], ids=[case.id for case in CASES if case.sequential]
)
sequential_families = pytest.mark.parametrize("case", by_family(case for case in CASES if case.sequential))
families_in_teams = pytest.mark.parametrize("case", by_family(case for case in CASES if case.teams))


def happo(config=HappoConfig, **settings):
    return configured(config, **settings)


def cut(task):
    task = task.get_from_yaml()
    task.config.update(max_steps=5)
    return task


def speaker_listener():
    return cut(VmasTask.SIMPLE_SPEAKER_LISTENER)


class TestIdentities:
    @pytest.mark.parametrize("config", [HappoConfig, ClipHappoConfig])
    @pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
    def test_one_agent_is_ppo(self, config, share, make_experiment):
        """With one agent HAPPO is MAPPO, parameter for parameter, over iterations."""
        settings = {"on_policy_minibatch_size": 40, "on_policy_n_minibatch_iters": 5, "share_policy_params": share}
        results = []
        for algorithm in (MappoConfig.get_from_yaml(), happo(config)):
            # discrete actions: MAPPO samples the entropy of others, which would move the generator
            experiment = make_experiment(
                algorithm, task=StandInTask(n_agents=1), prefer_continuous_actions=False, max_n_iters=3, **settings
            )
            start = policy_parameters(experiment)
            experiment.run()
            results.append((start, policy_parameters(experiment), list(experiment.losses["agents"].parameters())))
        (start, mappo, mappo_all), (other_start, ours, ours_all) = results
        assert all(torch.equal(start[name], other_start[name]) for name in start)
        assert all((start[name] - mappo[name]).abs().max() > 1e-3 for name in start)
        for name in mappo:
            torch.testing.assert_close(ours[name], mappo[name], rtol=1e-4, atol=1e-5)
        for p, q in zip(ours_all, mappo_all, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
    def test_two_phases_without_a_factor_equal_mappo(self, continuous, make_experiment):
        """All agents at once, M = 1, one Adam and one clip for all: then the two phases are stock MAPPO.

        Actors and critic share no parameter and the advantages are fixed, so their steps commute.
        """
        settings = {"on_policy_minibatch_size": 40, "on_policy_n_minibatch_iters": 5, "adam_eps": 1e-3}
        settings |= {"prefer_continuous_actions": continuous}
        mappo = make_experiment(MappoConfig.get_from_yaml(), **settings)
        ours = make_experiment(happo(), **settings)
        batch = next(iter(mappo.collector)).exclude("info", ("agents", "info"), ("next", "agents", "info"))

        processed = mappo.algorithm.process_batch("agents", batch.clone()).reshape(-1)
        mappo.replay_buffers["agents"].extend(processed)

        def joint_policy_phase(team):
            algorithm = ours.algorithm
            from benchmarl_trust.policy import remember_old_policy

            agents = algorithm._agents(team)
            for agent in agents:
                remember_old_policy(agent)
            leaves = [p for agent in agents for p in agent.policy.parameters]
            stacked = list(ours.losses["agents"].actor_network_params.flatten_keys().values())
            adam = torch.optim.Adam(stacked, lr=ours.config.lr, eps=ours.config.adam_eps)
            step = algorithm._gradient_step()
            for _ in range(5):
                losses = [step.loss(a, a.data, torch.ones_like(a.data["advantage"])) for a in agents]
                gradients = torch.autograd.grad(sum(losses) / len(losses), leaves)
                per_agent = len(stacked)
                for k, p in enumerate(stacked):
                    p.grad = torch.stack([gradients[i * per_agent + k] for i in range(len(agents))])
                torch.nn.utils.clip_grad_norm_(stacked, ours.config.clip_grad_val)
                adam.step()

        ours.algorithm._policy_phase = joint_policy_phase
        ours.replay_buffers["agents"].extend(ours.algorithm.process_batch("agents", batch.clone()).reshape(-1))
        for _ in range(5):
            mappo._optimizer_loop("agents")
            ours._optimizer_loop("agents")
        before = policy_parameters(make_experiment(MappoConfig.get_from_yaml(), **settings))
        for (name, p), q in zip(
            mappo.losses["agents"].named_parameters(), ours.losses["agents"].parameters(), strict=True
        ):
            torch.testing.assert_close(q, p, rtol=1e-4, atol=2e-6, msg=name)
        moved = policy_parameters(mappo)
        assert all((before[name] - moved[name]).abs().max() > 1e-4 for name in before)

    @staticmethod
    def mappo(case):
        """With as many critics as the case has."""
        config = MappoConfig.get_from_yaml()
        config.share_param_critic = case.config().share_param_critic
        return config

    @sequential
    def test_initial_parameters_are_those_of_mappo(self, case, make_experiment):
        one, other = make_experiment(self.mappo(case)), make_experiment(case.config())
        for p, q in zip(one.losses["agents"].parameters(), other.losses["agents"].parameters(), strict=True):
            assert torch.equal(p, q)

    @sequential
    def test_checkpoints_have_actor_and_critic(self, case, make_experiment):
        one, other = make_experiment(self.mappo(case)), make_experiment(case.config())
        parameters = {k for k in one.losses["agents"].state_dict() if "network_params" in k}
        ours = other.losses["agents"].state_dict()  # a normalised critic has its network and statistics
        assert parameters <= {k.replace("critic_network_params.network.", "critic_network_params.") for k in ours}


class TestOrders:
    @pytest.mark.parametrize(("order", "expected"), [("fixed", [0, 1, 2]), ([2, 0, 1], [2, 0, 1])])
    def test_fixed(self, order, expected, run):
        logged = scalars(run(happo(order=order)))
        for position, agent in enumerate(expected):
            assert logged[f"train_agents_policy_order_position_{position}"] == [agent, agent]

    def test_an_order_must_fit_the_groups_of_its_own_algorithm_alone(self, make_experiment):
        adversaries, agent = happo(order=[2, 0, 1]), happo(order="fixed")
        experiment = make_experiment(
            EnsembleAlgorithmConfig({"adversary": adversaries, "agent": agent}), task=simple_tag()
        )
        experiment.run()
        assert scalars(experiment)["train_adversary_policy_order_position_0"] == [2, 2]

    def test_random_orders_are_fresh_and_seeded(self, run):
        def orders(seed):
            logged = scalars(run(happo(), seed=seed, max_n_iters=6))
            return list(zip(*(logged[f"train_agents_policy_order_position_{k}"] for k in range(3)), strict=True))

        first = orders(0)
        assert first == orders(0)
        assert first != orders(1)
        assert len(set(first)) > 2

    def test_own_epochs_and_minibatches(self, make_experiment):
        experiment = make_experiment(happo(actor_epochs=3, actor_minibatch_size=15))
        experiment.run()
        steps = [s["step"] for o in experiment.optimizers["agents"].values() for s in o.state.values()]
        per_agent, critic = 2 * 3 * 3, 2 * 2 * 2  # iterations x epochs x minibatches of 40 frames
        assert sorted({int(step) for step in steps}) == [critic, per_agent]

    def test_recurrent_minibatches_are_whole_sequences(self, make_experiment):
        from test_smoke import MODELS

        experiment = make_experiment(happo(), model=MODELS["gru"](), critic=MODELS["gru"]())
        experiment.run()  # 4 sequences of 10 steps; 20 frames are 2 sequences
        steps = {int(s["step"]) for s in experiment.optimizers["agents"]["loss_objective_agent_0"].state.values()}
        assert steps == {2 * 2 * 2}


class TestAdvantages:
    def agents(self, make_experiment, **settings):
        experiment = make_experiment(happo(**settings))
        batch = next(iter(experiment.collector))
        batch["next", "agents", "reward"] = torch.randn_like(batch["next", "agents", "reward"])
        seen = {}
        algorithm = experiment.algorithm
        algorithm._policy_phase = lambda team: seen.update(agents=algorithm._agents(team))
        processed = algorithm.process_batch("agents", batch)
        raw = processed["agents", "advantage"].reshape(-1, 3)
        return raw, torch.stack([agent.data["advantage"] for agent in seen["agents"]], -1)

    def test_per_agent_is_that_of_the_critic(self, make_experiment):
        raw, used = self.agents(make_experiment)
        assert torch.equal(used, raw)

    def test_team_is_the_mean_over_agents(self, make_experiment):
        raw, used = self.agents(make_experiment, advantage="team")
        torch.testing.assert_close(used, raw.mean(-1, keepdim=True).expand(-1, 3))

    def test_normalization_comes_after_the_team_mean(self, make_experiment):
        raw, used = self.agents(make_experiment, advantage="team", normalize_advantage="batch")
        team = raw.mean(-1)
        torch.testing.assert_close(used[:, 0], (team - team.mean()) / team.std(correction=0))

    def test_per_agent_normalization(self, make_experiment):
        _, used = self.agents(make_experiment, normalize_advantage="per_agent")
        torch.testing.assert_close(used.std(0, correction=0), torch.ones(3))


class PayAdversaries(Callback):
    """Pays the adversaries of simple_tag as if they had caught the agent."""

    def on_batch_collected(self, batch):
        batch["next", "adversary", "reward"][0, 1] += 10


class Freeze(Callback):
    """Trains a group no longer, from an iteration on."""

    def __init__(self, group, iteration):
        super().__init__()
        self.group, self.iteration = group, iteration

    def on_batch_collected(self, batch):
        if self.experiment.n_iters_performed == self.iteration:
            del self.experiment.train_group_map[self.group]
            self.parameters = [p.detach().clone() for p in self.experiment.losses[self.group].parameters()]


class TestTeams:
    @families_in_teams
    def test_the_factor_crosses_groups(self, case, run):
        experiment = run(case.config(teams=[["speaker", "listener"]]), task=speaker_listener(), max_n_iters=6)
        logged = scalars(experiment)
        name = "train_speaker+listener_policy"
        orders = list(zip(logged[f"{name}_order_position_0"], logged[f"{name}_order_position_1"], strict=True))
        if case.name == "hatrpog" or case.overrides.get("order") == "score":  # by score, whichever that is
            assert set(orders) <= {(0, 1), (1, 0)}
        else:
            assert set(orders) == {(0, 1), (1, 0)}
        assert set(logged[f"{name}_factor_mean_position_0"]) == {1}
        assert all(value != 1 for value in logged[f"{name}_factor_max_position_1"])
        for group in ("speaker", "listener"):
            assert len(logged[f"train_{group}_policy_kl_agent_0"]) == 6
            assert set(logged[f"train_{group}_skipped_steps"]) == {0}

    @families_in_teams
    def test_agents_that_are_absent_leave_the_factor_alone(self, case, make_experiment):
        """The second worker is gone in three steps of five: its ratio, by which M is multiplied, is 1 there."""
        experiment = make_experiment(case.config(teams=[["scout", "workers"]]), task=CrewTask(), max_n_iters=3)
        algorithm, seen = experiment.algorithm, []
        original = algorithm._log

        def log(team, agents, infos, chunk):
            seen.append((agents, infos))
            original(team, agents, infos, chunk)

        algorithm._log = log
        experiment.run()
        logged = scalars(experiment)
        assert len(seen) == 3
        for agents, infos in seen:
            absent = ~next(agent for agent in agents if "mask" in agent.data and not agent.data["mask"].all()).data[
                "mask"
            ]
            assert absent.float().mean() == 0.6
            for info in infos:
                outside = absent if info.agent == 2 else torch.zeros_like(absent)
                assert (info.log_ratio[outside] == 0).all()
                assert info.log_ratio[~outside].abs().max() > 0
        for group in ("scout", "workers"):
            assert set(logged[f"train_{group}_skipped_steps"]) == {0}

    @families_in_teams
    def test_an_adversary_outside_the_team_is_a_team_of_its_own(self, case, make_experiment):
        """In simple_crypto alice and bob have one reward and eve another; a callback freezes eve."""
        experiment = make_experiment(
            case.config(teams=[["alice", "bob"]]),
            task=cut(VmasTask.SIMPLE_CRYPTO),
            callbacks=[Freeze("eve", iteration=1)],
            max_n_iters=3,
        )
        experiment.run()
        logged = scalars(experiment)
        assert set(logged["train_alice+bob_policy_factor_mean_position_0"]) == {1}
        assert all(value != 1 for value in logged["train_alice+bob_policy_factor_max_position_1"])
        assert "train_eve_policy_factor_mean_position_1" not in logged
        assert len(logged["train_bob_policy_kl"]) == 3
        assert len(logged["train_eve_policy_kl"]) == 1
        frozen = experiment.callbacks[0].parameters
        assert all(torch.equal(p, q) for p, q in zip(frozen, experiment.losses["eve"].parameters(), strict=True))

    def test_without_teams_no_factor_crosses(self, run):
        logged = scalars(run(happo(), task=speaker_listener()))
        for group in ("speaker", "listener"):
            assert set(logged[f"train_{group}_policy_factor_mean_position_0"]) == {1}

    def test_shared_groups_in_a_team(self, run):
        with pytest.warns(UserWarning, match="share policy parameters"):
            experiment = run(happo(teams=[["adversary"]]), task=simple_tag(), share_policy_params=True, max_n_iters=1)
        assert all(p.isfinite().all() for p in policy_parameters(experiment).values())

    def test_unequal_rewards_are_refused(self, make_experiment):
        experiment = make_experiment(
            happo(teams=[["adversary", "agent"]]), task=simple_tag(), callbacks=[PayAdversaries()]
        )
        before = policy_parameters(experiment)
        with pytest.raises(ValueError, match="adversary and agent are paid differently"):
            experiment.run()
        assert all(torch.equal(before[k], v) for k, v in policy_parameters(experiment).items())

    def test_a_frozen_group_in_a_team_is_refused(self, make_experiment):
        experiment = make_experiment(happo(teams=[["speaker", "listener"]]), task=speaker_listener())
        del experiment.train_group_map["speaker"]
        with pytest.raises(ValueError, match=r"speaker\+listener the group speaker is not trained"):
            experiment.run()

    def test_a_frozen_group_outside_any_team_stays_as_it_is(self, make_experiment):
        experiment = make_experiment(happo(), task=speaker_listener())
        del experiment.train_group_map["speaker"]
        before = [p.clone() for p in experiment.losses["speaker"].parameters()]
        experiment.run()
        assert all(torch.equal(p, q) for p, q in zip(experiment.losses["speaker"].parameters(), before, strict=True))

    @pytest.mark.parametrize(
        ("teams", "message"),
        [
            ([["speaker", "singer"]], r"names \['singer'\]; the groups of this task are"),
            ([["speaker"], ["listener", "speaker"]], "in one team only"),
        ],
    )
    def test_bad_teams(self, teams, message, make_experiment):
        with pytest.raises(ValueError, match=message):
            make_experiment(happo(teams=teams), task=speaker_listener())

    def test_no_teams_in_an_ensemble(self, make_experiment):
        ensemble = EnsembleAlgorithmConfig(
            {"speaker": happo(teams=[["speaker", "listener"]]), "listener": MappoConfig.get_from_yaml()}
        )
        with pytest.raises(ValueError, match="cannot be used in an ensemble"):
            make_experiment(ensemble, task=speaker_listener())


def simple_tag():
    return cut(VmasTask.SIMPLE_TAG)


class TestPolicyPhase:
    """What the algorithm hands to the sweep."""

    def seen(self, make_experiment, monkeypatch, config, **settings):
        seen = {}

        def catch(agents, order, step, factor, rows=None, chunk=None, epsilon=None, advantage=None):
            seen.update(agents=agents, order=order, step=step, factor=factor)
            raise StopIteration

        monkeypatch.setattr(sequential_module, "sweep", catch)
        experiment = make_experiment(config, **settings)
        with contextlib.suppress(StopIteration):
            experiment.run()
        return experiment, seen

    @pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
    @pytest.mark.parametrize(("config", "clipped"), [(HappoConfig, "full"), (ClipHappoConfig, "capped")])
    def test_the_cap(self, config, clipped, share, make_experiment, monkeypatch):
        _, seen = self.seen(make_experiment, monkeypatch, happo(config), share_policy_params=share)
        assert seen["factor"] == clipped

    @pytest.mark.parametrize(("by_norm", "norm", "value"), [(True, 3.0, None), (False, None, 3.0)])
    def test_the_step(self, by_norm, norm, value, make_experiment, monkeypatch):
        config = happo(entropy_coef=0.03, epsilon=0.1)
        settings = {"clip_grad_norm": by_norm, "clip_grad_val": 3.0}
        _, seen = self.seen(make_experiment, monkeypatch, config, **settings)
        step = seen["step"].step
        assert (step.surrogate, step.epsilon, step.entropy_coef) == ("clip", (0.1, 0.1), 0.03)
        assert (step.max_grad_norm, step.max_grad_value) == (norm, value)

    def test_masks_are_handed_on(self, make_experiment, monkeypatch):
        _experiment, seen = self.seen(
            make_experiment, monkeypatch, happo(advantage="team"), task=StandInTask(absent=True)
        )
        masks = torch.stack([agent.data["mask"] for agent in seen["agents"]], -1)
        assert masks[:, :2].all()
        assert not masks[:, 2].all()
        advantages = torch.stack([agent.data["advantage"] for agent in seen["agents"]], -1)
        assert torch.equal(advantages[:, 0], advantages[:, 1])

    def test_each_agent_of_a_team_gets_its_own_advantage(self, make_experiment):
        experiment = make_experiment(happo(teams=[["adversary", "agent"]]), task=simple_tag())
        algorithm = experiment.algorithm
        batch = next(iter(experiment.collector))
        sizes = {group: len(agents) for group, agents in experiment.group_map.items()}
        for start, (group, size) in zip((0, sizes["adversary"]), sizes.items(), strict=True):
            column = torch.arange(start, start + size, dtype=torch.float).unsqueeze(-1)
            batch[group, "advantage"] = column.expand(*batch.batch_size, size, 1)
            algorithm._batches[group] = batch
        agents = algorithm._agents(["adversary", "agent"])
        assert [agent.data["advantage"].unique().tolist() for agent in agents] == [[k] for k in range(len(agents))]


def test_logs_of_a_shared_policy_are_of_its_final_state(make_experiment):
    """One minibatch of all frames: its rows are permuted, and it was an agent's turn only once."""
    from benchmarl_trust.policy import forward, log_ratio_of

    experiment = make_experiment(
        happo(actor_epochs=1, actor_minibatch_size=40), share_policy_params=True, max_n_iters=1, lr=0.01
    )
    algorithm, kept = experiment.algorithm, {}
    original = algorithm._agents
    algorithm._agents = lambda team: kept.setdefault("agents", original(team))
    experiment.run()
    logged = scalars(experiment)
    for i, agent in enumerate(kept["agents"]):
        outputs = forward(agent, agent.data)
        kl = agent.policy.kl((agent.data["old_0"], agent.data["old_1"]), outputs).mean()
        assert logged[f"train_agents_policy_kl_agent_{i}"] == [pytest.approx(kl.item(), rel=1e-4)]
        ratio = log_ratio_of(agent.policy, outputs, agent.data).exp()
        outside = ((ratio < 0.8) | (ratio > 1.2)).float().mean().item()
        assert logged[f"train_agents_policy_clip_fraction_agent_{i}"] == [pytest.approx(outside, abs=1e-6)]


def scalars_only(value):
    """Whether no tensor in it, however deep, has more than one entry, or the memory of more."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.untyped_storage().nbytes() <= 8
    return all(map(scalars_only, value)) if isinstance(value, tuple) else True


@pytest.mark.parametrize("name", ["happo", "cliphappo"])
def test_a_shared_policy_keeps_no_outputs_of_its_minibatches(name, make_experiment):
    """There is a turn of every agent in every minibatch: memory would grow with epochs, frames and agents."""
    experiment = make_experiment(ALGORITHMS[name].get_from_yaml(), share_policy_params=True, max_n_iters=1)
    algorithm, seen = experiment.algorithm, []
    log = algorithm._log

    def spy(team, agents, infos, chunk):
        seen.extend(infos)
        log(team, agents, infos, chunk)

    algorithm._log = spy
    experiment.run()
    assert len(seen) == 2 * 2 * 3  # epochs, minibatches, agents
    assert all(map(scalars_only, seen))


class TestSharing:
    def test_a_shared_policy_warns_once_with_the_cure(self, make_experiment):
        with pytest.warns(UserWarning, match="experiment.share_policy_params=False") as record:
            make_experiment(happo(), share_policy_params=True).run()
        assert sum("share policy parameters" in str(w.message) for w in record) == 1

    def test_a_model_that_mixes_agents_is_noticed(self, make_experiment):
        from torch_geometric.nn.conv import GATv2Conv

        layers = {"activation_class": torch.nn.Tanh, "layer_class": torch.nn.Linear}
        model = SequenceModelConfig(
            [
                MlpConfig(num_cells=[8], **layers),
                GnnConfig(topology="full", self_loops=False, gnn_class=GATv2Conv),
                MlpConfig(num_cells=[4], **layers),
            ],
            [5, 3],
        )
        with pytest.warns(UserWarning, match="this model mixes the parameters of the agents"):
            experiment = make_experiment(happo(), model=model, critic=MlpConfig(num_cells=[8], **layers))
        experiment.run()
        assert list(experiment.optimizers["agents"]) == ["loss_objective_shared", "loss_critic"]

    def test_separate_policies_have_an_optimizer_each(self, make_experiment):
        experiment = make_experiment(happo())
        names = [f"loss_objective_agent_{i}" for i in range(3)]
        assert list(experiment.optimizers["agents"]) == [*names, "loss_critic"]
        assert experiment.algorithm._policies["agents"].fast


@pytest.mark.parametrize(
    ("key", "value", "cure"),
    [
        ("epsilon", 0.0, "0 < algorithm.epsilon < 1.0"),
        ("actor_epochs", 0, "at least 1"),
        ("actor_epochs", -2, "at least 1"),
        ("actor_minibatch_size", 41, "between 1 and the 40 frames"),
        ("actor_minibatch_size", 0, "between 1 and the 40 frames"),
        ("advantage", "joint", "per_agent, team"),
        ("normalize_advantage", "agents", "none, batch, per_agent"),
        ("order", [0, 1], "a permutation of 0 ... 2"),
        ("order", [0, 1, 1], "a permutation of 0 ... 2"),
        ("order", [0.0, 1.0, 2.0], "a permutation of 0 ... 2"),
        ("order", [False, True, 2], "a permutation of 0 ... 2"),
        ("order", "score", "random, fixed, semi_greedy"),
        ("order", True, "a permutation of 0 ... n-1"),
        ("order", 2, "a permutation of 0 ... n-1"),
    ],
)
def test_bad_values_are_refused_before_collection(key, value, cure, make_experiment):
    with pytest.raises(ValueError, match=f"algorithm.{key}=") as error:
        make_experiment(happo(**{key: value}))
    assert cure in str(error.value)


class SpoilAdvantage(Callback):
    """Makes the advantages of one agent not finite, in given iterations."""

    iterations, agent = (1,), 1

    def on_setup(self):
        algorithm = self.experiment.algorithm
        original = algorithm._as_used

        def as_used(advantage, mask):
            value = original(advantage, mask)
            if self.experiment.n_iters_performed in self.iterations:
                value = value.clone()
                value[..., 0, self.agent, :] = math.nan
            return value

        algorithm._as_used = as_used


class SpoilOften(SpoilAdvantage):
    iterations = (1, 2, 4, 5, 6)


@sequential_families
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_a_bad_turn_is_counted_and_harms_nobody(case, share, make_experiment):
    experiment = make_experiment(
        case.config(), callbacks=[SpoilAdvantage()], share_policy_params=share, on_policy_minibatch_size=40
    )
    experiment.run()
    logged = scalars(experiment)
    assert logged["train_agents_skipped_steps"][0] == 0
    assert logged["train_agents_skipped_steps"][1] == (
        2 if share and not case.natural else 1  # one turn, or one per epoch
    )
    assert all(p.isfinite().all() for p in policy_parameters(experiment).values())
    for position in range(3):
        assert math.isfinite(logged[f"train_agents_policy_factor_mean_position_{position}"][1])
    assert logged["train_agents_policy_kl_agent_0"][1] > 0
    if not share:
        assert logged["train_agents_policy_kl_agent_1"][1] == 0


class OverflowFactor(Callback):
    """Lowers an old log-prob of the agent that moves first by 100, so that its ratio is e^100 there."""

    def on_setup(self):
        algorithm = self.experiment.algorithm
        original = algorithm._sweep

        def swept(team, agents, order):
            agents[order[0]].data["old_log_prob"][3] -= 100
            agents[order[0]].data["advantage"][3] = 1.0
            return original(team, agents, order)

        algorithm._sweep = swept


@pytest.mark.parametrize("name", ["happo", "cliphappo", "hatrpo", "cliphatrpo"])
def test_an_infinite_factor_stops_nobody(name, make_experiment):
    """Policies at the bounds of their actions come to such ratios; what weighs a loss ends at e^20."""
    config = ALGORITHMS[name].get_from_yaml()
    config.order = [1, 0, 2]
    experiment = make_experiment(config, callbacks=[OverflowFactor()], max_n_iters=1)
    before = policy_parameters(experiment)
    experiment.run()
    logged = scalars(experiment)
    assert logged["train_agents_policy_factor_max_position_1"] == [math.inf]
    assert math.isfinite(logged["train_agents_policy_advantage_variance_position_1"][0])
    assert logged["train_agents_skipped_steps"] == [0]
    after = policy_parameters(experiment)
    assert all(value.isfinite().all() for value in after.values())
    for agent in (0, 2):
        assert not all(torch.equal(before[key][agent], after[key][agent]) for key in before)


def test_three_bad_iterations_in_a_row_end_the_run(make_experiment):
    experiment = make_experiment(happo(), callbacks=[SpoilOften()], max_n_iters=9, checkpoint_interval=40)
    with pytest.raises(RuntimeError, match="3 iterations in a row") as error:
        experiment.run()
    assert experiment.n_iters_performed == 6
    assert "checkpoint_240.pt" in str(error.value)


def test_images_go_through_the_buffers_transforms(run):
    from test_smoke import CNN

    experiment = run(happo(), task=StandInTask(rgb=True), model=_cnn(CNN))
    assert experiment.algorithm._policies["agents"].fast
    assert scalars(experiment)["train_agents_policy_kl"][1] > 0


def _cnn(settings):
    from benchmarl.models import CnnConfig

    return CnnConfig(**settings)
