"""``python -m benchmarl_trust.export``: files that act as the experiment's policy where none of ours is installed."""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, IppoConfig, IsacConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.models import CnnConfig
from environments import StandIn, StandInTask
from problems import CNN, MODELS, mlp
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Composite
from torchrl.envs import ExplorationType, set_exploration_type

from benchmarl_trust import HappoConfig, MarsConfig
from benchmarl_trust.export import export, export_policies, main

slow = pytest.mark.slow
shared_or_not = pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])


class Continuous(StandIn):
    """Continuous actions, of other bounds for each agent."""

    def __init__(self, **config):
        super().__init__(**config)
        low = -torch.arange(1.0, 2 * self.n_agents + 1).view(self.n_agents, 2)
        action = Bounded(low, -2 * low, (self.n_agents, 2))
        self.action_spec = Composite(agents=Composite(action=action, shape=(self.n_agents,)))

    def _rewards(self, tensordict):
        return {"agents": -tensordict["agents", "action"].abs().sum(-1, keepdim=True)}


class ContinuousTask(StandInTask):
    env = Continuous

    def supports_continuous_actions(self):
        return True

    def supports_discrete_actions(self):
        return False


class Tall(nn.Module):
    """A layer that decides by the values of its input."""

    def forward(self, x):
        return x if x.isfinite().all() else x.zero_()


class Loud(nn.Module):
    """A layer with random numbers."""

    def forward(self, x):
        return x + torch.randn_like(x)


def rollout(experiment, group, steps=3, batch=5):
    """Random inputs, and what the experiment's deterministic policy makes of them with its state fed back."""
    generator = torch.Generator().manual_seed(1)
    n_agents, spec = len(experiment.group_map[group]), experiment.test_env.observation_spec
    ndim = len(experiment.test_env.batch_size) + 1
    policy = experiment.algorithm.get_policy_for_loss(group)
    states = [key for key in spec[group].keys() if key.startswith("_hidden")]
    leaves = [key for key in spec[group].keys(True, True) if key not in (*states, "info")]
    shapes = {key: (batch, n_agents, *spec[group][key].shape[ndim:]) for key in [*leaves, *states]}
    data = TensorDict({group: {key: torch.zeros(shapes[key]) for key in states}}, batch_size=batch)
    data["is_init"] = torch.zeros(batch, 1, dtype=torch.bool)
    trace = []
    for _ in range(steps):
        for key in leaves:
            x = torch.randn(shapes[key], generator=generator)
            if spec[group][key].dtype == torch.bool:
                x = (x > 0) | (torch.arange(shapes[key][-1]) == 0)
            elif spec[group][key].dtype == torch.uint8:
                x = x.abs() * 60
            data[group, key] = x.to(spec[group][key].dtype)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            after = policy(data.clone())
        trace.append(after[group])
        for key in states:
            data[group, key] = after["next", group, key]
    return trace


def names(description):
    return [entry["name"] for entry in description["inputs"]]


def description_of(file):
    return json.loads(file.with_name(f"{file.name}.json").read_text())


def check(file, experiment, batches=(5, 1)):
    """The file acts as the experiment's policy, step by step with its own state, on batches of several sizes."""
    description, policy = description_of(file), torch.export.load(file).module()
    group, agents = description["group"], description["agents"]
    keys = [tuple(name.split("_", 1)) if name.startswith("observation_") else name for name in names(description)]
    kinds = [entry["kind"] for entry in description["inputs"]]
    trace, action = rollout(experiment, group), description["outputs"][0]
    tolerance = 1e-6 * max([1, *map(abs, action.get("low", []) + action.get("high", []))])  # of the action's range
    for agent in agents:
        i = experiment.group_map[group].index(agent)
        for batch in batches:
            shapes = [[batch, *e["shape"][1:]] for e in description["inputs"] if e["kind"] == "state"]
            state = [torch.zeros(shape) for shape in shapes]
            for step in trace:
                pairs = zip(keys, kinds, strict=True)
                inputs = [step[key][:batch, i] for key, kind in pairs if kind != "state"]
                action, *state = policy(*inputs, *state)
                expected = step["action"][:batch, i]
                assert action.dtype == expected.dtype
                assert action.shape == expected.shape
                torch.testing.assert_close(action, expected, rtol=0, atol=tolerance)
                if "mask" in kinds:
                    mask = step["action_mask"][:batch, i]
                    assert mask.gather(-1, action.unsqueeze(-1)).all()
                    assert batch == 1 or not mask.all()


def files(folder):
    return {file: file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


def written(experiment, tmp_path, share, **kwargs):
    got = export_policies(experiment, tmp_path / "out", **kwargs)
    expected = ["agents"] if share else [f"agents_{i}" for i in range(len(experiment.group_map["agents"]))]
    assert [file.name for file in got] == [f"{name}.pt2" for name in expected]
    return got


@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
@shared_or_not
@pytest.mark.parametrize("model", ["mlp", *(pytest.param(name, marks=slow) for name in ("gru", "lstm", "gru-mlp"))])
def test_a_file_acts_as_the_experiments_policy(model, share, continuous, make_experiment, tmp_path):
    settings = {"share_policy_params": share, "prefer_continuous_actions": continuous}
    experiment = make_experiment(MarsConfig.get_from_yaml(), model=MODELS[model](), critic=mlp(4), **settings)
    for file in written(experiment, tmp_path, share):
        check(file, experiment)
        (action, *state), inputs = description_of(file)["outputs"], description_of(file)["inputs"]
        assert action["shape"] == (["batch", 2] if continuous else ["batch"])
        assert action["dtype"] == ("float32" if continuous else "int64")
        assert [entry["name"] for entry in state] == [f"next_{e['name']}" for e in inputs if e["kind"] == "state"]
        assert bool(state) == ("gru" in model or "lstm" in model)


@slow
@pytest.mark.parametrize("nested", [False, True], ids=["image", "image and vector"])
@shared_or_not
def test_images(share, nested, make_experiment, tmp_path):
    task = StandInTask(rgb=True, nested=nested)
    experiment = make_experiment(
        MappoConfig.get_from_yaml(), task=task, model=CnnConfig(**CNN), share_policy_params=share
    )
    for file in written(experiment, tmp_path, share):
        check(file, experiment)
        inputs = {entry["name"]: entry["dtype"] for entry in description_of(file)["inputs"]}
        image = {"observation_RGB" if nested else "observation": "uint8"}
        assert inputs == image | ({"observation_INVENTORY": "float32"} if nested else {})


@slow
def test_images_and_continuous_actions_of_unlike_bounds(make_experiment, tmp_path):
    """A policy shared by agents whose bounds differ becomes one file for each."""
    for share in (False, True):
        settings = {"task": ContinuousTask(rgb=True), "share_policy_params": share}
        experiment = make_experiment(MappoConfig.get_from_yaml(), model=CnnConfig(**CNN), **settings)
        for i, file in enumerate(written(experiment, tmp_path, share=False)):
            check(file, experiment)
            action = description_of(file)["outputs"][0]
            assert action["low"] == [-1.0 - 2 * i, -2.0 - 2 * i]
            assert action["high"] == [2.0 + 4 * i, 4.0 + 4 * i]


@shared_or_not
def test_action_masks(share, make_experiment, tmp_path):
    task = StandInTask(mask=True, state=True)
    experiment = make_experiment(HappoConfig.get_from_yaml(), task=task, share_policy_params=share)
    for file in written(experiment, tmp_path, share):
        check(file, experiment)
        assert names(description_of(file)) == ["observation", "action_mask"]
        assert description_of(file)["outputs"][0] == {"name": "action", "shape": ["batch"], "dtype": "int64", "n": 4}


@pytest.mark.parametrize("squashed", [True, False])
def test_within_bounds_if_squashed(squashed, make_experiment, tmp_path):
    config = MarsConfig.get_from_yaml()
    config.use_tanh_normal = squashed
    experiment = make_experiment(config, task=ContinuousTask())
    for file in written(experiment, tmp_path, share=False):
        check(file, experiment)
    for p in experiment.policy.parameters():
        p.data.mul_(100)  # means far out
    for file in written(experiment, tmp_path, share=False):
        action = description_of(file)["outputs"][0]
        assert action["within_bounds"] is squashed
        far, *_ = torch.export.load(file).module()(torch.randn(50, 4))
        low, high = torch.tensor(action["low"]), torch.tensor(action["high"])
        assert bool(((far >= low) & (far <= high)).all()) is squashed


def test_a_checkpoint_from_the_command_line(run, tmp_path, capsys):
    """The file holds what was trained; the run's folder stays as it is, and nothing but the output is written."""
    experiment = run(IppoConfig.get_from_yaml(), checkpoint_at_end=True, evaluation=True)
    checkpoint = experiment.folder_name / "checkpoints" / f"checkpoint_{experiment.total_frames}.pt"
    before, out = files(tmp_path), tmp_path / "new" / "out"
    capsys.readouterr()
    main([str(checkpoint), "--out", str(out), "--agent", "1"])
    assert capsys.readouterr().out == f"{out / 'agents_1.pt2'}, agents_1.pt2.json\n"
    new = {file: content for file, content in files(tmp_path).items() if file not in before}
    assert files(tmp_path) == before | new
    assert sorted(new) == sorted([tmp_path / "new", out, out / "agents_1.pt2", out / "agents_1.pt2.json"])
    check(out / "agents_1.pt2", experiment)
    description = description_of(out / "agents_1.pt2")
    assert description["task"] == "vmas/simple_spread"
    assert description["algorithm"] == "ippo"
    assert description["agents"] == ["agent_1"]
    assert description["frames"] == experiment.total_frames == 80
    assert description["outputs"][0]["low"] == [-1.0, -1.0]


def test_several_groups_and_an_ensemble(make_experiment, tmp_path):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    task.config.update(max_steps=5)
    configs = {"adversary": HappoConfig.get_from_yaml(), "agent": MappoConfig.get_from_yaml()}
    experiment = make_experiment(EnsembleAlgorithmConfig(configs), task=task)
    got = export_policies(experiment, tmp_path / "out")
    assert [file.name for file in got] == [f"adversary_{i}.pt2" for i in range(3)] + ["agent_0.pt2"]
    for file in got:
        check(file, experiment, batches=(5,))
    (one,) = export_policies(experiment, tmp_path / "one", group="agent")
    assert one.name == "agent_0.pt2"
    with pytest.raises(ValueError, match="agent is 0, of several groups: name one with group=adversary or agent"):
        export_policies(experiment, tmp_path / "one", agent=0)


def test_an_experiment_goes_on_as_if_nothing_had_been_exported(make_experiment, tmp_path):
    experiment = make_experiment(MarsConfig.get_from_yaml(), share_policy_params=True)
    modes = [module.training for module in experiment.policy.modules()]
    state = {name: p.clone() for name, p in experiment.policy.named_parameters()}
    generator = torch.get_rng_state()
    (file,) = export_policies(experiment, tmp_path / "out")
    assert [module.training for module in experiment.policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    with torch.no_grad():
        next(experiment.policy.parameters()).zero_()
    assert not torch.equal(next(iter(torch.export.load(file).module().parameters())), torch.zeros(()))
    assert state.keys() == dict(experiment.policy.named_parameters()).keys()


ELSEWHERE = """
import sys
for name in ("benchmarl", "benchmarl_trust", "torchrl", "tensordict", "hydra", "vmas"):
    sys.modules[name] = None
import torch
inputs, action, after = torch.load(sys.argv[2])
got, *state = torch.export.load(sys.argv[1]).module()(*inputs)
torch.testing.assert_close(got, action, rtol=0, atol=1e-6)
torch.testing.assert_close(state, after, rtol=0, atol=1e-6)
print("same")
"""


@pytest.mark.parametrize("model", ["mlp", pytest.param("gru", marks=slow)])
def test_a_process_that_can_import_nothing_of_ours(model, make_experiment, tmp_path):
    experiment = make_experiment(MarsConfig.get_from_yaml(), model=MODELS[model](), critic=mlp(4))
    file = export_policies(experiment, tmp_path / "out")[1]
    first = rollout(experiment, "agents")[0]
    inputs, after = [first["observation"][:, 1]], []
    if model == "gru":
        hidden = torch.rand_like(first["_hidden_gru_0"])
        data = TensorDict(agents=first.select("observation"), batch_size=5)
        data["agents", "_hidden_gru_0"], data["is_init"] = hidden, torch.zeros(5, 1, dtype=torch.bool)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            data = experiment.policy(data)
        first, after = data["agents"], [data["next", "agents", "_hidden_gru_0"][:, 1].clone()]
        inputs.append(hidden[:, 1].clone())
    torch.save((inputs, first["action"][:, 1].clone(), after), tmp_path / "expected")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, file, tmp_path / "expected"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stderr[-2000:]
    for word in (b"tensordict", b"torchrl", b"benchmarl"):
        assert word not in file.read_bytes().lower()


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not all here: pip install 'benchmarl_trust[export,test]'",
)
@pytest.mark.parametrize("kind", ["mlp", "masked", *(pytest.param(k, marks=slow) for k in ("gru", "lstm", "cnn"))])
def test_onnx(kind, make_experiment, tmp_path):
    import onnxruntime

    tasks = {"masked": StandInTask(mask=True), "cnn": ContinuousTask(rgb=True)}
    models = {"masked": MODELS["mlp"], **MODELS}
    critic = None if kind == "cnn" else mlp(4)
    experiment = make_experiment(MappoConfig.get_from_yaml(), tasks.get(kind), models[kind](), critic)
    for i, file in enumerate(export_policies(experiment, tmp_path / "out", format="onnx")):
        assert sorted(path.name for path in file.parent.glob(f"{file.stem}*")) == [file.name, f"{file.name}.json"]
        description = description_of(file)
        session = onnxruntime.InferenceSession(file)
        assert [entry.name for entry in session.get_inputs()] == names(description)
        assert [entry.name for entry in session.get_outputs()] == [e["name"] for e in description["outputs"]]
        for batch in (5, 1):
            state = {
                e["name"]: torch.zeros(batch, *e["shape"][1:]).numpy()
                for e in description["inputs"]
                if e["kind"] == "state"
            }
            for step in rollout(experiment, "agents"):
                inputs = {
                    e["name"]: step[e["name"]][:batch, i].numpy() for e in description["inputs"] if e["kind"] != "state"
                }
                action, *after = session.run(None, inputs | state)
                state = dict(zip(state, after, strict=True))
                torch.testing.assert_close(torch.from_numpy(action), step["action"][:batch, i], rtol=0, atol=1e-5)


def test_onnx_without_the_extra_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarl_trust.export.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"format=onnx needs onnx and onnxscript: pip install 'benchmarl_trust\[export"
    ):
        export(tmp_path / "any.pt", tmp_path, format="onnx")


def test_what_is_not_there_is_refused(make_experiment, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"There is no checkpoint .*nothing\.pt"):
        export(tmp_path / "nothing.pt", out)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "alone.pt").touch()
    with pytest.raises(
        ValueError, match=r"There is no .*config\.pkl: the checkpoint must lie in the folder checkpoints"
    ):
        export(tmp_path / "alone" / "alone.pt", out)
    with pytest.raises(SystemExit, match="There is no checkpoint"):
        main([str(tmp_path / "nothing.pt")])
    with pytest.raises(ValueError, match="format is tflite: it must be one of torch, onnx"):
        export(tmp_path / "alone" / "alone.pt", out, format="tflite")
    experiment = make_experiment(MarsConfig.get_from_yaml())
    with pytest.raises(ValueError, match="group is red: the groups of this run are agents"):
        export_policies(experiment, out, group="red")
    for agent in (3, -1):
        with pytest.raises(ValueError, match=f"agent is {agent}: agents has the agents 0 to 2"):
            export_policies(experiment, out, agent=agent)
    assert not out.exists()


def test_models_that_cannot_be_exported_are_named(make_experiment, tmp_path):
    def refused(words, *args, **kwargs):
        with pytest.raises(ValueError, match=words):
            export_policies(make_experiment(*args, **kwargs), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    mappo = MappoConfig.get_from_yaml()
    pytest.importorskip("torch_geometric")
    refused("policy of agents has a Gnn.*Train with mlp", mappo, model=MODELS["gnn-mlp"](), critic=mlp(4))
    layers = mlp(8)
    layers.activation_class = Tall
    refused(r"cannot trace the policy \(Mlp, Tall\)", mappo, model=layers, critic=mlp(4), share_policy_params=True)
    layers.activation_class = Loud
    refused(r"Mlp, Loud", mappo, model=layers, critic=mlp(4), share_policy_params=True)
    refused("isac is off-policy", IsacConfig.get_from_yaml(), off_policy_init_random_frames=0)


@pytest.mark.parametrize("kind", ["mlp", pytest.param("gru", marks=slow)])
def test_a_bare_loop_earns_what_the_experiments_policy_earns(kind, make_experiment, monkeypatch, tmp_path):
    """In the same seeded environments, agent by agent."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    bare_loop = importlib.import_module("bare_loop")
    task = VmasTask.BALANCE.get_from_yaml()
    task.config.update(max_steps=20, n_agents=3)
    settings = {"prefer_continuous_actions": kind == "mlp", "share_policy_params": kind == "gru"}
    settings |= {"evaluation_episodes": 7}
    experiment = make_experiment(MarsConfig.get_from_yaml(), task=task, model=MODELS[kind](), critic=mlp(4), **settings)
    export_policies(experiment, tmp_path / "out")
    experiment.test_env.set_seed(5)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        rollout = experiment.test_env.rollout(20, experiment.policy, break_when_any_done=False)
    done = rollout["next", "done"].cumsum(1)
    before = done - rollout["next", "done"].int() == 0  # the first end counts
    expected = (rollout["next", "agents", "reward"] * before.unsqueeze(-1)).sum(1).squeeze(-1).T

    policies = bare_loop.load(tmp_path / "out")
    returns = bare_loop.episode(policies, bare_loop.environment(policies, 7), seed=5)
    torch.testing.assert_close(returns, expected, rtol=1e-4, atol=1e-4)
    assert returns.std() > 0
