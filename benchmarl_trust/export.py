"""Writes the policies of a checkpoint as files that run without BenchMARL, TorchRL, tensordict and this package::

    python -m benchmarl_trust.export outputs/<day>/<time>/<run>/checkpoints/latest.pt --out policies

writes one file per agent, or one per group where the agents share their policy, in the format of ``torch.export``
(``--format torch``, ``.pt2``) or as ONNX (``--format onnx``, extra ``export``), and beside each a JSON file that says
what goes in and comes out. Any checkpoint of an on-policy algorithm will do, BenchMARL's own as well as this package's.

What a file holds is one agent's deterministic policy, over a batch of any size B::

    action, *state = policy(*observations, [action_mask], *state)

Each tensor begins with B; a shared policy takes the agents in the batch. A continuous action is what BenchMARL's
deterministic evaluation takes: within the environment's bounds if the policy is squashed (``use_tanh_normal``), else
the mean of the normal. A discrete one is the number of the likeliest action that the mask allows, [B]. A recurrent one
starts an episode with zeros for its state, and takes in each step the state that it returned in the step before.
Observations are those after the task's own transforms in BenchMARL, if it has some.

The run's folder is left as it is. Its ``config.pkl``, which lies above the checkpoint, is a pickle: loading it executes
what it says, so export only from runs that you trust. The files written are free of it.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, cast

import torch
from benchmarl.experiment import Experiment
from benchmarl.models import Deepsets, Gnn
from benchmarl.models.common import Model
from benchmarl.models.gru import MultiAgentGRU
from benchmarl.models.lstm import MultiAgentLSTM
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchrl.data.tensor_specs import CategoricalBox
from torchrl.envs import ExplorationType, set_exploration_type

from benchmarl_trust.algorithms.twins import group_policy
from benchmarl_trust.policy import GroupPolicy
from benchmarl_trust.policy.head import CategoricalHead, Head, NormalHead


class Entry(NamedTuple):
    """One input of a policy: ``kind`` is observation, mask or state; ``shape`` is without batch and agents."""

    name: str
    key: NestedKey
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class OneAgent(nn.Module):
    r"""One agent's deterministic policy over plain tensors, to be traced.

    .. math:: a = c + h · \tanh(μ), \qquad a = μ, \qquad a = \arg\max_k \{ z_k : k \text{ allowed} \}

    for squashed and plain normals and discrete actions: c is the centre of the environment's bounds and h half their
    distance.

    Args:
        body (TensorDictModuleBase): a one-agent twin, which writes the distribution's parameters. It is copied.
        head (Head): the distribution.
        entries (list of Entry): its inputs, in order.
        agent (int): the agent's place in the group, whose bounds are taken.
    """

    centre: Tensor
    half_width: Tensor

    def __init__(self, body: TensorDictModuleBase, head: Head, entries: list[Entry], agent: int):
        super().__init__()
        self.body = _plain(copy.deepcopy(body))
        for parameter in self.body.parameters():  # rows of the group's: with memory of its own no other row is saved
            parameter.data = parameter.data.clone()
        self.head, self.entries = head, entries
        if isinstance(head, NormalHead) and head.squashed:
            kwargs = head.module.distribution_kwargs
            low, high = (torch.as_tensor(kwargs.get(key, bound)) for key, bound in (("low", -1.0), ("high", 1.0)))
            low, high = (bound[agent] if bound.ndim > 1 else bound for bound in (low, high))
            self.register_buffer("centre", (high + low) / 2)
            self.register_buffer("half_width", (high - low) / 2)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The action and the next state, each [B, *], of the inputs [B, *]."""
        batch = inputs[0].shape[0]
        data = TensorDict({}, batch_size=[batch])
        for entry, x in zip(self.entries, inputs, strict=True):
            data[entry.key] = x.unsqueeze(1)  # the dimension of agents
        data["is_init"] = torch.zeros(batch, 1, dtype=torch.bool)
        data = self.body(data)
        states = [entry.key for entry in self.entries if entry.kind == "state"]
        return self._action(data), *(data[("next", *key)].squeeze(1) for key in states)

    def _action(self, data: TensorDict) -> Tensor:
        location, *mask = (data[key].squeeze(1) for key in self.head.keys)
        if isinstance(self.head, CategoricalHead):
            return (location.masked_fill(~mask[0], -torch.inf) if mask else location).argmax(-1)
        if not self.head.squashed:
            return location
        limit = 1 - torch.finfo(location.dtype).resolution  # as in TorchRL's TanhNormal
        return self.centre + self.half_width * location.tanh().clamp(-limit, limit)


class Step(nn.Module):
    """One step of BenchMARL's recurrent networks of one agent, without vmap, which cannot be traced.

    Args:
        cells (nn.ModuleList): one cell per layer.
    """

    def __init__(self, cells: nn.ModuleList):
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor, is_init: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Output [B, 1, H] and next states [B, 1, layers, H] of x [B, 1, F]; a GRU has one state, an LSTM h and c."""
        x, after = x.squeeze(1), []
        for cell, *state in zip(self.cells, *(state.squeeze(1).unbind(1) for state in states), strict=True):
            new = cell(x, state[0] if len(state) == 1 else tuple(state))
            after.append(new if isinstance(new, tuple) else (new,))
            x = after[-1][0]
        return x.unsqueeze(1), *(torch.stack(layers, 1).unsqueeze(1) for layers in zip(*after, strict=True))


def export(
    checkpoint: Path | str, out: Path | str, group: str | None = None, agent: int | None = None, format: str = "torch"
) -> list[Path]:
    """Write the policies of a checkpoint; the module's docstring says what the files hold.

    Args:
        checkpoint (Path or str): a ``.pt`` file in the folder ``checkpoints`` of a run. The run's ``config.pkl`` is
            unpickled, which executes what it says.
        out (Path or str): the folder for the files; it is made.
        group (str, optional): one group; None: all.
        agent (int, optional): one agent's place in its group; None: all.
        format: a key of :data:`FORMATS`.

    Returns: the files of the policies, ``<group>_<agent>`` or, shared, ``<group>``; a file's inputs and outputs are in
        ``<file>.json``.

    Raises:
        ValueError: for what is not there, and a policy that cannot be exported.
    """
    checkpoint = Path(checkpoint)
    _check_format(format)
    with _reloaded(checkpoint) as experiment:
        return export_policies(experiment, out, group, agent, format)


def export_policies(
    experiment: Experiment,
    out: Path | str,
    group: str | None = None,
    agent: int | None = None,
    format: str = "torch",
) -> list[Path]:
    """As :func:`export`, of an experiment's policies as they are now."""
    _check_format(format)
    groups = _groups(experiment, group, agent)
    suffix, write = FORMATS[format]
    out = Path(out)
    files = []
    for name in groups:
        for policy in _policies(experiment, name, agent):
            out.mkdir(parents=True, exist_ok=True)  # not before there is something to write
            file = out / f"{policy.name}{suffix}"
            write(policy.program, policy.description, file)
            description = {"file": file.name, "format": format, **policy.description}
            file.with_name(f"{file.name}.json").write_text(json.dumps(description, indent=2, default=str) + "\n")
            files.append(file)
    return files


class _Policy(NamedTuple):
    name: str
    program: ExportedProgram
    description: dict


def _policies(experiment: Experiment, group: str, agent: int | None) -> Iterator[_Policy]:
    """The policies of a group, traced and compared with the experiment's."""
    policy = cast(ProbabilisticTensorDictSequential, experiment.algorithm.get_policy_for_loss(group))
    view = _one_by_one(experiment, group, policy)
    entries = _entries(experiment, group, view)
    inputs = _example(experiment, entries, len(view.agents))
    expected = _expected(policy, entries, inputs)
    bounds = _bounds(experiment, group)
    one_body = all(own.body is view.agents[0].body for own in view.agents)
    together = view.shared and one_body and agent is None and all(own == bounds[0] for own in bounds)
    names = experiment.group_map[group]
    for i in [0] if together else range(len(names)) if agent is None else [agent]:
        module = OneAgent(view.agents[i].body, view.head, entries, i).eval()
        program = _traced(module, [x[:, i] for x in inputs], policy)
        for j in range(len(names)) if together else [i]:
            _compare(program, [x[:, j] for x in inputs], [y[:, j] for y in expected], policy, bounds[j])
        served = names if together else [names[i]]
        outputs = [x[:, i] for x in expected]
        description = _description(experiment, group, served, entries, outputs, bounds[i], view.head)
        yield _Policy(group if together else f"{group}_{i}", program, description)


def _one_by_one(experiment: Experiment, group: str, policy: ProbabilisticTensorDictSequential) -> GroupPolicy:
    """The group's policy by agent, each of which runs alone."""
    algorithm = experiment.algorithm
    algorithm = getattr(algorithm, "algorithms_map", {group: algorithm})[group]  # of an ensemble, the group's own
    for kind in (Gnn, Deepsets):
        if any(isinstance(module, kind) for module in policy.modules()):
            raise ValueError(
                f"The policy of {group} has a {kind.__name__}, whose networks see all agents together: none is one "
                "agent's. Train with mlp, gru, lstm, cnn or a sequence of them."
            )
    view = group_policy(algorithm, group, policy, experiment.continuous_actions)
    if not view.fast:
        raise ValueError(
            f"The policy of {group} ({_layers(policy)}) does not run for one agent alone: with n_agents=1 "
            "the model must have an agent's parameters and outputs, and no buffers or random numbers."
        )
    return view


def _entries(experiment: Experiment, group: str, view: GroupPolicy) -> list[Entry]:
    """The policy's inputs: observations, then the action mask, then recurrent states."""
    spec, seen = experiment.test_env.observation_spec, experiment.observation_spec.keys(True, True)
    masks = view.head.keys[1:] if isinstance(view.head, CategoricalHead) else []
    keys = [key for key in view.agents[0].body.in_keys if key != "is_init"]
    observations = [(key, "observation") for key in keys if key in seen]
    states = [(key, "state") for key in keys if key not in seen]
    leading = len(experiment.test_env.batch_size) + 1  # environments and agents
    return [
        Entry(_name(key, group), key, kind, tuple(spec[key].shape[leading:]), spec[key].dtype)
        for key, kind in [*observations, *((key, "mask") for key in masks), *states]
    ]


def _name(key: NestedKey, group: str) -> str:
    path = (key,) if isinstance(key, str) else key
    return "_".join(str(part).lstrip("_") for part in path if part != group)


def _example(experiment: Experiment, entries: list[Entry], n_agents: int, batch: int = 4) -> list[Tensor]:
    """Random inputs, [B, N, *]."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for entry in entries:
        x = torch.randn(batch, n_agents, *entry.shape, generator=generator)
        if entry.dtype == torch.bool:
            x = x > 0
            x[..., -1] = True  # some action is allowed
        elif not entry.dtype.is_floating_point:
            x = x.abs() * 50
        inputs.append(x.to(entry.dtype))
    return inputs


@torch.no_grad()
def _expected(
    policy: ProbabilisticTensorDictSequential, entries: list[Entry], inputs: list[Tensor]
) -> tuple[Tensor, ...]:
    """What the experiment's deterministic policy makes of the inputs: action and next states, [B, N, *]."""
    data = TensorDict({}, batch_size=inputs[0].shape[:1])
    for entry, x in zip(entries, inputs, strict=True):
        data[entry.key] = x
    data["is_init"] = torch.zeros(*data.batch_size, 1, dtype=torch.bool)
    device = next(policy.parameters()).device
    training = policy.training
    try:
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            data = policy.eval()(data.to(device)).cpu()
    finally:
        policy.train(training)
    states = [entry.key for entry in entries if entry.kind == "state"]
    return data[policy[-1].out_keys[0]], *(data[("next", *key)] for key in states)


def _traced(module: OneAgent, inputs: list[Tensor], policy: nn.Module) -> ExportedProgram:
    """The agent's policy as a graph of PyTorch's own operations, for batches of any size."""
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            program = torch.export.export(
                module.cpu(), tuple(inputs), dynamic_shapes={"inputs": tuple({0: batch} for _ in inputs)}
            )
    except Exception as error:
        raise ValueError(
            f"torch.export cannot trace the policy ({_layers(policy)}): {str(error).splitlines()[0]} A layer of "
            "your own must not decide by the values of tensors, nor fix the batch size."
        ) from error
    for node in program.graph.nodes:  # where each operation came from: names of modules, and paths on this machine
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    return program


@torch.no_grad()
def _compare(
    program: ExportedProgram, inputs: list[Tensor], expected: list[Tensor], policy: nn.Module, bounds: dict
) -> None:
    """Refuse what does not act as the experiment's policy does, to rounding in the range of its actions."""
    ends = [abs(end) for side in ("low", "high") for end in bounds.get(side, []) if end is not None]
    tolerance = 1e-5 * max([1, *ends])
    for got, wanted in zip(program.module()(*inputs), expected, strict=True):
        if not torch.allclose(got, wanted, rtol=1e-5, atol=tolerance):
            raise ValueError(
                f"The exported policy ({_layers(policy)}) acts otherwise than the experiment's: a layer has buffers or "
                "random numbers. Train without such a layer."
            )


def _layers(policy: nn.Module) -> str:
    """The models of a policy, and those of its layers that are of none of the hosts."""
    hosts = ("torch", "torchrl", "tensordict", "benchmarl")
    models = [type(module).__name__ for module in policy.modules() if isinstance(module, Model)]
    layers = [type(m).__name__ for m in policy.modules() if type(m).__module__.split(".")[0] not in hosts]
    return ", ".join(dict.fromkeys(models + layers))


def _plain(module: nn.Module) -> nn.Module:
    """Put one step of the cells in the place of BenchMARL's recurrent networks, with the very same parameters."""
    for name, child in module.named_children():
        if isinstance(child, MultiAgentGRU | MultiAgentLSTM):
            kind = "gru" if isinstance(child, MultiAgentGRU) else "lstm"
            network = getattr(child, f"_empty_{kind}")
            cast(TensorDictParams, child.params).to_module(network)
            setattr(module, name, Step(getattr(network, f"{kind}s")))
        else:
            _plain(child)
    return module


def _bounds(experiment: Experiment, group: str) -> list[dict]:
    """The bounds of each agent's action: low and high by dimension, or the number n of discrete ones."""
    spec = experiment.action_spec[group, "action"]
    n_agents = len(experiment.group_map[group])
    if not experiment.continuous_actions:
        return [{"n": int(cast(CategoricalBox, spec.space).n)}] * n_agents
    bounds = {side: getattr(spec.space, side).expand(spec.shape).tolist() for side in ("low", "high")}
    return [{side: [_finite(x) for x in bounds[side][i]] for side in bounds} for i in range(n_agents)]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON knows no infinity


def _description(
    experiment: Experiment,
    group: str,
    agents: list[str],
    entries: list[Entry],
    outputs: list[Tensor],
    bounds: dict,
    head: Head,
) -> dict:
    """What the JSON file says."""

    def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict:
        return {"name": name, "shape": ["batch", *shape], "dtype": str(dtype).removeprefix("torch.")}

    names = ["action"] + [f"next_{entry.name}" for entry in entries if entry.kind == "state"]
    tensors = [tensor(name, x.shape[1:], x.dtype) for name, x in zip(names, outputs, strict=True)]
    if not experiment.continuous_actions:
        tensors[0] |= bounds
    else:
        tensors[0] |= bounds | {"within_bounds": isinstance(head, NormalHead) and head.squashed}
    return {
        "group": group,
        "agents": agents,
        "inputs": [tensor(e.name, e.shape, e.dtype) | {"kind": e.kind} for e in entries],
        "outputs": tensors,
        "task": f"{experiment.environment_name}/{experiment.task_name}",
        "task_config": experiment.task.config,
        "algorithm": experiment.algorithm_name,
        "run": experiment.name,
        "frames": experiment.total_frames,
        "torch": torch.__version__,
    }


def _write_torch(program: ExportedProgram, description: dict, file: Path) -> None:
    torch.export.save(program, file)


def _write_onnx(program: ExportedProgram, description: dict, file: Path) -> None:
    names = [[entry["name"] for entry in description[side]] for side in ("inputs", "outputs")]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter's, on its own libraries
        written = torch.onnx.export(program, dynamo=True, input_names=names[0], output_names=names[1], verbose=False)
    cast("torch.onnx.ONNXProgram", written).save(file, external_data=False)


#: By name: how a file's name ends, and what writes it.
FORMATS: dict[str, tuple[str, Callable[[ExportedProgram, dict, Path], None]]] = {
    "torch": (".pt2", _write_torch),
    "onnx": (".onnx", _write_onnx),
}


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format}: it must be one of {', '.join(FORMATS)}.")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise ValueError(f"format=onnx needs {' and '.join(missing)}: pip install 'benchmarl_trust[export]'.")


def _groups(experiment: Experiment, group: str | None, agent: int | None) -> list[str]:
    """The groups to export, after a look at all that was asked for."""
    if not experiment.on_policy:
        raise ValueError(
            f"{experiment.algorithm_name} is off-policy: export takes checkpoints of on-policy algorithms (mappo, ippo "
            "and this package's)."
        )
    groups = experiment.group_map
    if group is not None and group not in groups:
        raise ValueError(f"group is {group}: the groups of this run are {', '.join(groups)}.")
    if agent is not None and group is None and len(groups) > 1:
        raise ValueError(f"agent is {agent}, of several groups: name one with group={' or '.join(groups)}.")
    chosen = list(groups) if group is None else [group]
    if agent is not None and not 0 <= agent < len(groups[chosen[0]]):
        raise ValueError(f"agent is {agent}: {chosen[0]} has the agents 0 to {len(groups[chosen[0]]) - 1}.")
    return chosen


@contextlib.contextmanager
def _reloaded(file: Path) -> Iterator[Experiment]:
    """The experiment of a checkpoint, on the CPU and with a temporary folder in the place of the run's."""
    if not file.is_file():
        raise ValueError(f"There is no checkpoint {file}.")
    config = file.resolve().parent.parent / "config.pkl"
    if not config.is_file():
        raise ValueError(f"There is no {config}: the checkpoint must lie in the folder checkpoints of its run.")
    patch = {"loggers": [], "create_json": False, "evaluation": False, "render": False, "parallel_collection": False}
    patch |= dict.fromkeys(("sampling_device", "train_device", "buffer_device", "restore_map_location"), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):  # the hosts print where results would be
            experiment = Experiment.reload_from_file(str(file.resolve()), patch | {"save_folder": folder})
        try:
            yield experiment
        finally:
            experiment.close()


def main(arguments: list[str] | None = None) -> None:
    """Export what the command line names, and say where the files are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a .pt file in the folder checkpoints of a run that you trust")
    parser.add_argument("--group", help="one group; default: all")
    parser.add_argument("--agent", type=int, help="one agent's place in its group; default: all")
    parser.add_argument("--format", default="torch", help=f"{' or '.join(FORMATS)}; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("outputs/export"), help="folder; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        files = export(**vars(options))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for file in files:
        print(f"{file}, {file.name}.json")


if __name__ == "__main__":
    main()
