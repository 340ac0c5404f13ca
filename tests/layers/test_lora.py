"""Low-rank additions: nothing at the start, gradients in them alone, and nothing lost when merged."""

import copy

import pytest
import torch
from torch import nn

from dinov2.layers.lora import LoRALinear, apply_lora, lora_parameters, merge_lora
from dinov2.models.vision_transformer import DinoVisionTransformer

OPTIONS = {"rank": 3, "alpha": 6.0}


def backbone(**options):
    torch.manual_seed(0)
    return DinoVisionTransformer(
        **{"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2} | options
    )


def images():
    return torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def train_a_little(module):
    """Gives every addition a value."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(module):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_written_formula(bias):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 7, bias=bias), rank=2, alpha=3.0)
    train_a_little(layer)
    x = torch.randn(4, 6, 5)
    expected = torch.einsum("oi,bti->bto", layer.weight + 1.5 * layer.lora_b @ layer.lora_a, x)
    expected = expected + layer.bias if bias else expected
    torch.testing.assert_close(layer(x), expected)
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {"lora_a", "lora_b"}
    assert "rank=2, scaling=1.5" in repr(layer)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "proj_bias": False}, {"ffn_layer": "swiglu"}])
def test_training_starts_at_the_plain_network(options):
    plain = backbone(**options)
    added = copy.deepcopy(plain)
    targets = ("qkv", "proj", "w12", "w3") if options.get("ffn_layer") else ("qkv", "proj", "fc1", "fc2")
    names = apply_lora(added, targets, **OPTIONS)
    assert len(names) == 2 * 4
    assert "blocks.1.attn.qkv" in names
    assert torch.equal(added(images()), plain(images()))
    train_a_little(added)
    assert not torch.allclose(added(images()), plain(images()), atol=1e-3)


def test_gradients_flow_into_the_additions_only():
    module = backbone()
    module.requires_grad_(False)
    apply_lora(module, **OPTIONS)
    train_a_little(module)
    trained = set(map(id, lora_parameters(module)))
    assert len(trained) == 2 * 2 * 2
    module(images()).pow(3).sum().backward()
    for name, parameter in module.named_parameters():
        assert (id(parameter) in trained) == ("lora_" in name) == parameter.requires_grad
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 0.05)]
)
def test_merging_changes_nothing_but_rounding(dtype, tolerance):
    module = backbone().to(dtype)
    plain_names = list(module.state_dict())
    names = apply_lora(module, ("qkv", "proj", "fc1"), **OPTIONS)
    train_a_little(module)
    before = module(images().to(dtype))
    module.blocks[0].eval()
    assert merge_lora(module) == names
    assert list(module.state_dict()) == plain_names
    assert not list(lora_parameters(module))
    assert type(module.blocks[0].attn.qkv) is nn.Linear
    assert (module.blocks[0].attn.qkv.training, module.blocks[1].attn.qkv.training) == (False, True)
    assert all(parameter.dtype == dtype for parameter in module.parameters())
    torch.testing.assert_close(module(images().to(dtype)), before, atol=tolerance, rtol=tolerance)
    assert merge_lora(module) == []


def test_names_of_the_plain_network_stay():
    plain, added = backbone(), backbone()
    apply_lora(added, **OPTIONS)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1)
    extra = added.state_dict().keys() - plain.state_dict().keys()
    assert extra == {f"blocks.{n}.attn.{layer}.lora_{m}" for n in range(2) for layer in ("qkv", "proj") for m in "ab"}
    missing, unexpected = added.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == extra
    assert unexpected == []
    assert torch.equal(added(images()), plain(images()))
    again = backbone()
    apply_lora(again, **OPTIONS)
    train_a_little(added)
    again.load_state_dict(added.state_dict())
    assert torch.equal(again(images()), added(images()))


def test_dropout_touches_the_addition_in_training_only():
    torch.manual_seed(0)
    base = nn.Linear(50, 60)
    plain = copy.deepcopy(base)
    layer = LoRALinear(base, rank=4, alpha=4.0, dropout=0.5)
    x = torch.randn(20, 50)
    assert torch.equal(layer(x), plain(x)), "the addition is zero"
    train_a_little(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    addition = layer(x) - plain(x)
    layer.train()
    mean = torch.stack([layer(x) - plain(x) for _ in range(1500)]).mean(dim=0)
    torch.testing.assert_close(mean, addition, atol=0.2, rtol=0)
    assert not LoRALinear(nn.Linear(5, 7).eval(), **OPTIONS).dropout.training, "as the layer it is made from"


def test_unknown_targets_change_nothing():
    module = backbone()
    with pytest.raises(
        ValueError, match=r"no linear layer is named 'key', 'query'; DinoVisionTransformer has fc1, fc2, proj, qkv"
    ):
        apply_lora(module, ("qkv", "query", "key"), **OPTIONS)
    with pytest.raises(ValueError, match="no linear layer is named by no target at all"):
        apply_lora(module, (), **OPTIONS)
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.24 for a layer from 24 to 72 channels, got 25"):
        apply_lora(module, rank=25, alpha=1.0)
    assert not list(lora_parameters(module))
    assert all(parameter.requires_grad for parameter in module.parameters())
    mixed = nn.ModuleDict({name: nn.ModuleDict({"proj": nn.Linear(9, width)}) for name, width in (("a", 9), ("b", 2))})
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.2"):
        apply_lora(mixed, ("proj",), **OPTIONS)
    assert all(parameter.requires_grad for parameter in mixed.parameters())
    apply_lora(module, ("qkv",), **OPTIONS)
    with pytest.raises(ValueError, match="has a low-rank addition already"):
        apply_lora(module, ("proj", "qkv"), **OPTIONS)
    assert len(list(lora_parameters(module))) == 4


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 6}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_bad_values(options):
    with pytest.raises(ValueError, match="must"):
        LoRALinear(nn.Linear(5, 7), **{"rank": 1, "alpha": 1.0, **options})
