"""The games: their numbers, their specs, and the routes by which BenchMARL reaches them."""

import subprocess
import sys

import pytest
import torch
from benchmarl.hydra_config import load_task_config_from_hydra
from conftest import scalars
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from torchrl.envs.utils import check_env_specs

from benchmarl_trust import MarsConfig, TrustGamesTask
from benchmarl_trust.environments import DifferentialGame, MatrixGame, differential_reward, matrix_reward

CLIMBING = [[11, -30, 0], [-30, 7, 6], [0, 0, 5]]
THREE_PLAYERS = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
SETTINGS = {"start": [2.0, 2.0], "low": 0.0, "high": 7.0, "action_range": 5.0}
tasks = pytest.mark.parametrize("task", list(TrustGamesTask), ids=lambda task: task.name.lower())


def differential(num_envs=1, device="cpu", **settings):
    return DifferentialGame(**{**SETTINGS, **settings}, num_envs=num_envs, device=device)


def play(env, action):
    """What follows one step with the actions [B, N, ...]."""
    return env.step(env.reset().set(("agents", "action"), action))["next"]


def slope(point, step=1e-4):
    steps = step * torch.eye(2, dtype=torch.double)
    return (differential_reward(point + steps) - differential_reward(point - steps)) / (2 * step)


# The differential game


@pytest.mark.parametrize(("maximum", "value"), [((5.192, 5.0), 1.0400), ((1.120, 1.0), 0.9496)])
def test_the_two_maxima(maximum, value):
    point = torch.tensor(maximum, dtype=torch.double)
    assert differential_reward(point).item() == pytest.approx(value, abs=5e-5)
    assert slope(point).abs().max() < 1e-3
    angle = torch.linspace(0, 2 * torch.pi, 100, dtype=torch.double)
    around = point + 0.1 * torch.stack([angle.cos(), angle.sin()], -1)
    assert (differential_reward(around) < differential_reward(point)).all()


def test_no_better_point_in_the_box():
    line = torch.linspace(0, 7, 351, dtype=torch.double)
    reward = differential_reward(torch.cartesian_prod(line, line)).view(351, 351)
    inside = reward[1:-1, 1:-1]
    neighbours = [reward[1 + i : 350 + i, 1 + j : 350 + j] for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    peaks = (inside > torch.stack(neighbours).amax(0)).nonzero() + 1
    torch.testing.assert_close(line[peaks], torch.tensor([[1.12, 1.0], [5.2, 5.0]], dtype=torch.double))
    assert reward.max() < 1.0401


def test_differential_reward_by_hand():
    two_pi = 2 * torch.pi
    value = 10 / (two_pi * 3) + 0.5 + 5.3 / two_pi * torch.tensor(-16.0, dtype=torch.double).exp()
    assert differential_reward(torch.tensor([5.0, 5.0], dtype=torch.double)).item() == pytest.approx(value.item())


def test_both_maxima_can_be_reached_from_the_start_of_the_yaml():
    config = TrustGamesTask.DIFFERENTIAL.get_from_yaml().config
    for maximum in ((5.192, 5.0), (1.120, 1.0)):
        for start, goal in zip(config["start"], maximum, strict=True):
            assert abs(goal - start) < 0.8 * config["action_range"], "where tanh is not yet flat"


def test_at_the_start_of_the_yaml_the_slope_leads_to_the_worse_maximum():
    start = torch.tensor(TrustGamesTask.DIFFERENTIAL.get_from_yaml().config["start"], dtype=torch.double)
    assert slope(start).tolist() == pytest.approx([-0.226, -0.328], abs=1e-3)
    for _ in range(2000):
        start = start + 0.05 * slope(start)
    assert start.tolist() == pytest.approx([1.120, 1.0], abs=1e-3)


def test_batched_differential_game_gives_the_reward_of_the_executed_action():
    env = differential(num_envs=64, start=[1.0, 3.0])
    action = env.full_action_spec.rand()["agents", "action"]
    executed = (torch.tensor([1.0, 3.0]) + action.squeeze(-1)).clamp(0, 7)
    reward = play(env, action)["agents", "reward"]
    assert reward.shape == (64, 2, 1)
    torch.testing.assert_close(reward, differential_reward(executed)[:, None, None].expand(64, 2, 1))


def test_executed_action_is_clipped():
    env = differential(num_envs=2, low=1.0, high=6.0)
    reward = play(env, torch.tensor([[[-4.0], [4.5]], [[-1.0], [4.0]]]))["agents", "reward"]
    assert reward[0, 0] == reward[1, 0] == differential_reward(torch.tensor([1.0, 6.0]))


def test_actions_are_bounded_by_the_range():
    space = differential(action_range=3.0).full_action_spec_unbatched["agents", "action"].space
    assert space.low.tolist() == [[-3.0], [-3.0]]
    assert space.high.tolist() == [[3.0], [3.0]]


# The matrix games


def test_first_index_is_the_first_agent():
    payoff = [[1, 2], [3, 4]]
    reward = play(MatrixGame(payoff, num_envs=4), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))["agents", "reward"]
    assert reward[..., 0].tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]


def test_three_players():
    env = MatrixGame(THREE_PLAYERS, num_envs=3)
    action = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert play(env, action)["agents", "reward"][..., 0].tolist() == [[4] * 3, [2] * 3, [1] * 3]
    assert env.full_action_spec_unbatched["agents", "action"].shape == (3,)


def test_batched_matrix_game_gives_the_payoffs():
    env = MatrixGame(CLIMBING, num_envs=64)
    action = env.full_action_spec.rand()["agents", "action"]
    expected = matrix_reward(torch.tensor(CLIMBING, dtype=torch.float), action)
    assert (play(env, action)["agents", "reward"] == expected[:, None, None]).all()


@pytest.mark.parametrize(
    ("task", "best", "worst"),
    [(TrustGamesTask.CLIMBING, [(0, 0, 11)], -30), (TrustGamesTask.PENALTY, [(0, 0, 10), (2, 2, 10)], -100)],
)
def test_optima_of_the_yaml(task, best, worst):
    payoff = torch.tensor(task.get_from_yaml().config["payoff"])
    assert [(*i, payoff.max().item()) for i in (payoff == payoff.max()).nonzero().tolist()] == best
    assert payoff.min() == worst
    # (1, 1) is an equilibrium: no agent gains by leaving it alone, and it is not a best joint action.
    assert payoff[1, 1] == payoff[1].max() == payoff[:, 1].max() < payoff.max()


# As environments


GAMES = {
    "differential": lambda **kwargs: differential(**kwargs),
    "climbing": lambda **kwargs: MatrixGame(CLIMBING, **kwargs),
    "three_players": lambda **kwargs: MatrixGame(THREE_PLAYERS, **kwargs),
}
games = pytest.mark.parametrize("game", list(GAMES.values()), ids=list(GAMES))


@games
@pytest.mark.parametrize("num_envs", [1, 5])
def test_specs(game, num_envs):
    check_env_specs(game(num_envs=num_envs))


@games
def test_observation_is_the_agents_index_always_and_an_episode_is_one_step(game):
    env = game(num_envs=5)
    n_agents = env.full_action_spec_unbatched["agents", "action"].shape[0]
    rollout = env.rollout(4, break_when_any_done=False)
    index = torch.eye(n_agents).expand(5, 4, n_agents, n_agents)
    assert torch.equal(rollout["agents", "observation"], index)
    assert torch.equal(rollout["next", "agents", "observation"], index)
    for flag in ("done", "terminated"):
        assert not rollout[flag].any()
        assert rollout["next", flag].all()


@games
def test_seeds_change_nothing(game):
    assert (game(num_envs=2).reset() == game(num_envs=2).reset()).all()
    env = game(num_envs=2)
    env.set_seed(7)
    assert (env.reset() == game(num_envs=2).reset()).all()


@pytest.mark.gpu
@games
def test_everything_is_on_the_device(game):
    env = game(num_envs=5, device="cuda")
    check_env_specs(env)
    assert all(value.is_cuda for value in env.rollout(2, break_when_any_done=False).values(True, True))
    check_env_specs(game(num_envs=5).to("cuda"))


# Bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 7.0}, "task.low=7.0 must be below task.high=7.0"),
        ({"high": -1.0}, "task.low=0.0 must be below task.high=-1.0"),
        ({"high": float("inf")}, "task.high=inf must be a finite number"),
        ({"low": "zero"}, "task.low=zero must be a finite number"),
        ({"action_range": 0.0}, "task.action_range=0.0 must be above 0"),
        ({"action_range": -5}, "task.action_range=-5 must be above 0"),
        ({"action_range": float("nan")}, "task.action_range=nan must be a finite number"),
        ({"start": [2.0]}, "must be two numbers, one per agent, such as task.start="),
        ({"start": [2.0, 2.0, 2.0]}, "must be two numbers"),
        ({"start": 2.0}, "must be two numbers"),
        ({"start": [2.0, "2"]}, "must be two numbers"),
        ({"start": [2.0, float("nan")]}, "must be two numbers"),
        ({"start": [2.0, 7.5]}, "must lie within .* move it inside"),
        ({"start": [-0.1, 2.0]}, "must lie within .* move it inside"),
    ],
)
def test_bad_differential_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        differential(**settings)
    assert f"task.{next(iter(settings))}=" in str(error.value)


@pytest.mark.parametrize(
    ("payoff", "message"),
    [
        ([[1, "a"], [2, 3]], "is not a tensor of numbers"),
        ([[1, None], [2, 3]], "is not a tensor of numbers"),
        ("10", "is not a tensor of numbers"),
        (None, "is not a tensor of numbers"),
        ([[1, 2], [3]], "is not a tensor of numbers"),
        ([[1, 2], 3], "is not a tensor of numbers"),
        ([[1, float("nan")], [2, 3]], "must be finite"),
        ([1, 2], "of two agents or more"),
        (3.0, "of two agents or more"),
        ([], "of two agents or more"),
        ([[1, 2, 3], [4, 5, 6]], r"\(2, 3\) actions .* the same number"),
        ([[1]], "two or more"),
    ],
)
def test_bad_payoffs(payoff, message):
    with pytest.raises(ValueError, match=f"task.payoff.*{message}") as error:
        MatrixGame(payoff)
    assert "give nested lists" in str(error.value) or "equally long" in str(error.value)


def test_bad_settings_are_refused_before_collection(make_experiment):
    task = TrustGamesTask.DIFFERENTIAL.get_from_yaml()
    task.config["start"] = [8.0, 1.0]
    with pytest.raises(ValueError, match=r"task.start=\[8.0, 1.0\]"):
        make_experiment(MarsConfig.get_from_yaml(), task=task)


# In BenchMARL


def test_overrides_are_checked_by_hydra():
    def load(override):
        with initialize_config_module("benchmarl.conf", version_base=None):
            cfg = compose("config", overrides=["algorithm=mappo", "task=trust_games/differential", override])
        return load_task_config_from_hydra(cfg.task, "trust_games/differential").config

    assert load("task.start=[1,1.5]")["start"] == [1.0, 1.5]
    with pytest.raises(ConfigCompositionException, match=r"task\.low=zero"):
        load("task.low=zero")
    with pytest.raises(ConfigCompositionException, match="strat"):
        load("task.strat=[1,1]")


def test_yaml_of_a_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("payoff: [[1, 0], [0, 2]]\n")
    assert TrustGamesTask.PENALTY.get_from_yaml(str(path)).config == {"payoff": [[1, 0], [0, 2]]}


@tasks
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_run(task, share, run):
    experiment = run(MarsConfig.get_from_yaml(), task=task.get_from_yaml(), share_policy_params=share, evaluation=True)
    logged = scalars(experiment)
    # One step is one episode, and all agents get the same reward.
    episode = logged["collection_reward_episode_reward_mean"]
    assert episode == pytest.approx(logged["collection_reward_reward_mean"])
    assert len(logged["eval_reward_episode_reward_mean"]) == 2
    assert set(logged["eval_reward_episode_len_mean"]) == {1}


def test_three_players_run(run):
    task = TrustGamesTask.PENALTY.get_task({"payoff": THREE_PLAYERS})
    assert run(MarsConfig.get_from_yaml(), task=task).group_map == {"agents": ["agent_0", "agent_1", "agent_2"]}


def test_agents_learn_to_keep_off_the_worst(run):
    """Random agents of the climbing game get -3.4 on average, agents that play (2, 2) or better 5 to 11."""
    experiment = run(
        MarsConfig.get_from_yaml(),
        task=TrustGamesTask.CLIMBING.get_from_yaml(),
        max_n_iters=20,
        on_policy_n_minibatch_iters=10,
        on_policy_collected_frames_per_batch=60,
        on_policy_minibatch_size=60,
        lr=0.03,
    )
    reward = scalars(experiment)["collection_reward_reward_mean"]
    assert reward[0] < 3
    assert sum(reward[-5:]) / 5 > 4


@pytest.mark.slow
def test_stock_command_line(tmp_path):
    overrides = [
        "algorithm=mars,mappo",
        "task=trust_games/differential",
        "task.start=[1.0,1.0]",
        "experiment.loggers=[csv]",
        "experiment.render=False",
        "experiment.max_n_iters=1",
        "experiment.max_n_frames=null",
        "experiment.on_policy_collected_frames_per_batch=40",
        "experiment.on_policy_n_envs_per_worker=4",
        "experiment.on_policy_n_minibatch_iters=1",
        "experiment.on_policy_minibatch_size=20",
        "experiment.evaluation_interval=40",
        "experiment.evaluation_episodes=2",
        "experiment.checkpoint_at_end=True",
    ]
    output = python("-m", "benchmarl.run", "-m", *overrides, cwd=tmp_path)
    assert "Algorithm: mars, Task: trust_games/differential" in output
    assert "TaskConfig python dataclass not found" not in output
    checkpoints = sorted(tmp_path.rglob("checkpoint_40.pt"))
    assert len(checkpoints) == 2
    output = python("-m", "benchmarl.evaluate", str(checkpoints[0]), cwd=tmp_path)
    assert "Evaluation results logged" in output
    assert "  start:\n  - 1.0\n  - 1.0\n" in output


def python(*arguments, cwd) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr
