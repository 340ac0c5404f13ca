"""Attention against its definition, packed against separate batches, and the optional xFormers backend."""

import importlib.util
import logging
import math

import pytest
import torch
from torch import Tensor

from dinov2.layers import attention as attention_backend
from dinov2.layers.attention import Attention, XFormersBackend, make_attention_backend, pack_groups, split_groups

needs_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xFormers is not installed")


def slow_attention(attention: Attention, x: Tensor) -> Tensor:
    """Softmax attention written out head by head."""
    outputs = []
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    for q, k, v in zip(*(part.chunk(attention.num_heads, dim=-1) for part in (query, key, value)), strict=True):
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        outputs.append(weights @ v)
    return attention.proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_its_definition(bias: bool) -> None:
    attention = Attention(12, 3, qkv_bias=bias, proj_bias=bias).double()
    assert (attention.qkv.bias is not None, attention.proj.bias is not None) == (bias, bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x), slow_attention(attention, x))


@pytest.mark.parametrize("longest", [0, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_processor_equals_float64_whichever_way_it_is_computed(
    longest: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backend, "_LONGEST_WRITTEN_OUT", longest)
    qkv = torch.randn(2, 9, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    half, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    backend = make_attention_backend("sdpa")
    outputs = [backend.attend(x) for x in (half, exact)]
    for output in outputs:
        output.square().sum().backward()
    tolerance = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(outputs[0].double(), outputs[1], **tolerance)
    assert half.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(half.grad.double(), exact.grad, **tolerance)


def test_packed_tokens_attend_within_their_image_only() -> None:
    attention = Attention(12, 3).double()
    groups = [torch.randn(b, n, 12, dtype=torch.float64) for b, n in ((2, 5), (1, 7), (3, 2))]
    rows, shapes = pack_groups(groups)
    for group, output in zip(groups, split_groups(attention(rows, shapes), shapes), strict=True):
        torch.testing.assert_close(output, attention(group))


def test_packing_and_splitting_are_inverse_and_allow_an_empty_group() -> None:
    groups = [torch.randn(2, 3, 4), torch.randn(0, 5, 4), torch.randn(1, 1, 4)]
    rows, shapes = pack_groups(groups)
    assert rows.shape == (7, 4)
    assert shapes == ((2, 3), (0, 5), (1, 1))
    for group, result in zip(groups, split_groups(rows, shapes), strict=True):
        assert torch.equal(group, result)
    assert Attention(4, 2)(rows, shapes).shape == rows.shape
    assert Attention(4, 2)(groups[1]).shape == (0, 5, 4)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="width 10 does not split into 3 heads"):
        Attention(10, 3)
    with pytest.raises(ValueError, match=r"unknown attention_backend 'flash'; allowed: sdpa, xformers"):
        Attention(12, 3, backend="flash")


def test_absent_xformers_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dinov2\[xformers\]'"):
        make_attention_backend("xformers")


@needs_xformers
def test_xformers_away_from_cuda_is_an_error_and_no_fallback() -> None:
    attention = Attention(12, 3, backend="xformers")
    with pytest.raises(ValueError, match=r"CUDA devices only.*'cpu'"):
        attention(torch.randn(2, 5, 12))
    with pytest.raises(ValueError, match=r"CUDA devices only.*'cpu'"):
        attention(torch.randn(5, 12), ((1, 5),))


@needs_xformers
def test_xformers_backend_equals_sdpa_with_its_kernel_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """xFormers has CUDA kernels only; its documented formula and its real masks stand in for the kernel here."""
    logging.getLogger("xformers").setLevel(logging.ERROR)

    def dense_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: object = None) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if attn_bias is not None:
            scores = scores + attn_bias.materialize(tuple(scores.shape[-2:]), dtype=scores.dtype)
        return (scores.softmax(-1) @ value).transpose(1, 2)

    monkeypatch.setattr(attention_backend, "_check_cuda", lambda qkv: None)
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", dense_attention)
    rows, shapes = pack_groups([torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(3, 4, 12, dtype=torch.float64)])
    sdpa = Attention(12, 3).double()
    xformers = Attention(12, 3, backend="xformers").double()
    xformers.load_state_dict(sdpa.state_dict())
    torch.testing.assert_close(xformers(rows, shapes), sdpa(rows, shapes))
    torch.testing.assert_close(xformers(rows.view(2, 11, 12)), sdpa(rows.view(2, 11, 12)))


@needs_xformers
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_kernel_equals_sdpa() -> None:
    rows, shapes = pack_groups([torch.randn(2, 50, 64, device="cuda"), torch.randn(3, 10, 64, device="cuda")])
    sdpa = Attention(64, 2).cuda().bfloat16()
    xformers = Attention(64, 2, backend="xformers").cuda().bfloat16()
    xformers.load_state_dict(sdpa.state_dict())
    rows = rows.bfloat16()
    torch.testing.assert_close(xformers(rows, shapes), sdpa(rows, shapes), atol=2e-2, rtol=2e-2)
    assert isinstance(xformers.backend, XFormersBackend)
