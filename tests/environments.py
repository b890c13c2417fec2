"""Small TorchRL environments with the specs of tasks whose engines are not at hand."""

from types import MappingProxyType

import torch
from benchmarl.environments import TaskClass
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import DTypeCastTransform, EnvBase

N_ACTIONS = 4


class Episodes(EnvBase):
    """Episodes of ``max_steps`` steps, not vectorised; a subclass has ``_observe`` and ``_rewards`` by group."""

    def __init__(self, max_steps, seed):
        super().__init__(device="cpu", batch_size=[])
        self.max_steps = max_steps
        self._set_seed(seed)
        self.done_spec = Composite(done=Binary(1, (1,), dtype=torch.bool), terminated=Binary(1, (1,), dtype=torch.bool))

    def _set_seed(self, seed):
        self.generator = torch.Generator().manual_seed(seed or 0)

    def _reset(self, tensordict=None, **kwargs):
        self.step_count = 0
        done = torch.zeros(1, dtype=torch.bool)
        return self._observe().update({"done": done, "terminated": done.clone()})

    def _step(self, tensordict):
        rewards = self._rewards(tensordict)  # for what was shown before
        self.step_count += 1
        done = torch.tensor([self.step_count >= self.max_steps])
        out = self._observe().update({"done": done, "terminated": done.clone()})
        for group, reward in rewards.items():
            out[group, "reward"] = reward
        return out


class StandIn(Episodes):
    """Agents that get reward 1 for the action whose number their observation shows; not vectorised.

    ``mask``: some actions are forbidden, as in SMAC. ``rgb``: observations are uint8 images, as in MeltingPot, and
    with ``nested`` they have MeltingPot's key, and a vector beside them. ``state``: a global state beside the
    observations, an image if they are. ``absent``: the last agent is marked absent from step 2 on, and with a mask it
    can do nothing but action 0 then; ``absent="unmarked"``: that alone tells, as in SMAC.
    """

    def __init__(self, n_agents=3, max_steps=5, mask=False, rgb=False, nested=False, state=False, absent=False, seed=0):
        super().__init__(max_steps, seed)
        self.n_agents = n_agents
        self.mask, self.rgb, self.nested, self.state, self.absent = mask, rgb, nested, state, absent
        observation = Unbounded((n_agents, 8, 8, 3), dtype=torch.uint8) if rgb else Unbounded((n_agents, N_ACTIONS))
        if nested:
            observation = Composite(RGB=observation, INVENTORY=Unbounded((n_agents, 2)), shape=(n_agents,))
        agents = Composite(observation=observation, shape=(n_agents,))
        if mask:
            agents["action_mask"] = Binary(N_ACTIONS, (n_agents, N_ACTIONS), dtype=torch.bool)
        if absent is True:
            agents["mask"] = Binary(n_agents, (n_agents,), dtype=torch.bool)
        self.observation_spec = Composite(agents=agents)
        if state and rgb:
            self.observation_spec["RGB"] = Unbounded((16, 16, 3), dtype=torch.uint8)
        elif state:
            self.observation_spec["state"] = Unbounded((n_agents * N_ACTIONS,))
        self.action_spec = Composite(agents=Composite(action=Categorical(N_ACTIONS, (n_agents,)), shape=(n_agents,)))
        self.reward_spec = Composite(agents=Composite(reward=Unbounded((n_agents, 1)), shape=(n_agents,)))

    def _observe(self) -> TensorDict:
        self.goal = torch.randint(N_ACTIONS, (self.n_agents,), generator=self.generator)
        hot = torch.nn.functional.one_hot(self.goal, N_ACTIONS).float()
        agents = {"observation": hot}
        if self.rgb:
            image = (self.goal * 60).view(-1, 1, 1, 1).expand(-1, 8, 8, 3).to(torch.uint8)
            nested = TensorDict(RGB=image, INVENTORY=torch.zeros(self.n_agents, 2), batch_size=self.n_agents)
            agents["observation"] = nested if self.nested else image
        if self.mask:
            agents["action_mask"] = (torch.rand(hot.shape, generator=self.generator) < 0.5) | hot.bool()
        present = torch.arange(self.n_agents) < self.n_agents - (self.step_count >= 2)
        if self.absent is True:
            agents["mask"] = present
        if self.mask and self.absent:
            nothing = torch.arange(N_ACTIONS) == 0
            agents["action_mask"] = torch.where(present.unsqueeze(-1), agents["action_mask"], nothing)
        out = TensorDict(agents=TensorDict(agents, batch_size=self.n_agents))
        if self.state and self.rgb:
            out["RGB"] = image[0].repeat(2, 2, 1)
        elif self.state:
            out["state"] = hot.flatten()
        return out

    def _rewards(self, tensordict):
        return {"agents": (tensordict["agents", "action"] == self.goal).float().unsqueeze(-1)}


class StandInTask(TaskClass):
    """:class:`StandIn`, or another of these, as a BenchMARL task; ``config`` holds its arguments."""

    env = StandIn

    def __init__(self, **config):
        super().__init__(name="STAND_IN", config=config)

    def get_env_fun(self, num_envs, continuous_actions, seed, device):
        return lambda: self.env(**self.config, seed=seed)

    def supports_continuous_actions(self):
        return False

    def supports_discrete_actions(self):
        return True

    def max_steps(self, env):
        return 5

    def has_render(self, env):
        return False

    def group_map(self, env):
        return {"agents": [f"agent_{i}" for i in range(self.config.get("n_agents", 3))]}

    def _spec(self, env, key):
        spec = env.observation_spec["agents"]
        if key not in spec.keys():
            return None
        return Composite(agents=Composite({key: spec[key].clone()}, shape=spec.shape))

    def observation_spec(self, env):
        return self._spec(env, "observation")

    def action_mask_spec(self, env):
        return self._spec(env, "action_mask")

    def info_spec(self, env):
        return None

    def state_spec(self, env):
        if not self.config.get("state"):
            return None
        key = "RGB" if self.config.get("rgb") else "state"
        return Composite({key: env.observation_spec[key].clone()})

    def action_spec(self, env):
        return env.full_action_spec

    def get_replay_buffer_transforms(self, env, group):
        if not self.config.get("rgb"):
            return []
        image = ("agents", "observation", "RGB") if self.config.get("nested") else ("agents", "observation")
        keys = [image, *(["RGB"] if self.config.get("state") else [])]
        keys += [("next", *((key,) if isinstance(key, str) else key)) for key in keys]
        return [DTypeCastTransform(torch.uint8, torch.float, in_keys=keys, in_keys_inv=[])]  # as BenchMARL's MeltingPot

    @staticmethod
    def env_name():
        return "standin"


class Crew(Episodes):
    """Two groups of unlike agents with one reward: a scout, and workers of whom the second is absent from step 2 on.

    Every agent is shown a number; all are paid the share of the agents present that name theirs.
    """

    sizes = MappingProxyType({"scout": (1, 3), "workers": (2, N_ACTIONS)})  # group -> agents, actions

    def __init__(self, max_steps=5, seed=0):
        super().__init__(max_steps, seed)
        observation, action, reward = Composite(), Composite(), Composite()
        for group, (n, kinds) in self.sizes.items():
            seen = {"observation": Unbounded((n, kinds)), "mask": Binary(n, (n,), dtype=torch.bool)}
            observation[group] = Composite(seen, shape=(n,))
            action[group] = Composite(action=Categorical(kinds, (n,)), shape=(n,))
            reward[group] = Composite(reward=Unbounded((n, 1)), shape=(n,))
        self.observation_spec, self.action_spec, self.reward_spec = observation, action, reward

    def _observe(self) -> TensorDict:
        out, self.goals, self.masks = TensorDict(), {}, {}
        for group, (n, kinds) in self.sizes.items():
            self.goals[group] = torch.randint(kinds, (n,), generator=self.generator)
            self.masks[group] = torch.arange(n) < n - (group == "workers" and self.step_count >= 2)
            hot = torch.nn.functional.one_hot(self.goals[group], kinds).float()
            out[group] = TensorDict(observation=hot, mask=self.masks[group], batch_size=n)
        return out

    def _rewards(self, tensordict):
        right = torch.cat([tensordict[group, "action"] == self.goals[group] for group in self.sizes])
        present = torch.cat(list(self.masks.values()))
        reward = (right & present).sum() / present.sum()
        return {group: reward.expand(n, 1).clone() for group, (n, _) in self.sizes.items()}


class CrewTask(StandInTask):
    """:class:`Crew` as a BenchMARL task."""

    env = Crew

    def group_map(self, env):
        return {group: [f"{group}_{i}" for i in range(n)] for group, (n, _) in Crew.sizes.items()}

    def observation_spec(self, env):
        specs = {group: env.observation_spec[group] for group in Crew.sizes}
        return Composite(
            {
                group: Composite(observation=spec["observation"].clone(), shape=spec.shape)
                for group, spec in specs.items()
            }
        )

    def action_mask_spec(self, env):
        return None
