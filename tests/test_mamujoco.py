"""MaMuJoCo: the bare library step by step, padding, seeds, and the routes by which BenchMARL reaches it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.hydra_config import load_task_config_from_hydra
from conftest import scalars
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from tensordict.nn.distributions import NormalParamExtractor
from torchrl.envs import Compose, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type

from benchmarl_trust import ALGORITHMS
from benchmarl_trust.environments import MamujocoEnv, MamujocoTask
from benchmarl_trust.environments.mamujoco import PARTITIONS
from benchmarl_trust.paths import conf_folder
from benchmarl_trust.policy import PaddedNormal

pytest.importorskip("pettingzoo")
pytest.importorskip("mujoco")
tasks = pytest.mark.parametrize("task", list(MamujocoTask), ids=lambda task: task.name.lower())
HOPPER = {"scenario": "Hopper", "agent_conf": "3x1", "agent_factorization": None, "agent_obsk": 1, "max_steps": 1000}


def config(task, **settings):
    """A task with other settings."""
    task = task.get_from_yaml()
    task.config.update(settings)
    return task


def make(task, seed=0, **settings):
    """One environment of the task, with the seed itself; with ``num_envs`` so many at once."""
    settings = {**task.get_from_yaml().config, **settings}
    del settings["vectorized"]
    return MamujocoEnv(**settings, seed=seed)


def bare(task):
    """The library's environment, as it is made without this package."""
    from gymnasium_robotics import mamujoco_v1

    settings = task.get_from_yaml().config
    return mamujoco_v1.parallel_env(settings["scenario"], settings["agent_conf"], agent_obsk=settings["agent_obsk"])


def actions_of(env, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    space = env.full_action_spec["agents", "action"].space
    size = space.low.shape
    return [space.low + torch.rand(size, generator=generator) * (space.high - space.low) for _ in range(steps)]


def play(env, actions):
    """The steps that follow from actions [N, D], from a reset on; a new episode begins where one has ended."""
    now, steps = env.reset(), []
    for action in actions:
        step, now = env.step_and_maybe_reset(now.set(("agents", "action"), action))
        steps.append(step)
    return torch.stack(steps)


def assert_as_the_library(task, steps):
    env, library = make(task, seed=3), bare(task)
    actions = actions_of(env, steps)
    observations, _ = library.reset(seed=3)
    names, ends = library.possible_agents, 0
    for step, action in zip(play(env, actions), actions, strict=True):
        compare(step, observations, library, names)
        sizes = [library.action_space(name).shape[0] for name in names]
        chosen = {name: a[:size].numpy() for name, a, size in zip(names, action, sizes, strict=True)}
        observations, rewards, terminated, truncated, _ = library.step(chosen)
        after = step["next"]
        compare(after, observations, library, names)
        assert after["agents", "reward"].flatten().tolist() == [np.float32(rewards[name]) for name in names]
        assert {bool(after["terminated"])} == set(terminated.values())
        assert {bool(after["truncated"])} == set(truncated.values())
        assert after["done"] == after["terminated"] | after["truncated"]
        if after["done"]:
            ends += 1
            observations, _ = library.reset()
    return ends


def compare(step, observations, library, names):
    assert step["state"].dtype == torch.float32
    np.testing.assert_array_equal(step["state"], library.state().astype(np.float32))
    for row, name in zip(step["agents", "observation"], names, strict=True):
        own = observations[name]
        np.testing.assert_array_equal(row[: len(own)], own.astype(np.float32))
        assert not row[len(own) :].any()


# As the library


def test_unlike_agents_are_as_in_the_library():
    """Agents of nine and eight joints, who see 242 and 170 numbers. A random Humanoid falls within 60 steps."""
    assert assert_as_the_library(MamujocoTask.HUMANOID_9_8, 300) >= 5


@pytest.mark.parametrize("task", [task for task in MamujocoTask if task.get_from_yaml().config["agent_conf"]])
def test_all_of_the_librarys_partitions_are_as_there(task):
    assert_as_the_library(task, 60)  # Reacher's episodes have 50 steps


@pytest.mark.parametrize(
    ("task", "actuators"),
    [
        (MamujocoTask.ANT_8X1, [[2], [3], [4], [5], [6], [7], [0], [1]]),
        (MamujocoTask.WALKER2D_3X2, [[0, 1], [2, 3], [4, 5]]),
        (MamujocoTask.WALKER2D_6X1, [[2], [1], [0], [5], [4], [3]]),
    ],
)
def test_partitions_by_name(task, actuators):
    env = make(task)
    assert [[joint.act_ids for joint in part] for part in env._copies[0].agent_action_partitions] == actuators
    # The robot is the same: the library with one of its own partitions, and the same torques.
    env, other = make(task, seed=3), MamujocoTask.ANT_4X2 if "ANT" in task.name else MamujocoTask.WALKER2D_2X3
    other = make(other, seed=3)
    (action,) = actions_of(env, 1)
    robot = env._copies[0]
    torques = robot.map_local_actions_to_global_action(dict(zip(robot.possible_agents, action, strict=True)))
    own = other._copies[0].map_global_action_to_local_actions(torques.astype(np.float32))
    same = torch.tensor(np.stack(list(own.values())))
    assert torch.equal(play(env, [action])["next", "state"], play(other, [same])["next", "state"])


def test_a_humanoid_of_17_has_every_joint_once():
    partition = make(MamujocoTask.HUMANOID_17X1)._copies[0].agent_action_partitions
    assert sorted(joint.act_ids for (joint,) in partition) == list(range(17))


@tasks
def test_specs(task):
    env = make(task)
    check_env_specs(env)
    names = task.get_from_yaml().group_map(env)["agents"]
    assert names == env._copies[0].possible_agents


def test_how_far_agents_see():
    lengths = [
        make(MamujocoTask.HALFCHEETAH_6X1, agent_obsk=k).observation_spec["agents", "observation"].shape[-1]
        for k in (0, 1, 5)
    ]
    assert lengths == [7, 9, 12]  # 5 of the root; position and velocity of one's own joint; the position of others


def test_agents_that_see_everything():
    env = make(MamujocoTask.HUMANOID_9_8, agent_obsk=None)
    td = play(env, actions_of(env, 3))
    for seen in (td, td["next"]):
        observation, state = seen["agents", "observation"], seen["state"]
        assert torch.equal(observation[..., :348], state.unsqueeze(1).expand(-1, 2, -1))
        assert torch.equal(observation[..., 348:], torch.eye(2).expand(3, 2, 2))
    check_env_specs(env)
    # The robot is moved as it is by agents that see a part.
    part = play(make(MamujocoTask.HUMANOID_9_8), actions_of(env, 3))
    assert torch.equal(part["next", "state"], td["next", "state"])


# Ends of episodes


def test_a_fallen_robot_terminates():
    env = make(MamujocoTask.HOPPER_3X1)
    last = play(env, actions_of(env, 200))["next"]
    last = last[last["done"].flatten()]
    assert len(last) >= 3
    assert last["terminated"].all()
    assert not last["truncated"].any()


@pytest.mark.parametrize(
    "task", [MamujocoTask.HALFCHEETAH_2X3, MamujocoTask.COUPLEDHALFCHEETAH, MamujocoTask.SWIMMER_10X2]
)
def test_the_time_limit_truncates_and_the_last_observation_is_the_true_one(task):
    env, long = make(task, max_steps=5), make(task)
    actions = actions_of(env, 12)
    steps, true = play(env, actions), play(long, actions)
    assert steps["next", "truncated"].flatten().nonzero().flatten().tolist() == [4, 9]
    assert not steps["next", "terminated"].any()
    for key in (("agents", "observation"), "state", ("agents", "reward")):
        assert torch.equal(steps["next"][key][:5], true["next"][key][:5])
    assert not torch.equal(steps["state"][5], steps["next", "state"][4])  # a new episode
    assert torch.equal(steps["state"][6], steps["next", "state"][5])


def test_the_time_limit_of_the_yaml_is_gymnasiums():
    env = make(MamujocoTask.HALFCHEETAH_2X3)
    end = env.rollout(1100)["next"][-1]
    assert (len(env.rollout(1100)), end["truncated"].item(), end["terminated"].item()) == (1000, True, False)


# Seeds


def test_same_seed_same_run():
    first, again, other = (make(MamujocoTask.HOPPER_3X1, seed=seed) for seed in (1, 1, 2))
    actions = actions_of(first, 60)
    one, two, three = (play(env, actions) for env in (first, again, other))
    assert (one == two).all()
    assert one["next", "done"].any()  # so a reset after the first one too
    assert not torch.equal(one["state"][0], three["state"][0])
    again.set_seed(2)
    assert torch.equal(play(again, actions)["state"], three["state"])


def first_states(seed, vectorized):
    function = config(MamujocoTask.HALFCHEETAH_2X3, vectorized=vectorized).get_env_fun(4, True, seed, "cpu")
    return (function() if vectorized else SerialEnv(4, function)).reset()["state"]


@pytest.mark.parametrize("vectorized", [True, False])
def test_copies_are_seeded_apart_and_alike_again(vectorized):
    states = [first_states(seed, vectorized) for seed in (0, 0, 1)]
    assert len(states[0].unique(dim=0)) == 4
    assert torch.equal(*states[:2])
    assert len(torch.cat(states[1:]).unique(dim=0)) == 8


# Many at once


@pytest.mark.parametrize("settings", [{}, {"agent_obsk": None}], ids=["part", "whole"])
def test_many_at_once_are_as_many_alone(settings):
    """Resets in the middle of the batch too: random Humanoids fall at unlike times."""
    many = make(MamujocoTask.HUMANOID_9_8, num_envs=3, **settings)
    check_env_specs(many)
    many.set_seed(5)
    seeds = list(many._seeds)
    assert len(set(seeds)) == 3
    alone = [make(MamujocoTask.HUMANOID_9_8, seed=seed, **settings) for seed in seeds]
    actions = [actions_of(env, 80, seed=i) for i, env in enumerate(alone)]
    steps = play(many, [torch.stack(together) for together in zip(*actions, strict=True)])
    ends = steps["next", "done"].squeeze(-1)
    assert (ends.sum(0) >= 1).all()
    assert (ends.any(1) & ~ends.all(1)).any()
    for i, env in enumerate(alone):
        own = play(env, actions[i])
        assert (steps[:, i] == own).all()


def test_what_was_seen_is_not_written_over():
    env = make(MamujocoTask.HOPPER_3X1, num_envs=2)
    first = env.reset()
    kept = first.clone()
    env.rollout(5)
    assert (first == kept).all()


def test_robots_that_are_not_reset_go_on():
    env, undisturbed = (make(MamujocoTask.HALFCHEETAH_2X3, num_envs=3) for _ in range(2))
    actions = actions_of(env, 5)
    last, true = play(env, actions[:4])[-1]["next"], play(undisturbed, actions)[-1]["next"]
    again = env.reset(last.copy().set("_reset", torch.tensor([[False], [True], [False]])))
    after = env.step(again.copy().set(("agents", "action"), actions[4]))["next"]
    for key in ("state", ("agents", "observation")):
        assert [torch.equal(again[key][i], last[key][i]) for i in range(3)] == [True, False, True]
        assert [torch.equal(after[key][i], true[key][i]) for i in range(3)] == [True, False, True]


def test_the_experiment_has_all_robots_in_one_environment(make_experiment):
    experiment = make_experiment(ALGORITHMS["happo"].get_from_yaml(), task=humanoid(), on_policy_n_envs_per_worker=4)
    env = experiment.env_func().base_env
    assert (type(env), env.batch_size) == (MamujocoEnv, (4,))
    assert experiment.action_spec["agents", "action"].shape == (2, 9)
    assert experiment.observation_spec["agents", "observation"].shape == (2, 242)


def test_processes_need_one_robot_each(make_experiment):
    with pytest.raises(ValueError, match=r"experiment.parallel_collection=True.*task.vectorized=False"):
        make_experiment(MappoConfig.get_from_yaml(), task=humanoid(), parallel_collection=True)
    with pytest.raises(ValueError, match=r"task.vectorized=False"):
        make_experiment(MappoConfig.get_from_yaml(), task=MamujocoTask.HOPPER_3X1, parallel_collection=True)
    with pytest.raises(ValueError, match=r"task\.vectorized=1 must be True or False"):
        make_experiment(MappoConfig.get_from_yaml(), task=config(MamujocoTask.HOPPER_3X1, vectorized=1))


@pytest.mark.gpu
def test_robots_on_a_gpu_are_those_on_the_cpu(run):
    env, other = (make(MamujocoTask.HUMANOID_9_8, num_envs=2, device=device) for device in ("cuda", "cpu"))
    actions = actions_of(other, 40)
    steps, true = play(env, [action.cuda() for action in actions]), play(other, actions)
    assert true["next", "done"].any()
    assert all(value.is_cuda for value in steps.values(True, True))
    assert (steps.cpu() == true).all()
    devices = dict.fromkeys(("train_device", "buffer_device", "sampling_device"), "cuda")
    experiment = run(ALGORITHMS["happo"].get_from_yaml(), task=humanoid(), evaluation=True, **devices)
    assert all(value.is_cuda for loss in experiment.losses.values() for value in loss.parameters())
    assert scalars(experiment)["eval_reward_episode_len_mean"] == [5, 5]


# Padding


def test_the_robot_ignores_padded_entries():
    env, other = make(MamujocoTask.HUMANOID_9_8), make(MamujocoTask.HUMANOID_9_8)
    assert env.executed.sum(-1).tolist() == [9, 8]
    actions = actions_of(env, 40)
    changed = [torch.where(env.executed, action, -action) for action in actions]
    assert not torch.equal(changed[0], actions[0])
    for key in ("state", ("agents", "observation"), ("agents", "reward"), "done"):
        assert torch.equal(play(env, actions)["next"][key], play(other, changed)["next"][key])


def humanoid(max_steps=5):
    return config(MamujocoTask.HUMANOID_9_8, max_steps=max_steps)


def distributions(experiment, data):
    """The policy's, from a copy: the policy writes into what it reads."""
    with torch.no_grad():
        return experiment.algorithm.get_policy_for_loss("agents").get_dist(data.copy())


@pytest.mark.parametrize("name", ["mars", "happo", "hatrpo"])
@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
@pytest.mark.filterwarnings("ignore:.*share policy parameters")
def test_padded_entries_change_no_ratio_and_no_kl(name, share, make_experiment):
    experiment = make_experiment(ALGORITHMS[name].get_from_yaml(), task=humanoid(), share_policy_params=share)
    env = make(MamujocoTask.HUMANOID_9_8)
    data = play(env, actions_of(env, 8)).select(("agents", "observation"))
    executed = env.executed.expand(8, 2, 9)
    old = distributions(experiment, data)
    experiment.run()
    new = distributions(experiment, data)
    assert not torch.equal(old.root_dist.loc, new.root_dist.loc)
    for distribution in (old, new):
        assert (distribution.root_dist.loc[~executed] == 0).all()
        assert (distribution.root_dist.scale[~executed] == 1).all()
    # Two actions that differ in what is not executed: one ratio. They differ in log-prob, by the same.
    action = new.sample()
    padded = torch.where(executed, action, 0.3)
    ratios = [new.log_prob(a) - old.log_prob(a) for a in (action, padded)]
    torch.testing.assert_close(*ratios, rtol=0, atol=1e-5)
    assert ratios[0].abs().max() > 1e-4
    kl = torch.distributions.kl_divergence(*(d.root_dist for d in (old, new)))
    assert (kl[~executed] == 0).all()
    assert kl[executed].max() > 0


@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
@pytest.mark.filterwarnings("ignore:.*share policy parameters")
def test_padded_agents_run_one_by_one(share, make_experiment):
    happo = ALGORITHMS["happo"].get_from_yaml()
    algorithm = make_experiment(happo, task=humanoid(), share_policy_params=share).algorithm
    policy = algorithm._policies["agents"]
    assert policy.fast
    assert policy.shared == share
    first, second = (agent.parameters for agent in policy.agents)
    assert [p is q for p, q in zip(first, second, strict=True)] == [share] * len(first)
    for agent in policy.agents:
        assert {id(p) for p in agent.body.parameters()} == {id(p) for p in agent.parameters}
    (whole,) = [module for module in policy.body.modules() if isinstance(module, PaddedNormal)]
    for i, agent in enumerate(policy.agents):
        (own,) = [module for module in agent.body.modules() if isinstance(module, PaddedNormal)]
        assert torch.equal(own.executed, whole.executed[i])


def test_padded_entries_have_no_gradient():
    executed = make(MamujocoTask.HUMANOID_9_8).executed
    logits = torch.randn(5, 2, 18, requires_grad=True)
    loc, scale = PaddedNormal(NormalParamExtractor(), executed)(logits)
    torch.distributions.Normal(loc, scale).log_prob(torch.full((5, 2, 9), 0.1)).sum().backward()
    reached = logits.grad.unflatten(-1, (2, 9)) != 0  # means, then standard deviations
    assert torch.equal(reached, executed[:, None].expand(5, 2, 2, 9))


def test_the_host_sees_padded_entries(run):
    """What docs/mamujoco.md says of BenchMARL's own algorithms."""
    experiment = run(MappoConfig.get_from_yaml(), task=humanoid())
    env = make(MamujocoTask.HUMANOID_9_8)
    scale = distributions(experiment, env.reset()).root_dist.scale[~env.executed]
    assert (scale != 1).all()


def test_equal_agents_have_the_hosts_policy(make_experiment):
    task = config(MamujocoTask.HALFCHEETAH_2X3, max_steps=5)
    policy = make_experiment(ALGORITHMS["happo"].get_from_yaml(), task=task).policy
    assert not any(isinstance(module, PaddedNormal) for module in policy.modules())


# In BenchMARL


def test_overrides_are_checked_by_hydra():
    def load(*overrides):
        with initialize_config_module("benchmarl.conf", version_base=None):
            choices = ["algorithm=mappo", "task=mamujoco/halfcheetah_2x3", *overrides]
            cfg = compose("config", overrides=choices)
        return load_task_config_from_hydra(cfg.task, "mamujoco/halfcheetah_2x3")

    own = load("task.agent_conf=null", "task.agent_factorization=[[bthigh,fthigh],[bshin,bfoot,fshin,ffoot]]")
    assert own.get_env_fun(2, True, 0, "cpu")().executed.sum(-1).tolist() == [2, 4]
    with pytest.raises(ConfigCompositionException, match=r"task\.max_steps=long"):
        load("task.max_steps=long")


FAST = ("happo", "hatrpo")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ("mappo", *ALGORITHMS)],
)
def test_run(name, run):
    algorithm = MappoConfig if name == "mappo" else ALGORITHMS[name]
    task = config(MamujocoTask.HOPPER_3X1, max_steps=5)
    experiment = run(algorithm.get_from_yaml(), task=task, evaluation=True)
    logged = scalars(experiment)
    assert logged["eval_reward_episode_len_mean"] == [5, 5]
    # One reward for all agents: a Hopper that has just begun gets about 1 for each step on its leg.
    assert all(3 < reward < 7 for reward in logged["collection_reward_episode_reward_mean"])
    assert experiment.state_spec["state"].shape == (11,)
    for loss in experiment.losses.values():
        assert all(parameter.isfinite().all() for parameter in loss.parameters())


def test_robots_in_environments_of_their_own(run):
    """Without processes, which the slow test below has."""
    task = config(MamujocoTask.HOPPER_3X1, max_steps=5, vectorized=False)
    experiment = run(ALGORITHMS["happo"].get_from_yaml(), task=task, evaluation=True)
    assert isinstance(experiment.env_func().base_env, SerialEnv)
    assert scalars(experiment)["eval_reward_episode_len_mean"] == [5, 5]


def test_an_evaluation_is_of_the_first_episode_of_each_robot(make_experiment):
    """They fall at unlike times and then begin anew, which does not count."""
    experiment = make_experiment(
        ALGORITHMS["happo"].get_from_yaml(), task=humanoid(max_steps=80), evaluation=True, evaluation_episodes=3
    )
    experiment.evaluate()
    seeds = [int(own.generate_state(1)[0]) for own in np.random.SeedSequence(experiment.seed).spawn(3)]
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        alone = [make(MamujocoTask.HUMANOID_9_8, seed=seed).rollout(80, experiment.policy) for seed in seeds]
    lengths = [len(rollout) for rollout in alone]
    assert len(set(lengths)) > 1
    assert max(lengths) < 80
    returns = [rollout["next", "agents", "reward"].mean(1).sum().item() for rollout in alone]
    logged = scalars(experiment)
    assert logged["eval_reward_episode_len_mean"] == pytest.approx([np.mean(lengths)], rel=1e-5)
    assert logged["eval_reward_episode_reward_mean"] == pytest.approx([np.mean(returns)], rel=1e-4)


def test_same_seed_same_training(run):
    kinds = [scalars(run(ALGORITHMS["happo"].get_from_yaml(), task=humanoid(), seed=seed)) for seed in (0, 0, 1)]
    rewards = [kind["collection_reward_reward_mean"] for kind in kinds]
    assert rewards[0] == rewards[1] != rewards[2]


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scenario": "Hoper"}, r"task.scenario=Hoper must be one of Ant, .*Hopper"),
        ({"agent_conf": "3x2"}, r"task.agent_conf=3x2 must be one of 3x1 for Hopper; .*agent_factorization"),
        ({"agent_conf": None}, r"task.agent_conf=None must be one of 3x1"),
        ({"scenario": "Ant", "agent_conf": "8x1"}, r"task.agent_conf=8x1 must be one of 2x4, 2x4d, 4x2 for Ant"),
        ({"scenario": "ManySegmentSwimmer", "agent_conf": "10"}, "must be <agents>x<segments of each>"),
        ({"scenario": "ManySegmentSwimmer", "agent_conf": "0x2"}, "must be <agents>x<segments of each>"),
        ({"agent_factorization": [["thigh_joint"]]}, "task.agent_conf=3x1 and task.agent_factorization"),
        (
            {"agent_conf": None, "agent_factorization": [["thigh_joint"], ["knee"]]},
            "all of Hopper's once: thigh_joint, leg_joint, foot_joint",
        ),
        ({"agent_conf": None, "agent_factorization": "thigh_joint"}, "must be a list of joints for each agent"),
        (
            {"agent_conf": None, "agent_factorization": [["thigh_joint", "leg_joint", "foot_joint"], []]},
            "must be a list of joints for each agent",
        ),
        ({"agent_obsk": -1}, "task.agent_obsk=-1 must be a whole number, 0 or more"),
        ({"agent_obsk": 1.5}, "task.agent_obsk=1.5 must be a whole number"),
        ({"max_steps": 0}, "task.max_steps=0 must be a whole number, 1 or more"),
        ({"max_steps": 2.5}, "task.max_steps=2.5 must be a whole number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MamujocoEnv(**{**HOPPER, **settings})


def test_the_librarys_partitions_are_all_there():
    from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges

    for scenario, names in PARTITIONS.items():
        for name in names or ["2x1"]:
            parts, *_ = get_parts_and_edges(scenario, name)
            assert len(parts) >= 2


def test_bad_settings_are_refused_before_collection(make_experiment):
    with pytest.raises(ValueError, match=r"task.agent_conf=9x9"):
        make_experiment(ALGORITHMS["happo"].get_from_yaml(), task=config(MamujocoTask.ANT_4X2, agent_conf="9x9"))


def test_without_the_extra_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ImportError, match=r'pip install "benchmarl_trust\[mamujoco\]"'):
        MamujocoEnv(**HOPPER)


def test_no_suite_is_imported_before_it_is_built_and_then_in_silence():
    code = "import sys, benchmarl_trust; from benchmarl_trust.environments import MamujocoTask; "
    code += "make = MamujocoTask.HOPPER_3X1.get_from_yaml().get_env_fun(1, True, 0, 'cpu'); print(*sys.modules); make()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"mujoco", "gymnasium", "gymnasium_robotics", "pettingzoo"}.isdisjoint(done.stdout.split())
    assert "Adroit" not in done.stdout + done.stderr  # a notice that the library prints, of robots that are not here


# Processes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A lambda function was passed to ParallelEnv")
def test_parallel_collection(make_experiment, monkeypatch):
    """The copies are in processes; the launcher's callback seeds them apart, the same way each time."""
    monkeypatch.syspath_prepend(conf_folder().parent / "examples")
    from parallel_collection import OwnSeeds

    experiment = make_experiment(
        ALGORITHMS["happo"].get_from_yaml(),
        task=config(MamujocoTask.HALFCHEETAH_2X3, max_steps=5, vectorized=False),
        callbacks=[OwnSeeds()],
        parallel_collection=True,
        on_policy_n_envs_per_worker=2,
    )
    try:
        states = next(iter(experiment.collector))["state"]
        for step in (0, 5):  # the first episode and the second
            assert not torch.equal(*states[:, step])
        experiment.collector.env.set_seed(experiment.seed)
        assert torch.equal(experiment.collector.env.reset()["state"], states[:, 0])
    finally:
        experiment.close()


def test_copies_write_no_file_that_others_read(monkeypatch):
    """The library's own file of a robot of many segments has one name for all processes, and each deletes it."""
    from gymnasium_robotics.envs.multiagent_mujoco import many_segment_swimmer

    files, generate = [], many_segment_swimmer.gen_asset
    monkeypatch.setattr(
        many_segment_swimmer,
        "gen_asset",
        lambda n_segs, asset_path: files.append(asset_path) or generate(n_segs, asset_path),
    )
    make(MamujocoTask.SWIMMER_10X2), make(MamujocoTask.SWIMMER_10X2)
    assert len(set(files)) == 2


@pytest.mark.slow
def test_many_at_once_are_faster():
    file = conf_folder().parent / "benchmarks" / "environments.py"
    command = [sys.executable, "-W", "ignore", str(file), "mamujoco", "--steps", "100", "--repeats", "3"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rates = dict(line.rsplit(maxsplit=1) for line in out.splitlines()[1:])
    assert len(rates) == 4
    assert float(rates["rollout of 30 at once"]) > 1.5 * float(rates["rollout of one"]) > 0


# Pictures


def test_render():
    env = make(MamujocoTask.HOPPER_3X1)
    env.reset()
    try:
        picture = env.render()
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        env.close()
    assert (picture.shape, picture.dtype) == ((480, 480, 3), np.uint8)
    assert picture.std() > 10


def test_an_ant_that_does_not_move_is_paid_what_the_page_says(capsys):
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    (code,) = re.findall(r"```python\n(from gymnasium_robotics.*?)```", page, re.DOTALL)
    exec(code, {})
    returns = [int(line) for line in capsys.readouterr().out.split()]
    ((low, high),) = re.findall(r"paid for being upright, (\d+)\s+to (\d+)", page)
    assert len(returns) == 4
    assert [min(returns), max(returns)] == pytest.approx([int(low), int(high)], abs=2)


def test_closing_closes_the_library(monkeypatch):
    """Else MuJoCo's OpenGL is freed when Python ends, with complaints."""
    env, closed = TransformedEnv(make(MamujocoTask.HOPPER_3X1), Compose()), []
    monkeypatch.setattr(type(env.base_env._copies[0]), "close", lambda suite: closed.append(suite))
    env.close()
    assert closed == [env.base_env._copies[0]]


def test_without_opengl_the_cure_is_named(monkeypatch):
    env = make(MamujocoTask.HOPPER_3X1)
    monkeypatch.setattr(type(env._copies[0]), "render", lambda suite: 1 / 0)
    with pytest.raises(RuntimeError, match=r"MUJOCO_GL to egl or osmesa, or run with experiment.render=False"):
        env.render()


def test_without_opengl_nothing_is_collected(monkeypatch, make_experiment):
    task = config(MamujocoTask.HOPPER_3X1)
    monkeypatch.setattr(type(make(MamujocoTask.HOPPER_3X1)._copies[0]), "render", lambda suite: 1 / 0)
    with pytest.raises(ValueError, match=r"experiment\.render=True: MuJoCo cannot render"):
        make_experiment(ALGORITHMS["happo"].get_from_yaml(), task=task, evaluation=True, render=True)
