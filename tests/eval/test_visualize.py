"""Pictures of features: what is computed, what is drawn, and the command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_stand_ins import TINY, MemoryDataset, dataset_string, make_features, make_parts, random_set
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageSelection, spread_positions, whole_parts
from dinov2.data.transforms import to_pillow
from dinov2.eval.feature_map import draw_part_map, map_points, mean_features_of_parts
from dinov2.eval.features import Features
from dinov2.eval.visualize import (
    FILES,
    cls_attention,
    draw_cls_attention,
    draw_neighbours,
    draw_patch_pca,
    find_neighbours,
    main,
    patch_pca_colours,
    picture_paths,
    sample_images,
)
from dinov2.logging.plots import RIGHT, WRONG, save_png
from dinov2.models.vision_transformer import DinoVisionTransformer

HEADS, WIDTH = 4, 32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def pictures(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


# Choosing images.


def test_a_selection_is_the_dataset_at_its_positions() -> None:
    dataset = random_set(12, 3, seed=0, photos_per_part=2)
    chosen = ImageSelection(dataset, [7, 0])
    assert chosen.classes == dataset.classes
    assert chosen.get_targets().tolist() == [dataset.get_target(7), dataset.get_target(0)]
    assert chosen.get_group_ids() == ["set-3", "set-0"]
    assert chosen.get_image_path(0) == dataset.get_image_path(7)
    assert (chosen[0][0] == dataset[7][0]).all()


def test_parts_are_taken_whole_and_from_everywhere() -> None:
    dataset = random_set(400, 2, seed=0, photos_per_part=4)
    groups = dataset.get_group_ids()
    chosen = whole_parts(dataset, 43)
    assert len(chosen) == 40
    assert chosen == sorted(set(chosen))
    numbers = sorted({int(groups[position].removeprefix("set-")) for position in chosen})
    assert len(numbers) == 10
    gaps = [after - before for before, after in zip([-1, *numbers], [*numbers, 100], strict=True)]
    assert max(gaps) < 25  # ten of a hundred parts; no quarter of the set is left out
    assert whole_parts(dataset, 400) == list(range(400))
    assert len(whole_parts(dataset, 1)) == 4  # the first part is taken whatever its size


def test_images_are_taken_evenly_from_every_class() -> None:
    def sample(labels: list[int | None], count: int, classes: tuple[str, ...] = ("ok", "defect")) -> Any:
        return sample_images(
            MemoryDataset([(index, 0, 0) for index in range(len(labels))], labels, None, classes), count
        )

    images, names = sample([0] * 10 + [1] * 3, 5)
    assert names == ["ok\n0.png", "ok\n4.png", "ok\n9.png", "defect\n10.png", "defect\n12.png"]
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 4, 9, 10, 12]
    assert sample([None, None], 8, ())[1] == ["0.png", "1.png"]
    assert sample([1, 0], 1)[1] == ["ok\n1.png"]
    with pytest.raises(ValueError, match="cannot choose 3 images from a dataset of 0"):
        sample([], 3)
    with pytest.raises(ValueError, match="cannot choose 0 images from a dataset of 4"):
        spread_positions(random_set(4, 2, seed=0), 0)
    with pytest.raises(ValueError, match="cannot choose 3 images from a dataset of 0"):
        whole_parts(MemoryDataset([], []), 3)


# Principal components of patch features.


class BrightnessModel(nn.Module):
    """A stand-in backbone: a patch's features are one of two random directions, by whether the patch is bright."""

    def __init__(self, patch_size: tuple[int, int] = (8, 4), width: int = 16) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.directions = nn.Parameter(torch.randn(2, width, generator=seeded(0)), requires_grad=False)
        self.calls: list[tuple[bool, tuple[int, ...]]] = []

    def forward(self, x: Tensor, is_training: bool = False) -> dict[str, Any]:
        assert is_training
        self.calls.append((self.training, tuple(x.shape)))
        bright = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), self.patch_size).flatten(1) > 0  # [B, N]
        tokens = self.directions[bright.long()]
        return {"x_norm_patchtokens": tokens + 0.05 * torch.randn(tokens.shape, generator=seeded(1))}


def half_bright_image(height: int = 48, width: int = 60) -> Image.Image:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


def test_two_regions_get_two_colours_per_model() -> None:
    model = BrightnessModel().train()
    models = {"random": model, "pretrained": BrightnessModel((16, 16), width=8).to(torch.bfloat16)}
    images = [half_bright_image(), half_bright_image(20, 20).convert("RGBA")]
    figure = draw_patch_pca(models, images, image_size=(32, 48), titles=["plate", "$x"])
    assert model.calls == [(False, (2, 3, 32, 48))]
    assert model.training  # the model gets its mode back
    assert [title.split("\n")[0] for title in titles(figure)] == ["image", "random", "pretrained", "", "", ""]
    assert titles(figure)[1].endswith("% of variance")
    drawn = pictures(figure)
    assert [picture.shape[:2] for picture in drawn[:3]] == [(32, 48), (288, 432), (288, 432)], (
        "over the image, enlarged"
    )
    left, right = (half[..., 0] - half[..., 1].astype(float) for half in np.split(drawn[1], 2, axis=1))
    assert abs(left.mean() - right.mean()) > 0.8 * 0.6 * 255, "the first component saturates at both ends"
    assert min(figure.get_size_inches()) * figure.dpi > 600
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["plate", "$x"]
    with pytest.raises(ValueError, match="image_size 30x32 must be a multiple of the patch size 8x4"):
        draw_patch_pca({"a": model}, images, image_size=(30, 32))


def test_components_are_those_of_scikit_learn_with_a_fixed_sign() -> None:
    tokens = torch.randn(2, 6, 6, 12, generator=seeded(3)) * torch.arange(1, 13)
    rows = tokens.flatten(0, 2).double().numpy()
    reference = PCA(n_components=3, svd_solver="full").fit(rows)
    components = reference.components_
    signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(axis=1, keepdims=True), axis=1))
    expected = reference.transform(rows) * signs.T
    points, explained = map_points(tokens.flatten(0, 2))
    np.testing.assert_allclose(points, expected[:, :2], atol=1e-9)
    assert explained == pytest.approx(reference.explained_variance_ratio_[:2].sum())
    colours, explained = patch_pca_colours(tokens)
    assert explained == pytest.approx(reference.explained_variance_ratio_.sum())
    for component in range(3):
        drawn = colours[..., component].flatten().double().numpy()
        kept = (drawn > 0) & (drawn < 1)
        slope, offset = np.polyfit(expected[kept, component], drawn[kept], 1)
        assert slope > 0
        np.testing.assert_allclose(slope * expected[kept, component] + offset, drawn[kept], atol=1e-5)
    torch.testing.assert_close(patch_pca_colours(40 * tokens + 3)[0], colours, atol=1e-4, rtol=0)


def test_outliers_do_not_take_the_colours_and_no_variation_is_grey() -> None:
    tokens = torch.randn(1, 20, 20, 6, generator=seeded(6))
    tokens[0, 0, 0] = 1e3
    colours, _ = patch_pca_colours(tokens)
    assert colours[0, 1:, 1:, 0].std() > 0.15  # less than 0.01 if the outlier had the whole range for itself
    colours, explained = patch_pca_colours(torch.ones(1, 4, 4, 8))
    assert (colours == 0.5).all()
    assert explained == 0.0
    with pytest.raises(ValueError, match="NaN or infinite"):
        patch_pca_colours(torch.full((1, 2, 2, 4), float("nan")))


# Attention of the class token, against dense attention written out.


def make_model(registers: int = 0) -> DinoVisionTransformer:
    """A small transformer whose weights are large enough for its attention to be far from uniform."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=(24, 16), patch_size=(8, 4), embed_dim=WIDTH, depth=3, num_heads=HEADS, num_register_tokens=registers
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def dense_attention(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """The class token's row of every head's whole attention matrix, written out."""
    tokens = model.prepare_tokens_with_masks(images)
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = model.blocks[-1]
    weights, biases = (part.chunk(3 * HEADS) for part in (last.attn.qkv.weight, last.attn.qkv.bias))
    projected = [last.norm1(tokens) @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]
    pairs = zip(projected[:HEADS], projected[HEADS : 2 * HEADS], strict=True)
    matrices = [(queries @ keys.mT / (WIDTH // HEADS) ** 0.5).exp() for queries, keys in pairs]  # [B, T, T]
    return torch.stack([(matrix / matrix.sum(dim=2, keepdim=True))[:, 0] for matrix in matrices], dim=1)


@pytest.mark.parametrize("registers", [0, 3])
def test_attention_is_the_first_row_of_dense_attention(registers: int) -> None:
    model = make_model(registers)
    images = torch.randn(2, 3, 32, 24, generator=seeded(1))  # another size than the model's own
    with torch.no_grad():
        expected = dense_attention(model, images)
    found = cls_attention(model, images)
    assert found.shape == (2, HEADS, 1 + registers + 4 * 6)
    assert expected.std() > 0.02  # uniform attention would prove little
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, HEADS))


def test_the_model_is_left_as_it_was() -> None:
    model, images = make_model(), torch.randn(1, 3, 24, 16)
    before = model.eval()(images)
    attention = cls_attention(model.train(), images)
    assert model.training
    assert not attention.requires_grad
    with pytest.raises(ValueError, match="patch"):  # the hook goes even when the model fails
        cls_attention(model, torch.randn(1, 3, 25, 16))
    assert not model.blocks[-1].attn._forward_pre_hooks
    torch.testing.assert_close(model.eval()(images), before, atol=0, rtol=0)
    half = cls_attention(model.to(torch.bfloat16), images.to(torch.bfloat16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(dim=-1), torch.ones(1, HEADS))


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


def test_maps_lie_on_the_image_as_its_patches_do() -> None:
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels[8:16, 40:48] = 255  # patch (1, 5) of 4 x 6
    figure = draw_cls_attention(Spotlight(), [Image.fromarray(pixels)], image_size=(32, 48), titles=["plate $1"])
    assert titles(figure) == [
        "image", "mean of heads\n94 % on patches", "head 1\n100 % on patches", "head 2\n89 % on patches",
    ]  # fmt: skip
    image, mean, first, second = pictures(figure)
    np.testing.assert_array_equal(image, pixels)
    assert first.shape == (288, 432, 3), "over the image, enlarged"
    grey = image[..., :1].repeat(9, axis=0).repeat(9, axis=1).astype(float)
    # What lies over the image, from 0 to 1: red rises with it.
    over = [(drawn[36::72, 36::72, 0] - 0.4 * grey[36::72, 36::72, 0]) / (0.6 * 255) for drawn in (first, mean, second)]
    assert np.unravel_index(over[0].argmax(), (4, 6)) == np.unravel_index(over[1].argmax(), (4, 6)) == (1, 5)
    assert np.sort(over[0].flatten())[-2] < 0.1 * over[0].max()
    assert over[2].min() > 0.9, "the other head looks everywhere"
    with pytest.raises(ValueError, match="multiple of the patch size 8x8"):
        draw_cls_attention(Spotlight(), [Image.fromarray(pixels)], image_size=30)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_network_of_other_channels_sees_them(channels: int) -> None:
    model = DinoVisionTransformer(img_size=32, patch_size=8, in_chans=channels, embed_dim=8, depth=1, num_heads=2)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, channels), dtype=np.uint8)
    for figure in (
        draw_patch_pca({"own": model}, [to_pillow(pixels)], image_size=32),
        draw_cls_attention(model, [to_pillow(pixels)], image_size=32),
    ):
        assert pictures(figure)[0].shape == (32, 32, 3)


# Neighbours.


def features_of(dataset: MemoryDataset, embeddings: Tensor) -> Features:
    return Features(
        nn.functional.normalize(embeddings, dim=1),
        torch.from_numpy(dataset.get_targets()),
        dataset.get_group_ids(),
        [str(dataset.get_image_path(index)) for index in range(len(dataset))],
    )


def angles(*degrees: float) -> Tensor:
    radians = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def bank_set() -> MemoryDataset:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    return MemoryDataset(colours, [0, 0, 1, 1, None], ["a", "a", "b", "c", "d"], ("good", "bad"), name="bank")


@pytest.mark.parametrize("other_parts", [True, False])
def test_neighbours_are_what_a_full_sort_gives(other_parts: bool) -> None:
    groups = [f"part {index // 3}" for index in range(30)]
    dataset = MemoryDataset([(0, 0, 0)] * 30, [0] * 30, groups, ("good",))
    bank = features_of(dataset, torch.randn(30, 8, generator=seeded(0)))
    found = find_neighbours(bank, bank, 5, other_parts=other_parts)
    for query in range(30):
        allowed = [
            index for index in range(30) if index != query and (not other_parts or groups[index] != groups[query])
        ]
        similarity = bank.embeddings @ bank.embeddings[query]
        expected = sorted(allowed, key=lambda index: (-float(similarity[index]), index))[:5]
        assert [place for place, _ in found[query]] == expected
        assert found[query][0][1] == pytest.approx(float(similarity[expected[0]]), abs=1e-6)


def test_frames_say_which_neighbours_are_right() -> None:
    query = MemoryDataset([(90, 90, 90), (9, 9, 9)], [1, None], ["x$", "y" * 30], ("good", "bad"), name="queries")
    bank = bank_set()
    rows = features_of(query, angles(0, 0)), features_of(bank, angles(10, 20, 30, 40, 50))
    figure = draw_neighbours(*rows, query, bank, num_neighbours=6)
    places = [axes.get_subplotspec().num1 for axes in figure.axes]
    assert places == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]  # the bank is smaller than asked
    assert titles(figure)[:2] == ["query\nbad\npart x$", "0.985\ngood\npart a"]
    assert titles(figure)[6] == "query\nno label\n…" + "y" * 23
    assert [tuple(picture[0, 0]) for picture in pictures(figure)[1:6]] == bank.colours
    spines = [axes.spines["top"] for axes in figure.axes]
    frames = [to_hex(spine.get_edgecolor()) if spine.get_visible() else None for spine in spines]
    assert frames == [None, WRONG, WRONG, RIGHT, RIGHT, None, *[None] * 6]
    only = MemoryDataset([(0, 0, 0)], [0], ["a"])
    alone = features_of(only, angles(0))
    assert len(draw_neighbours(alone, alone, only, only).axes) == 1  # no neighbour at all
    other = MemoryDataset([(0, 0, 0)] * 5, [0] * 5, None, ("ok", "bad"))
    with pytest.raises(ValueError, match=r"classes differ: queries \['ok', 'bad'\], bank \['good', 'bad'\]"):
        draw_neighbours(rows[1], rows[1], other, bank)
    with pytest.raises(ValueError, match="cannot draw 0 neighbours of 5 queries"):
        draw_neighbours(rows[1], rows[1], bank, bank, num_neighbours=0)


# The map of features.


def clusters() -> Features:
    """Two distant clouds; four images per part, every other part in the second cloud."""
    parts = [row // 4 for row in range(40)]
    return make_features([part % 2 for part in parts], [f"part {part}" for part in parts], gap=10.0)


def test_tsne_keeps_neighbourhoods_and_repeats_exactly() -> None:
    features = clusters()
    points, explained = map_points(features.embeddings, "tsne", seed=3)
    assert explained is None
    assert points.shape == (40, 2)
    np.testing.assert_array_equal(points, map_points(features.embeddings, "tsne", seed=3)[0])
    assert trustworthiness(features.embeddings.numpy(), points, n_neighbors=5) > 0.85
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(40, np.inf))
    assert (features.labels.numpy()[distances.argmin(axis=1)] == features.labels.numpy()).all()
    with pytest.raises(ValueError, match="t-SNE needs 4 or more points, found 3"):
        map_points(torch.ones(3, 4), "tsne")


def test_few_points_and_narrow_features_have_a_place() -> None:
    assert map_points(torch.ones(1, 4))[0].tolist() == [[0, 0]]
    assert map_points(torch.ones(3, 4)) == (pytest.approx(np.zeros((3, 2))), 0.0)
    points, explained = map_points(torch.tensor([[1.0], [3.0]]))
    assert points.tolist() == [[-1, 0], [1, 0]]
    assert explained == 1.0


def test_a_part_is_the_mean_of_its_images_and_bad_where_one_is() -> None:
    embeddings = torch.tensor([[0.0, 2.0], [4.0, 4.0], [2.0, 0.0], [9.0, 9.0]])
    parts = mean_features_of_parts(Features(embeddings, torch.tensor([0, -1, 1, -1]), list("baba"), list("wxyz")))
    assert parts.group_ids == ["a", "b"]
    torch.testing.assert_close(parts.embeddings, torch.tensor([[6.5, 6.5], [1.0, 1.0]]))
    assert parts.labels.tolist() == [-1, 1]


def test_lines_join_the_images_of_a_part_in_its_middle(tmp_path: Path) -> None:
    features = Features(torch.tensor([[0.0, 0], [9, 0], [2, 0]]), torch.tensor([0, 1, -1]), list("aba"), list("xyz"))
    figures = [draw_part_map({"one $": features}, ("good $x", "_bad")) for _ in range(2)]
    (axes,) = figures[0].axes
    points, _ = map_points(features.embeddings)
    middle = (points[0] + points[2]) / 2
    lines = axes.collections[0].get_segments()
    np.testing.assert_allclose(lines, [[points[0], middle], [points[2], middle]])
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["no label (1)", "good $x (1)", " _bad (1)"]
    assert axes.get_title() == "one $\nPCA, 100 % of variance"
    first, again = (save_png(figure, tmp_path / name) for figure, name in zip(figures, "ab", strict=True))
    assert first.read_bytes() == again.read_bytes()


def test_many_classes_have_no_legend_and_parts_no_lines() -> None:
    rows = clusters()
    many = Features(rows.embeddings, torch.arange(40) - 1, rows.group_ids, rows.paths)
    figure = draw_part_map({"random": many, "pretrained": rows}, ())
    assert figure.axes[0].get_xlabel() == "40 classes; colours repeat"
    assert not figure.legends
    figure = draw_part_map({"a": rows}, ("good", "bad"), level="part", method="tsne")
    assert [len(points.get_offsets()) for points in figure.axes[0].collections] == [5, 5]
    assert figure.get_suptitle() == "map of features: 10 parts"


# The command.


def test_all_pictures_of_a_set_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_parts(tmp_path / "parts")
    train, val = (dataset_string(root, split) for split in ("train", "val"))
    words = ["--dataset", val, "--num-images", "2", "--num-workers", "0", "--num-neighbours", "3"]
    assert main([*TINY, *words, "--output", str(tmp_path / "all")]) == 0
    printed = capsys.readouterr().out.split("\n")
    assert printed == [*(str(tmp_path / "all" / name) for name in FILES.values()), ""]
    for name in FILES.values():
        with Image.open(tmp_path / "all" / name) as picture:
            assert min(picture.size) > 200
    more = ["--kinds", "neighbours", "map", "--bank-dataset", train, "--map-level", "part", "--map-method", "tsne"]
    capsys.readouterr()
    few = ["--no-other-parts", "--max-images", "9"]
    assert main([*TINY, *words, *more, *few, "--output", str(tmp_path / "some")]) == 0
    assert "of evenly chosen parts; --max-images allows more" in "".join(capsys.readouterr())
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["neighbours.png", "part_map.png"]
    bank = (tmp_path / "some" / "neighbours.png").read_bytes()
    assert bank != (tmp_path / "all" / "neighbours.png").read_bytes()


def test_one_file_holds_the_components_or_what_is_asked_for(tmp_path: Path) -> None:
    val = dataset_string(make_parts(tmp_path / "parts"), "val")
    words = [*TINY, "--dataset", val, "--num-images", "2", "--image-size", "42"]
    assert main([*words, "--output", str(tmp_path / "plots" / "patch_pca.png")]) == 0
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["patch_pca.png"]
    with pytest.raises(ValueError, match=r"a\.png can hold one picture, not pca and map: give a folder"):
        main([*words, "--kinds", "pca", "map", "--output", "a.png"])
    with pytest.raises(ValueError, match=r"evaluation\.image_size=30 is not divisible by student\.patch_size=14"):
        main([*TINY, "--dataset", val, "--image-size", "30", "--output", str(tmp_path / "x.png")])
    for flag in ("--kinds", "--map-method", "--map-level"):
        with pytest.raises(SystemExit):
            main(["--dataset", val, flag, "umap"])
    assert picture_paths(Path("x.PNG"), ()) == {"pca": Path("x.PNG")}
    assert picture_paths(Path("x.png"), ("map", "map")) == {"map": Path("x.png")}
    assert list(picture_paths(Path("x"), ("map", "pca"))) == ["pca", "map"]
    assert picture_paths(Path("x"), ()) == {kind: Path("x") / name for kind, name in FILES.items()}
