"""The simulated device itself: what it refuses, what it counts, and that its numbers are the CPU's."""

import copy
import io

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_numbers_are_those_of_the_cpu(recorder):
    torch.manual_seed(0)
    on_cpu = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    on_gpu, x = copy.deepcopy(on_cpu).to("cuda"), torch.randn(5, 3)
    for network, inputs, fused in ((on_cpu, x, True), (on_gpu, x.to("cuda"), True)):
        optimizer = torch.optim.Adam(network.parameters(), fused=fused)
        network(inputs).square().mean().backward()
        optimizer.step()
    for p, q in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        assert q.is_cuda
        assert q.device == torch.device("cuda:0")
        assert torch.equal(p, q.cpu())


@pytest.mark.parametrize(
    "meet",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: gpu @ cpu,
        lambda gpu, cpu: torch.cat([gpu, cpu]),
        lambda gpu, cpu: torch.where(gpu > 0, gpu, cpu),
        lambda gpu, cpu: cpu.add_(gpu),
        lambda gpu, cpu: cpu[0].add_(gpu[0]),
        lambda gpu, cpu: cpu[gpu.long()],
        lambda gpu, cpu: gpu.index_put_((torch.tensor([0, 1, 2], device="cuda"),), cpu),
        lambda gpu, cpu: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda gpu, cpu: torch.randperm(3, generator=torch.Generator("cuda")),
        lambda gpu, cpu: setattr(torch.nn.Parameter(gpu), "data", cpu),
    ],
)
def test_what_cuda_refuses(meet, recorder):
    with pytest.raises((RuntimeError, AssertionError)):
        meet(torch.ones(3, device="cuda"), torch.ones(3))


def test_numpy_is_refused(recorder):
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(1, device="cuda").numpy()


WAITS = {
    "item": (1, lambda x: x[0].item()),
    "bool": (1, lambda x: bool(x[0])),
    "tolist": (1, lambda x: x.tolist()),
    "cpu": (1, lambda x: x.cpu()),
    "to, blocking": (1, lambda x: torch.ones(3).to("cuda")),
    "to, not blocking": (0, lambda x: torch.ones(3).to("cuda", non_blocking=True)),
    "nonzero": (1, lambda x: x.nonzero()),
    "mask as index": (1, lambda x: x[x > 0]),
    "list as index": (1, lambda x: x[[0, 2]]),
    "tensor as index": (0, lambda x: x[x.long()]),
    "number as index": (0, lambda x: x[1]),
    "CPU scalar added": (0, lambda x: x + torch.tensor(1.0)),
    "CPU scalar in where": (1, lambda x: torch.where(x > 0, x, torch.tensor(1.0))),
    "number in where": (0, lambda x: torch.where(x > 0, x, 1.0)),
    "full": (0, lambda x: torch.full((3,), 2.0, device="cuda")),
    "tensor of a list": (1, lambda x: torch.tensor([1.0, 2.0], device="cuda")),
    "synchronize": (1, lambda x: torch.cuda.synchronize()),
    "arithmetic": (0, lambda x: (x * 2).sum().exp().clamp(min=0)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits(name, recorder):
    times, do = WAITS[name]
    x = torch.ones(3, device="cuda")
    with recorder.recording():
        do(x)
    assert recorder.waits.total() == times, recorder.waits


def test_launches_are_counted_and_views_are_not(recorder):
    x = torch.ones(2, 3, device="cuda")
    with recorder.recording():
        (x.T[0].unsqueeze(0) + 1).reshape(-1)
    assert recorder.launches == {"aten::add": 1}


def test_waits_are_refused_where_they_are_forbidden(recorder):
    x = torch.ones(2, device="cuda")
    with pytest.warns(UserWarning, match="prototype"):
        torch.cuda.set_sync_debug_mode("error")
    try:
        x + 1
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
    finally:
        with pytest.warns(UserWarning, match="prototype"):
            torch.cuda.set_sync_debug_mode("default")
    assert x.sum().item() == 2


def test_files_keep_the_device_and_can_be_mapped(recorder):
    file = io.BytesIO()
    saved = {"weight": torch.nn.Linear(2, 2).to("cuda").weight, "gpu": torch.ones(2, device="cuda")}
    torch.save(saved | {"cpu": torch.ones(2)}, file)

    def devices(map_location):
        file.seek(0)
        loaded = torch.load(file, map_location=map_location)
        return loaded["weight"].device.type, loaded["gpu"].device.type, loaded["cpu"].device.type

    assert devices(None) == ("cuda", "cuda", "cpu")
    assert devices("cpu") == ("cpu", "cpu", "cpu")
    assert devices(torch.device("cuda")) == ("cuda", "cuda", "cuda")
    assert devices({"cuda:0": "cpu"}) == ("cpu", "cpu", "cpu")
    file.seek(0)
    weight = torch.load(file)["weight"]
    assert isinstance(weight, torch.nn.Parameter)
    assert weight.requires_grad
