"""SMAX: what JaxMARL computes arrives unchanged, episodes end as they should, and the dead are out of it."""

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.experiment import Callback
from benchmarl.hydra_config import load_task_config_from_hydra
from cases import Case
from conftest import scalars
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from benchmarl_trust import ALGORITHMS
from benchmarl_trust.environments import Smax, SmaxClass, SmaxTask
from benchmarl_trust.environments.smax import MAPS

needs_jaxmarl = pytest.mark.skipif(importlib.util.find_spec("jaxmarl") is None, reason="needs the extra smax")
#: The environments of a test, always as many: JAX compiles a map's programs once for a number of environments.
B = 4
STOP = 4


def make(name="3m", seed=0, **settings):
    return Smax(name, num_envs=B, seed=seed, **settings)


def random_policy(td):
    mask = td["agents", "action_mask"]
    td["agents", "action"] = torch.multinomial(mask.flatten(0, -2).float(), 1).view(mask.shape[:-1])
    return td


def play(env, steps, seed=0):
    torch.manual_seed(seed)
    return env.rollout(steps, policy=random_policy, break_when_any_done=False)


def change(env, **fields):
    """Set fields of JaxMARL's state in all battles."""
    key, state = env._now
    inner = state.state
    new = {name: value + 0 * getattr(inner, name) for name, value in fields.items()}
    env._now = [key, state.replace(state=inner.replace(**new))]


def stop(env, td):
    return env.step(td.set(("agents", "action"), torch.full((B, env.battle.num_agents), STOP)))["next"]


# As an environment


@needs_jaxmarl
def test_specs():
    env = make()
    check_env_specs(env)
    assert env.full_observation_spec["agents", "observation"].shape == (B, 3, 75)
    assert env.full_observation_spec["agents", "action_mask"].shape == (B, 3, 8)
    assert env.full_observation_spec["state"].shape == (B, 72)
    assert "mask" not in make(mask_dead=False).full_observation_spec["agents"].keys()


def bare_rollout(name, rollout, seed):
    """The suite by itself, with the actions of ours and its keys; battles that ended begin anew, as ours do."""
    import jax
    import jax.numpy as jnp
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    env = HeuristicEnemySMAX(
        scenario=map_name_to_scenario(name), see_enemy_actions=True, walls_cause_death=True, attack_mode="closest"
    )
    reset, step, allowed = (jax.jit(jax.vmap(f)) for f in (env.reset, env.step_env, env.get_avail_actions))
    keys = jax.random.split(jax.random.PRNGKey(seed), B + 1)
    _, state = reset(keys[1:])
    for t in range(rollout.shape[1]):
        keys = jax.random.split(keys[0], B + 1)
        action = jnp.asarray(rollout["agents", "action"][:, t].numpy().astype("int32"))
        seen, state, reward, done, _ = step(keys[1:], state, {a: action[:, i] for i, a in enumerate(env.agents)})
        stacked = [jnp.stack([x[a] for a in env.agents], 1) for x in (seen, allowed(state), reward)]
        alive = ~jnp.stack([done[a] for a in env.agents], 1)
        yield [torch.from_dlpack(x) for x in (*stacked, seen["world_state"], done["__all__"], alive)]
        if done["__all__"].any():
            keys = jax.random.split(keys[0], B + 1)
            _, fresh = reset(keys[1:])
            ended = done["__all__"]
            state = jax.tree.map(
                lambda a, b, e=ended: jnp.where(e.reshape(-1, *[1] * (a.ndim - 1)), a, b), fresh, state
            )


@needs_jaxmarl
@pytest.mark.slow
@pytest.mark.parametrize("name", ["3m", "2s3z", "smacv2_5_units"])
def test_a_scripted_rollout_is_the_suites(name):
    """What is seen after each step, also the last of an episode; battles that ended begin anew amid the others."""
    rollout = play(make(name, seed=7), 100)
    ends = rollout["next", "done"].squeeze(-1)
    assert ends.any(1).all()
    assert ((ends.sum(0) > 0) & (ends.sum(0) < B)).any(), "no battle ended alone"
    following = rollout["next"]
    for t, (seen, allowed, reward, world, done, alive) in enumerate(bare_rollout(name, rollout, 7)):
        torch.testing.assert_close(following["agents", "observation"][:, t], seen, rtol=0, atol=1e-6)
        torch.testing.assert_close(following["state"][:, t], world, rtol=0, atol=1e-5)
        torch.testing.assert_close(following["agents", "reward"][:, t, :, 0], reward, rtol=0, atol=1e-6)
        assert torch.equal(following["agents", "action_mask"][:, t], allowed.bool())
        assert torch.equal(following["agents", "mask"][:, t], alive)
        assert torch.equal(ends[:, t], done)


@needs_jaxmarl
def test_the_last_observation_is_kept_and_the_next_battle_begins_anew():
    rollout = play(make(seed=1), 60)
    row, step = rollout["next", "done"][:, :-1].squeeze(-1).nonzero(as_tuple=True)
    assert len(row) >= B
    last, first = rollout["next"][row, step], rollout[row, step + 1]
    lost = last["terminated"].squeeze(-1)
    assert (last["agents", "observation"][lost] == 0).all()  # all allies are dead
    assert not last["agents", "mask"][lost].any()
    assert first["agents", "mask"].all()
    assert (first["agents", "observation"][..., -10] == 1).all()  # full health
    assert not first["done"].any()
    # Between ends, what a step leads to is where the next one starts.
    inner = ~rollout["next", "done"][:, :-1].squeeze(-1)
    for key in ("state", ("agents", "observation"), ("agents", "action_mask"), ("agents", "mask")):
        assert torch.equal(rollout["next", key][:, :-1][inner], rollout[key][:, 1:][inner])


@needs_jaxmarl
def test_a_reset_of_some_leaves_the_others():
    env = make()
    env.reset()
    before = stop(env, env.reset())
    chosen = torch.tensor([[True], [False], [True], [False]])
    after = env.reset(before.clone().set("_reset", chosen))
    for key in ("state", ("agents", "observation")):
        same = (after[key] == before[key]).flatten(1).all(1)
        assert same.tolist() == [False, True, False, True]
    steps = env._now[1].state.step
    assert steps.tolist() == [0, 1, 0, 1]


@needs_jaxmarl
def test_an_end_by_time_is_a_truncation():
    """JaxMARL looks at the number of steps before it counts the step: there are max_steps + 1."""
    env = make()
    assert SmaxTask["3M"].get_from_yaml().max_steps(env) == 101
    td = env.reset()
    change(env, step=99)
    out = stop(env, td)
    assert not out["done"].any()
    out = stop(env, out)
    assert out["done"].all()
    assert out["truncated"].all()
    assert not out["terminated"].any()
    assert not out["info", "battle_won"].any()
    assert out["agents", "mask"].all()


@needs_jaxmarl
@pytest.mark.parametrize(
    ("health", "won"), [([45.0] * 3 + [0.0] * 3, True), ([0.0] * 3 + [45.0] * 3, False), ([0.0] * 6, False)]
)
def test_a_battle_that_is_over_is_a_termination(health, won):
    env = make()
    td = env.reset()
    change(env, unit_health=torch.tensor(health).numpy(), step=99)
    out = stop(env, td)
    assert out["done"].all()
    assert out["terminated"].all()
    assert not out["truncated"].any()
    assert (out["info", "battle_won"] == won).all()
    assert (out["agents", "reward"] == float(won)).all()


@needs_jaxmarl
def test_same_seed_same_battles_and_other_seeds_others():
    first, again, other = (play(make(seed=seed), 40) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first["state"] != other["state"]).any()
    env = make(seed=4)
    env.set_seed(3)
    assert torch.equal(env.reset()["state"], first["state"][:, 0])
    torch.manual_seed(5)
    drawn = make(seed=None).reset()["state"]
    torch.manual_seed(5)
    assert torch.equal(make(seed=None).reset()["state"], drawn)
    assert len({tuple(row) for row in drawn.tolist()}) == B  # the battles of a batch differ


@needs_jaxmarl
def test_tensors_are_jaxs_own():
    env = make()
    *_, (numbers, flags) = env._battle.reset(*env._now, torch.ones(B).bool().numpy())
    td, _ = env._observed((numbers, flags))
    assert td["agents", "observation"].data_ptr() == numbers.unsafe_buffer_pointer()
    assert td["agents", "action_mask"].data_ptr() == flags.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "task.max_steps=0 must be a whole number of 1 or more"),
        ({"max_steps": 2.5}, "task.max_steps=2.5"),
        ({"attack_mode": "nearest"}, "task.attack_mode=nearest must be one of closest, random"),
        ({"won_battle_bonus": float("nan")}, "task.won_battle_bonus=nan must be a finite number"),
        ({"enemy_shoots": 1}, "task.enemy_shoots=1 must be True or False"),
        ({"mask_dead": "yes"}, "task.mask_dead=yes must be True or False"),
        ({"name": "4m"}, "task=smax/4m: there is no such map. There are 3m, 8m, .*smacv2_20_units"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@needs_jaxmarl
def test_a_device_that_jax_does_not_have():
    with pytest.raises(ValueError, match=r"experiment.sampling_device=cuda:7: JAX has no such device"):
        make(device="cuda:7")


# The dead


@needs_jaxmarl
def test_a_dead_agent_sees_nothing_and_can_only_stop():
    env = make()
    td = env.reset()
    change(env, unit_health=torch.tensor([0.0, 45, 45, 45, 45, 45]).numpy())
    out = stop(env, td)
    assert (out["agents", "mask"] == torch.tensor([False, True, True])).all()
    assert (out["agents", "observation"][:, 0] == 0).all()
    assert (out["agents", "action_mask"][:, 0] == (torch.arange(8) == STOP)).all()
    assert (out["agents", "action_mask"][:, 1:, :5]).all()
    assert not out["done"].any()


class Spoil(Callback):
    """What the dead did is another thing: log-probs of ``value``; with ``acting`` they chose among all actions."""

    def __init__(self, value, acting):
        super().__init__()
        self.value, self.acting = value, acting

    def on_batch_collected(self, batch):
        dead = ~batch["agents", "mask"]
        self.dead = dead.sum().item()
        assert (batch["agents", "action"][dead] == STOP).all()
        assert (batch["agents", "log_prob"][dead] == 0).all()
        batch["agents", "log_prob"][dead] = self.value
        if self.acting:
            batch["agents", "action"][dead] = 0
            batch["agents", "action_mask"][dead] = True


#: A batch is long enough for deaths; evaluations have as many environments as collection.
TRAINING = {
    "on_policy_collected_frames_per_batch": 40 * B,
    "on_policy_n_envs_per_worker": B,
    "on_policy_minibatch_size": 80,
    "evaluation_interval": 40 * B,
    "evaluation_episodes": B,
}


def task(**settings):
    task = SmaxTask["3M"].get_from_yaml()
    task.config.update(settings)
    return task


@needs_jaxmarl
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "hatrpo" else pytest.mark.slow) for name in ALGORITHMS]
)
def test_the_dead_reach_no_number(name, run):
    runs = []
    for spoil in (Spoil(torch.nan, acting=False), Spoil(0.5, acting=True)):
        experiment = run(Case(name).config(), task=task(), callbacks=[spoil], **TRAINING)
        assert spoil.dead > 20
        runs.append([p for loss in experiment.losses.values() for p in loss.parameters()])
    for p, q in zip(*runs, strict=True):
        assert p.isfinite().all()
        assert torch.equal(p, q)


# In BenchMARL


@pytest.mark.parametrize("name", MAPS)
def test_maps_have_one_configuration_and_are_changed_by_hydra(name):
    member = SmaxTask[name.upper()]
    config = SmaxTask["3M"].get_from_yaml().config
    assert member.get_from_yaml().config == config
    with initialize_config_module("benchmarl.conf", version_base=None):
        cfg = compose("config", overrides=["algorithm=gpae", f"task=smax/{name}", "task.attack_mode=random"])
    loaded = load_task_config_from_hydra(cfg.task, f"smax/{name}")
    assert loaded.config == config | {"attack_mode": "random"}
    assert pickle.loads(pickle.dumps(member)) is member


@needs_jaxmarl
def test_the_maps_are_jaxmarls():
    make()  # imports it quietly
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    assert set(MAPS) == set(MAP_NAME_TO_SCENARIO)
    page = (Path(__file__).parents[1] / "docs" / "smax.md").read_text()
    for name, scenario in MAP_NAME_TO_SCENARIO.items():
        assert f"| `smax/{name}` | {scenario.num_allies} | {scenario.num_enemies} |" in page


def evaluations(experiment):
    """Those of BenchMARL's report."""
    (report,) = experiment.folder_name.glob("*.json")
    (seeds,) = (algorithm for task in json.loads(report.read_text())["smax"].values() for algorithm in task.values())
    return [step for name, step in seeds["seed_0"].items() if name.startswith("step_")]


@needs_jaxmarl
@pytest.mark.parametrize(
    "name", ["mappo", *(pytest.param(n, marks=() if n == "gpae" else pytest.mark.slow) for n in ALGORITHMS)]
)
def test_every_algorithm_trains_and_win_rates_are_logged(name, run):
    config = MappoConfig.get_from_yaml() if name == "mappo" else Case(name).config()
    experiment = run(config, task=task(), evaluation=True, **TRAINING)
    logged = scalars(experiment)
    assert logged["collection_info_win_rate"] == [0, 0]  # of random agents that were attacked for 40 steps
    assert logged["collection_info_episode_limit_rate"] == [0, 0]
    steps = evaluations(experiment)
    assert [len(step["win_rate"]) for step in steps] == [B, B]
    assert logged["eval_info_win_rate"] == [sum(step["win_rate"]) / B for step in steps]
    assert experiment.group_map == {"agents": ["ally_0", "ally_1", "ally_2"]}
    assert all(p.isfinite().all() for loss in experiment.losses.values() for p in loss.parameters())


@needs_jaxmarl
@pytest.mark.slow
def test_agents_win_where_the_enemy_does_not_shoot(run):
    """The return of a battle won is 2: all of the enemy's health, and the bonus."""
    experiment = run(
        MappoConfig.get_from_yaml(),
        task=task(enemy_shoots=False),
        evaluation=True,
        evaluation_deterministic_actions=False,  # or else they go one way
        **TRAINING | {"on_policy_collected_frames_per_batch": 200 * B, "evaluation_interval": 200 * B},
    )
    logged = scalars(experiment)
    assert max(logged["collection_info_win_rate"]) > 0.5
    assert max(logged["eval_info_win_rate"]) > 0.5
    assert max(logged["collection_reward_episode_reward_max"]) == pytest.approx(2)
    for step in evaluations(experiment):
        assert step["win_rate"] == [float(value > 1.9) for value in step["return"]]


def test_the_shares_that_are_logged():
    batch = TensorDict(
        next=TensorDict(
            done=torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]).bool().unsqueeze(-1),
            truncated=torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]]).bool().unsqueeze(-1),
            info=TensorDict(battle_won=torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).bool().unsqueeze(-1)),
        )
    )
    expected = {"collection/info/win_rate": 0.75, "collection/info/episode_limit_rate": 0.25}
    assert SmaxClass.log_info(batch) == expected
    rollouts = [
        TensorDict(next=TensorDict(info=TensorDict(battle_won=torch.tensor([[False], [won]])))) for won in (0, 1)
    ]
    assert SmaxClass.evaluation_info(rollouts)["win_rate"].tolist() == [0, 1]


def test_jax_is_imported_when_an_environment_is_made():
    code = "import sys, benchmarl_trust; from benchmarl.environments import task_config_registry as r; "
    code += "r['smax/3m'].get_from_yaml(); print([m for m in ('jax', 'jaxmarl', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_the_extra_it_is_said_what_to_install(monkeypatch):
    for name in ("jaxmarl", "jaxmarl.environments"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "benchmarl_trust\[smax\]"'):
        make()


@needs_jaxmarl
@pytest.mark.slow
def test_importing_the_suite_prints_nothing_and_leaves_the_streams():
    code = "import io, sys; from benchmarl_trust.environments import Smax; sys.stdout = mine = io.StringIO(); "
    code += "Smax('3m'); assert sys.stdout is mine; sys.stdout = sys.__stdout__; print(repr(mine.getvalue()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "''\n"


@needs_jaxmarl
@pytest.mark.slow
def test_importing_the_suite_leaves_the_streams_open():
    """Hydra configures logging anew, which closes what handlers hold."""
    code = "import io, sys, logging.config; sys.stderr = mine = io.StringIO(); "
    code += "from benchmarl_trust.environments import Smax; Smax('3m'); assert sys.stderr is mine; "
    code += "sys.stderr = sys.__stderr__; logging.config.dictConfig({'version': 1}); assert not mine.closed"
    subprocess.run([sys.executable, "-c", code], check=True)
