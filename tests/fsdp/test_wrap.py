"""Precision, sharding, recomputation and compilation from outside, in one process."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dinov2.checkpoint.sharding import full_state_dict
from dinov2.config.schema import MixedPrecisionOptions, ModulePrecisionOptions
from dinov2.fsdp import (
    checkpoint_activations,
    compile_units,
    release_gathered_parameters,
    resolve_dtype,
    shard,
    wrap,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def precision(strategy: str = "SHARD_GRAD_OP", **formats: str) -> ModulePrecisionOptions:
    return ModulePrecisionOptions(sharding_strategy=strategy, mixed_precision=MixedPrecisionOptions(**formats))


class Unit(nn.Module):
    """A residual layer that draws random numbers and counts how often it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + torch.nn.functional.dropout(self.fc(x), 0.5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Unit(), nn.BatchNorm1d(4), Unit())


@pytest.fixture
def one_process() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_formats_by_name(name: str, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, CPU) == resolve_dtype(name, CUDA) == dtype


def test_auto_is_bf16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert resolve_dtype("auto", CUDA) == dtype
    assert resolve_dtype("auto", CUDA, auto=torch.float64) == torch.float64


def test_fp16_on_a_processor_warns_once_and_means_fp32(caplog: pytest.LogCaptureFixture) -> None:
    wrap._warn_fp16_on_cpu.cache_clear()
    assert resolve_dtype("fp16", CUDA) == torch.float16
    assert not caplog.records
    assert [resolve_dtype("fp16", CPU) for _ in range(3)] == [torch.float32] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "fp16 was asked for" in caplog.text


def test_float32_in_one_process_stays_plain() -> None:
    plain = network()
    assert shard(plain, precision(), CPU, units=[[plain[0]], [plain[2]]]) is plain
    assert not isinstance(plain, FSDPModule)


def test_buffers_get_their_own_format() -> None:
    converted = shard(network(), precision(buffer_dtype="bf16"), CPU)
    assert converted[1].running_mean.dtype == torch.bfloat16
    assert converted[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "FULL_SHARD", "NO_SHARD"])
def test_bf16_computes_in_bf16_and_keeps_float32(strategy: str) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    reference = copy.deepcopy(plain).bfloat16()
    wrapped = shard(plain, precision(strategy, param_dtype="bf16"), CPU, units=[[plain[0]]])
    x = torch.randn(5, 4)
    output = wrapped(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, reference(x.bfloat16()))
    output.float().sum().backward()
    for parameter in wrapped.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.usefixtures("one_process")
def test_a_float32_network_casts_what_a_shorter_one_feeds_it() -> None:
    head = nn.Linear(4, 2)
    reference = copy.deepcopy(head)
    shard(head, precision(), CPU, fed_in_half=True)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert torch.equal(head(x), reference(x.float()))


@pytest.mark.usefixtures("one_process")
def test_names_stay_and_whole_tensors_come_back() -> None:
    plain = nn.Sequential(Unit(), nn.LayerNorm(4), Unit())
    expected = copy.deepcopy(plain.state_dict())
    wrapped = shard(plain, precision(param_dtype="bf16"), CPU, units=[[plain[0], plain[2]]])
    wrapped(torch.randn(4, 4))
    release_gathered_parameters(wrapped)
    state = full_state_dict(wrapped)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    state["0.fc.weight"].zero_()
    assert full_state_dict(wrapped)["0.fc.weight"].any(), "the result is a copy"


def test_recomputed_units_draw_the_same_numbers() -> None:
    plain, recomputed = network(), network()
    checkpoint_activations(recomputed, Unit)
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    gradients = []
    for model in (plain, recomputed):
        torch.manual_seed(3)
        model(torch.ones(6, 4)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)
    assert [model[0].runs for model in (plain, recomputed)] == [1, 2]


def test_recomputing_is_left_out_without_gradients() -> None:
    model = network()
    checkpoint_activations(model, Unit)
    with torch.no_grad():
        model(torch.ones(6, 4))
    assert model[0].runs == 1


def test_compiling_keeps_names_and_chooses_units(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    model = network()
    names = list(model.state_dict())
    compile_units(model, Unit)
    assert compiled == [model[0], model[2]]
    assert list(model.state_dict()) == names
