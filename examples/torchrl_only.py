"""HAPPO on a VMAS task with TorchRL alone: the sequential sweep of this package in a training loop of one's own.

Each agent has a policy and an optimizer of its own; one critic sees all observations. In every iteration the agents
take turns in a random order, each weighted by the compound ratio M of those before it; then the critic is trained.

    python examples/torchrl_only.py

takes about a minute on one CPU core and writes no files. For each iteration it prints the mean reward of a step, which
rises, and the mean of M at each position of the order.
"""

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.envs import VmasEnv
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal
from torchrl.objectives import ValueEstimators

from benchmarl_trust.functional import normalize_advantage
from benchmarl_trust.losses import SurrogateLoss
from benchmarl_trust.updates import Agent, GradientStep, GroupPolicy, MinibatchEpochs, remember_old_policy, sweep

ITERATIONS, ENVS, STEPS, EPOCHS, MINIBATCH, LR = 20, 60, 100, 10, 1000, 1e-3
OBSERVATION, LOGITS, LOC, SCALE, ACTION, VALUE = (
    ("agents", key) for key in ("observation", "logits", "loc", "scale", "action", "state_value")
)
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
env = VmasEnv("balance", num_envs=ENVS, max_steps=STEPS, n_agents=3, seed=0)
n, n_observations = env.observation_spec[OBSERVATION].shape[-2:]
space = env.full_action_spec_unbatched[ACTION].space


def mlp(outputs: int, n_agents: int, **kwargs) -> MultiAgentMLP:
    return MultiAgentMLP(n_observations, outputs, n_agents, num_cells=[64, 64], **kwargs)


def policy_body(n_agents: int, share_params: bool) -> TensorDictSequential:
    net = mlp(2 * space.low.shape[-1], n_agents, centralized=False, share_params=share_params)
    return TensorDictSequential(
        TensorDictModule(net, [OBSERVATION], [LOGITS]),
        TensorDictModule(NormalParamExtractor(), [LOGITS], [LOC, SCALE]),
    )


normal = {"distribution_class": TanhNormal, "distribution_kwargs": {"low": space.low, "high": space.high}}
policy = ProbabilisticActor(policy_body(n, False), in_keys=[LOC, SCALE], out_keys=[ACTION], **normal)
critic = TensorDictModule(mlp(1, n, centralized=True, share_params=True), [OBSERVATION], [VALUE])
loss = SurrogateLoss(policy, critic, surrogate="clip")
keys = {key: ("agents", key) for key in ("reward", "done", "terminated", "advantage", "value_target")}
loss.set_keys(value=VALUE, action=ACTION, **keys)
loss.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.9)
critic_parameters = list(loss.critic_network_params.flatten_keys().values())
critic_optimizer = torch.optim.Adam(critic_parameters, LR)

# The fast path: each agent's forward and backward pass runs through a twin, the same network for a single agent.
policies = GroupPolicy(policy, n, env.fake_tensordict(), make_twin=lambda: policy_body(1, True))
optimizers = [torch.optim.Adam(agent.parameters, LR, fused=True) for agent in policies.agents]
step = MinibatchEpochs(GradientStep("clip", epsilon=0.2, max_grad_norm=5.0), EPOCHS, MINIBATCH, generator)


def make_agents(batch: TensorDictBase) -> list[Agent]:
    advantage = normalize_advantage(batch["agents", "advantage"], "batch")
    actions = policies.head.base_action(batch[ACTION])
    data = [
        {"inputs": agent.inputs(batch), "action": actions[:, i], "advantage": advantage[:, i, 0]}
        for i, agent in enumerate(policies.agents)
    ]
    return [Agent(*args, TensorDict(d, len(batch))) for *args, d in zip(policies.agents, optimizers, data, strict=True)]


frames = ENVS * STEPS
for i, batch in enumerate(Collector(env, policy, frames_per_batch=frames, total_frames=ITERATIONS * frames)):
    for key in ("done", "terminated"):  # VMAS has one for all agents, the value estimator wants one for each
        batch["next", "agents", key] = batch["next", key].unsqueeze(-1).expand_as(batch["next", "agents", "reward"])
    with torch.no_grad():
        loss.value_estimator(batch)
    batch = batch.reshape(-1)
    agents = make_agents(batch)
    for agent in agents:
        remember_old_policy(agent)
    infos = sweep(agents, torch.randperm(n, generator=generator).tolist(), step, clip_factor=False)
    for _ in range(EPOCHS):
        for rows in torch.randperm(frames, generator=generator).split(MINIBATCH):
            critic_optimizer.zero_grad()
            loss.critic_loss(batch[rows])["loss_critic"].backward()
            critic_optimizer.step()
    factors = ", ".join(f"{info.factor_mean:.3f}" for info in infos)
    print(f"{i + 1:>3}  reward {batch['next', 'agents', 'reward'].mean():+.3f}  mean M {factors}", flush=True)
