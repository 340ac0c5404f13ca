"""What is trained of a backbone: the announced parameters move, nothing else does, and modes of blocks follow."""

import pytest
import torch

from dinov2.models.freezing import TRAINING_MODES, choose_trainable
from dinov2.models.vision_transformer import DinoVisionTransformer


def backbone():
    torch.manual_seed(0)
    return DinoVisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=24,
        depth=3,
        num_heads=2,
        drop_path_rate=0.5,
        drop_path_uniform=True,
        num_register_tokens=1,
        init_values=1.0,
    )


def images():
    return torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def moved_by_a_step(mode, **options):
    """Parameters that a step changes, and what was announced."""
    module = backbone()
    parts = choose_trainable(module, mode, **options)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if trained:
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(8):  # stochastic depth leaves blocks out, and a first step moves half of an addition only
            module.forward_features(images())["x_norm_patchtokens"].pow(3).sum().backward()
            optimizer.step()
    after = dict(module.named_parameters())
    return {name for name in before if not torch.equal(before[name], after[name])}, parts, module


def test_frozen():
    moved, parts, module = moved_by_a_step("frozen")
    assert not moved
    assert parts.num_trainable == 0
    assert parts.num_frozen == sum(parameter.numel() for parameter in module.parameters())
    assert parts.eval_modules == ("",)
    assert not any(part.training for part in module.modules())
    assert torch.equal(module(images()), module(images()))
    assert str(parts).startswith("backbone frozen: 0 of ")
    assert "(0.00%)" in str(parts)


def test_lora():
    moved, parts, module = moved_by_a_step("lora", lora_rank=2, lora_alpha=4.0, lora_targets=("qkv", "fc2"))
    layers = {f"blocks.{number}.{layer}" for number in range(3) for layer in ("attn.qkv", "mlp.fc2")}
    assert set(parts.lora_layers) == layers
    assert moved == {f"{layer}.lora_{matrix}" for layer in layers for matrix in "ab"}
    assert parts.num_trainable == 3 * 2 * ((24 + 72) + (96 + 24))
    assert parts.eval_modules == ()
    assert module.blocks[0].attn.qkv.scaling == 2
    assert "6 low-rank additions" in str(parts)


@pytest.mark.parametrize("last_blocks", [1, 2, 3])
def test_last_blocks(last_blocks):
    moved, parts, module = moved_by_a_step("last_blocks", last_blocks=last_blocks)
    first = 3 - last_blocks
    prefixes = ("norm.", *(f"blocks.{number}." for number in range(first, 3)))
    assert moved == {name for name, _ in module.named_parameters() if name.startswith(prefixes)}
    assert [block.training for block in module.blocks] == [number >= first for number in range(3)]
    assert not module.patch_embed.training
    assert module.norm.training
    trained = sum(p.numel() for name, p in module.named_parameters() if name.startswith(prefixes))
    assert parts.num_trainable == trained
    assert parts.num_trainable + parts.num_frozen == sum(p.numel() for p in module.parameters())


def test_full():
    moved, parts, module = moved_by_a_step("full")
    assert moved == {name for name, _ in module.named_parameters()} - {"mask_token"}
    assert parts.num_frozen == module.mask_token.numel() == 24
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_training_mode_comes_back_after_evaluation(mode):
    module = backbone()
    parts = choose_trainable(module, mode, last_blocks=1, lora_rank=2)
    expected = {name: part.training for name, part in module.named_modules()}
    for switch in (module.eval, module.train):
        switch()
        parts.set_train_mode(module)
        assert {name: part.training for name, part in module.named_modules()} == expected


def test_choosing_again_undoes_the_last_choice():
    module = backbone()
    choose_trainable(module, "frozen")
    parts = choose_trainable(module, "full")
    assert parts.num_trainable == sum(p.numel() for p in module.parameters()) - 24
    assert module.blocks[0].training


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("partial", {}, "unknown mode 'partial' .*allowed: frozen, lora, last_blocks, full"),
        ("last_blocks", {}, r"last_blocks must lie in 1\.\.3, the blocks of the backbone, got 0"),
        ("last_blocks", {"last_blocks": 4}, "got 4"),
        ("lora", {"lora_rank": 25}, r"rank must lie in 1\.\.24"),
        ("lora", {"lora_targets": ("q",)}, "no linear layer is named 'q'"),
    ],
)
def test_impossible_choices_change_nothing(mode, options, message):
    module = backbone()
    with pytest.raises(ValueError, match=message):
        choose_trainable(module, mode, **options)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert list(module.state_dict()) == list(backbone().state_dict())
