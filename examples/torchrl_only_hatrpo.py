"""HATRPO on a VMAS task with TorchRL alone: natural-gradient steps in a training loop of one's own.

As ``torchrl_only.py``, but an agent's turn is one natural step on the whole batch, under a bound on the exact KL from
its old policy; policies have no optimizer. UniformAllocation gives each agent the same bound; KktAllocation and
GreedyAllocation of ``benchmarl_trust.updates`` divide one budget among them.

    python examples/torchrl_only_hatrpo.py [iterations]

For each iteration it prints the mean reward of a step, which rises from -0.157 in the first to +0.110 in the 20th
(torch 2.13 on a CPU), the mean of the compound ratio M at each position of the order, whose expectation is 1, and what
each turn has spent of its bound. It writes no files.
"""

import sys

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.envs import VmasEnv
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal
from torchrl.objectives import ValueEstimators

from benchmarl_trust.functional import normalize_advantage
from benchmarl_trust.losses import SurrogateLoss
from benchmarl_trust.policy import GroupPolicy, remember_old_policy
from benchmarl_trust.updates import NaturalGradient, NaturalStep, UniformAllocation, sweep

ITERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
ENVS, STEPS, EPOCHS, MINIBATCH, LR, KL_BOUND = 60, 100, 10, 1000, 1e-3, 0.01
NAMES = ("observation", "logits", "loc", "scale", "action", "state_value", "reward", "advantage")
OBSERVATION, LOGITS, LOC, SCALE, ACTION, VALUE, REWARD, ADVANTAGE = (("agents", name) for name in NAMES)

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
env = VmasEnv("balance", num_envs=ENVS, max_steps=STEPS, n_agents=3, seed=0)
n, width = env.observation_spec[OBSERVATION].shape[-2:]
space = env.full_action_spec_unbatched[ACTION].space


def policy_body(n_agents: int, share_params: bool) -> TensorDictSequential:
    outputs = 2 * space.low.shape[-1]  # a location and a scale for each dimension of the action
    net = MultiAgentMLP(width, outputs, n_agents, centralized=False, share_params=share_params, num_cells=[64, 64])
    extractor = TensorDictModule(NormalParamExtractor(), [LOGITS], [LOC, SCALE])
    return TensorDictSequential(TensorDictModule(net, [OBSERVATION], [LOGITS]), extractor)


normal = {"distribution_class": TanhNormal, "distribution_kwargs": {"low": space.low, "high": space.high}}
policy = ProbabilisticActor(policy_body(n, False), in_keys=[LOC, SCALE], out_keys=[ACTION], **normal)
value_net = MultiAgentMLP(width, 1, n, centralized=True, share_params=True, num_cells=[64, 64])
# Of this loss only the critic's half and the value estimator are used: the natural step has its own objective.
loss = SurrogateLoss(policy, TensorDictModule(value_net, [OBSERVATION], [VALUE]), surrogate="linear")
loss.set_keys(value=VALUE, reward=REWARD, advantage=ADVANTAGE, value_target=("agents", "value_target"))
loss.set_keys(done=("agents", "done"), terminated=("agents", "terminated"))
loss.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.9)
critic_optimizer = torch.optim.Adam(loss.critic_network_params.parameters(), LR)

# The fast path: each agent's forward and backward pass runs through a twin, the same network for one agent.
policies = GroupPolicy(policy, n, env.fake_tensordict(), make_twin=lambda: policy_body(1, True))
solver = NaturalGradient(cg_iters=10, cg_damping=0.1)

frames = ENVS * STEPS
for iteration, batch in enumerate(Collector(env, policy, frames_per_batch=frames, total_frames=ITERATIONS * frames)):
    for key in ("done", "terminated"):  # VMAS has one for all agents, the value estimator wants one for each
        batch["next", "agents", key] = batch["next", key].unsqueeze(-1).expand_as(batch["next", REWARD])
    with torch.no_grad():
        loss.value_estimator(batch)
    batch = batch.reshape(-1)
    advantage = normalize_advantage(batch[ADVANTAGE], "batch").squeeze(-1)
    agents = policies.make_agents(batch, advantage)
    for agent in agents:
        remember_old_policy(agent)
    order = torch.randperm(n, generator=generator).tolist()
    step = NaturalStep(agents, UniformAllocation(agents, n * KL_BOUND, solver, order))
    infos = sweep(agents, step.choose, step, factor="full")
    for rows in (rows for _ in range(EPOCHS) for rows in torch.randperm(frames, generator=generator).split(MINIBATCH)):
        critic_optimizer.zero_grad()
        loss.critic_loss(batch[rows])["loss_critic"].backward()
        critic_optimizer.step()
    reward = f"reward {batch['next', REWARD].mean():+.3f}"
    factors, kls = zip(*((f"{info.factor_mean:.3f}", f"{info.step.kl_spent:.4f}") for info in infos), strict=True)
    print(f"{iteration + 1:>2}  {reward}  mean of M {' '.join(factors)}  KL {' '.join(kls)}", flush=True)
