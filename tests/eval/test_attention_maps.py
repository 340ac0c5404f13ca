"""Attention of the class token, against dense attention written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2.eval.visualize import cls_attention, draw_cls_attention
from dinov2.models.vision_transformer import DinoVisionTransformer

HEADS, WIDTH = 4, 32


def make_model(registers: int = 0, seed: int = 0) -> DinoVisionTransformer:
    """A small transformer whose weights are large enough for its attention to be far from uniform."""
    torch.manual_seed(seed)
    model = DinoVisionTransformer(
        img_size=(24, 16), patch_size=(8, 4), embed_dim=WIDTH, depth=3, num_heads=HEADS, num_register_tokens=registers
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def dense_attention(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """The class token's row of every head's whole attention matrix, one product at a time."""
    tokens = model.prepare_tokens_with_masks(images)
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = model.blocks[-1]
    normed = last.norm1(tokens)
    weight, bias = last.attn.qkv.weight, last.attn.qkv.bias
    width = WIDTH // HEADS
    result = torch.empty(len(images), HEADS, tokens.shape[1])
    for image in range(len(images)):
        for head in range(HEADS):
            rows = slice(head * width, (head + 1) * width)
            keys = slice(WIDTH + head * width, WIDTH + (head + 1) * width)
            queries = normed[image] @ weight[rows].T + bias[rows]  # [T, width]
            all_keys = normed[image] @ weight[keys].T + bias[keys]
            matrix = torch.exp(queries @ all_keys.T / width**0.5)
            result[image, head] = (matrix / matrix.sum(dim=1, keepdim=True))[0]
    return result


@pytest.mark.parametrize("registers", [0, 3])
def test_it_is_the_first_row_of_dense_attention(registers: int) -> None:
    model = make_model(registers)
    images = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))  # another size than the model's own
    with torch.no_grad():
        expected = dense_attention(model, images)
    found = cls_attention(model, images)
    assert found.shape == (2, HEADS, 1 + registers + 4 * 6)
    assert expected.std() > 0.02  # uniform attention would prove little
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, HEADS))


def test_values_weighed_by_it_are_what_the_attention_layer_gives() -> None:
    model, images = make_model(registers=2), torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(2))
    seen: list[Tensor] = []
    last = model.blocks[-1].attn
    handle = last.register_forward_hook(lambda module, arguments, output: seen.extend([arguments[0], output]))
    probabilities = cls_attention(model, images)
    handle.remove()
    with torch.no_grad():
        values = last.qkv(seen[0])[..., 2 * WIDTH :].unflatten(-1, (HEADS, -1))  # [B, T, heads, width]
        expected = last.proj(torch.einsum("bht,bthd->bhd", probabilities, values).flatten(1))
    torch.testing.assert_close(seen[1][:, 0], expected, atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = make_model().train()
    images = torch.randn(1, 3, 24, 16)
    model.eval()
    before = model(images)
    model.train()
    attention = cls_attention(model, images)
    assert model.training
    assert not attention.requires_grad
    assert not model.blocks[-1].attn._forward_pre_hooks
    model.eval()
    torch.testing.assert_close(model(images), before, atol=0, rtol=0)


def test_the_hook_goes_even_when_the_model_fails() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="patch"):
        cls_attention(model, torch.randn(1, 3, 25, 16))
    assert not model.blocks[-1].attn._forward_pre_hooks


def test_half_precision_gives_probabilities() -> None:
    attention = cls_attention(make_model().to(torch.bfloat16), torch.randn(2, 3, 24, 16, dtype=torch.bfloat16))
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, HEADS))


class Spotlight(DinoVisionTransformer):
    """Its class token looks at bright patches: the first head's query and keys read one channel, the brightness."""

    def __init__(self) -> None:
        super().__init__(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_register_tokens=2)
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)
        with torch.no_grad():
            self.patch_embed.proj.weight[0] = 1 / (3 * 64)  # channel 0: mean brightness
            self.cls_token[..., 1] = 1.0  # channel 1: the class token
            block = self.blocks[0]
            block.norm1.weight.fill_(1.0)
            block.attn.qkv.weight[0, 1] = 8.0  # query of head 1
            block.attn.qkv.weight[8, 0] = 8.0  # key of head 1
            self.norm.weight.fill_(1.0)


def test_maps_lie_on_the_photo_as_its_patches_do(tmp_path: Path) -> None:
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels[8:16, 40:48] = 255  # patch (1, 5) of 4 x 6
    model, photo = Spotlight(), Image.fromarray(pixels)
    draw_cls_attention(model, [photo], image_size=(32, 48), path=tmp_path / "new" / "a.png", titles=["plate $1"])
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255 * 4 - 2
    patches = cls_attention(model, tensor)[0, :, 3:].reshape(2, 4, 6)
    assert patches[0].argmax() == 1 * 6 + 5
    assert patches[0, 1, 5] > 0.9
    torch.testing.assert_close(patches[1], torch.full((4, 6), 1 / 27))  # the other head sees nothing
    with Image.open(tmp_path / "new" / "a.png") as picture:
        drawn = np.asarray(picture.convert("L"))
    assert drawn.shape[1] > 3.5 * drawn.shape[0] * 1.5 / 2  # photo, mean and two heads in a row


def test_pictures_repeat_exactly(tmp_path: Path) -> None:
    photos = [Image.new("RGB", (20, 30), (90, 10, 10)), Image.new("L", (64, 64), 200)]
    for name in ("a", "b"):
        draw_cls_attention(make_model(1), photos, image_size=(24, 16), path=tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_bad_input_is_named(tmp_path: Path) -> None:
    photo = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="one or more photos"):
        draw_cls_attention(make_model(), [], image_size=32, path=tmp_path / "a.png")
    with pytest.raises(ValueError, match="as many titles"):
        draw_cls_attention(make_model(), [photo], image_size=32, path=tmp_path / "a.png", titles=[])
    with pytest.raises(ValueError, match="multiple of the patch size 8x4"):
        draw_cls_attention(make_model(), [photo], image_size=30, path=tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
