"""Steps per second of MaMuJoCo and SMAX: the library by itself, and this package's environment in TorchRL's rollout.

    OMP_NUM_THREADS=1 python benchmarks/environments.py mamujoco
    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/environments.py smax     # JAX would take all cores

Random actions, all in turns in one process; medians by processor time of that process. A step is one of one copy of the
environment. Needs the extra of the suite.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torchrl.envs import EnvBase, PettingZooWrapper

from benchmarl_trust.environments import MamujocoTask, Smax

COPIES = 30
BATTLES = 32


def rollout(env: EnvBase, steps: int, policy: Callable | None = None) -> int:
    """Steps of all copies that were made."""
    return env.rollout(steps, policy, break_when_any_done=False).numel()


def mamujoco(steps: int) -> dict[str, Callable[[], int]]:
    """HalfCheetah 2x3."""
    from gymnasium_robotics import mamujoco_v1
    from pettingzoo.utils.wrappers import BaseParallelWrapper

    class WithoutInfo(BaseParallelWrapper):
        """TorchRL's wrapper fails on an info that a step has and a reset has not."""

        def step(self, actions: dict) -> tuple:
            """As the environment's, without what it tells beside."""
            *values, infos = super().step(actions)
            return *values, {name: {} for name in infos}

    task = MamujocoTask.HALFCHEETAH_2X3.get_from_yaml()
    robot, conf, seen = (task.config[key] for key in ("scenario", "agent_conf", "agent_obsk"))
    library = mamujoco_v1.parallel_env(robot, conf, agent_obsk=seen)

    def alone() -> int:
        library.reset(seed=0)
        for _ in range(steps):
            *_, truncated, _ = library.step({name: library.action_space(name).sample() for name in library.agents})
            if any(truncated.values()):
                library.reset()
        return steps

    many = task.get_env_fun(COPIES, True, 0, "cpu")()
    task.config["vectorized"] = False
    single = task.get_env_fun(1, True, 0, "cpu")()
    wrapper = PettingZooWrapper(WithoutInfo(mamujoco_v1.parallel_env(robot, conf, agent_obsk=seen)), use_mask=False)
    return {
        "the library by itself": alone,
        f"rollout of {COPIES} at once": lambda: rollout(many, steps // 10),
        "rollout of one": lambda: rollout(single, steps),
        "rollout of one in TorchRL's PettingZooWrapper": lambda: rollout(wrapper, steps),
    }


def smax(steps: int) -> dict[str, Callable[[], int]]:
    """5m_vs_6m, allowed actions."""
    import jax
    import jax.numpy as jnp

    env = Smax("5m_vs_6m", num_envs=BATTLES, seed=0)
    battle = env.battle

    def act(key: "jax.Array", state: object) -> tuple:
        key, draw, own = jax.random.split(key, 3)
        allowed = battle.get_avail_actions(state)
        draws = jax.random.split(draw, len(battle.agents))
        actions = {
            agent: jnp.argmax(jax.random.uniform(draw, allowed[agent].shape) * allowed[agent])
            for agent, draw in zip(battle.agents, draws, strict=True)
        }
        return key, *battle.step(own, state, actions)

    advance, begin = jax.jit(jax.vmap(act)), jax.jit(jax.vmap(battle.reset))

    def alone() -> int:
        keys = jax.random.split(jax.random.PRNGKey(0), BATTLES)
        _, state = begin(keys)
        for _ in range(steps // 10):
            keys, seen, state, *_ = advance(keys, state)
            jax.block_until_ready(seen)
        return steps // 10 * BATTLES

    def allowed(td):
        mask = td["agents", "action_mask"]
        return td.set(("agents", "action"), (torch.rand(mask.shape) * mask).argmax(-1))

    return {
        f"the library by itself, {BATTLES} at once": alone,
        f"rollout of {BATTLES} at once": lambda: rollout(env, steps // 10, allowed),
    }


SUITES = {"mamujoco": mamujoco, "smax": smax}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--steps", type=int, default=1000, help="of one environment, in each turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    arguments = parser.parse_args()
    runs = SUITES[arguments.suite](arguments.steps)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats + 1):  # the first round warms up
        for name, run in runs.items():
            start = time.process_time()
            made = run()
            rates[name].append(made / (time.process_time() - start))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; steps per second, medians")
    for name, values in rates.items():
        print(f"{name:<46}{statistics.median(values[1:]):>10.0f}")


if __name__ == "__main__":
    main()
