"""The revisited Oxford and Paris benchmarks, in small."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_stand_ins import tiny_transformer
from PIL import Image
from slow_retrieval import slowly
from torch import Tensor, nn

from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval import RetrievalSettings, eval_revisited
from dinov2.eval.retrieval.ranking import IGNORED, RELEVANT, WRONG, describe_images
from dinov2.eval.retrieval.revisited import PROTOCOLS, ResizeLongerSide, RevisitedImages, read_revisited

KS = (1, 5, 10)
GALLERY = [f"all_souls_{number:06d}" for number in range(12)]
QUERIES = ["all_souls_000013", "oxford_002416", "radcliffe_camera_000519"]
SIZES = [(64, 48), (48, 64), (50, 50)]
SETTINGS = RetrievalSettings(num_workers=0, num_resamples=10)


def entries() -> list[dict[str, Any]]:
    return [
        {"bbx": [10.2, 5.5, 40.1, 30.0], "easy": [0, 3], "hard": [5], "junk": [1, 7]},
        {"bbx": np.array([0.0, 0, 48, 64]), "easy": np.array([2, 4, 6]), "hard": [], "junk": np.array([], dtype=int)},
        {"bbx": (3, 3, 45, 47), "easy": [], "hard": [], "junk": [8]},
    ]


def write_truth(root: Path, content: Any, name: str = "gnd_roxford5k.pkl", protocol: int = 2) -> None:
    (root / name).write_bytes(pickle.dumps(content, protocol=protocol))


def make_benchmark(folder: Path) -> Path:
    """A benchmark in the published format."""
    (folder / "jpg").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index, name in enumerate([*GALLERY, *QUERIES]):
        width, height = SIZES[index % 3] if name in GALLERY else SIZES[QUERIES.index(name)]
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        image.save(folder / "jpg" / f"{name}.jpg", quality=95)
    write_truth(folder, {"imlist": GALLERY, "qimlist": QUERIES, "gnd": entries()})
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_benchmark(tmp_path / "roxford5k")


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return tiny_transformer()


def slow_tensor(path: Path, box: Any, longer_side: int, patch: int) -> Tensor:
    image = Image.open(path).convert("RGB")
    scale = longer_side / max(image.size)
    if box is not None:
        image = image.crop([round(float(value)) for value in box])
    width, height = (max(round(side * scale / patch), 1) * patch for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) / 255
    return torch.from_numpy((pixels - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1)[None].float()


def assert_as_published(results: EvaluationResults, queries: Tensor, gallery: Tensor) -> None:
    published = {
        "easy": (("easy",), ("hard", "junk")),
        "medium": (("easy", "hard"), ("junk",)),
        "hard": (("hard",), ("easy", "junk")),
    }
    assert list(results.scores) == list(published) == list(PROTOCOLS)
    for protocol, (positives, junk) in published.items():
        rows = []
        for query, entry in zip(queries, entries(), strict=True):
            kinds = [WRONG] * len(GALLERY)
            for kind, value in [*((kind, RELEVANT) for kind in positives), *((kind, IGNORED) for kind in junk)]:
                for index in entry[kind]:
                    kinds[index] = value
            if RELEVANT in kinds:
                rows.append(slowly((gallery @ query).tolist(), kinds, KS))
        image = results.scores[protocol].image
        assert image.count == len(rows) == {"easy": 2, "medium": 2, "hard": 1}[protocol]
        assert image.metrics["map"].value == pytest.approx(np.mean([row[0] for row in rows]), abs=1e-6)
        for place, k in enumerate(KS):
            assert image.metrics[f"mp@{k}"].value == pytest.approx(np.mean([row[1][place] for row in rows]), abs=1e-6)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.7071, 1.4142)])
def test_benchmark_equals_the_slow_protocol(
    root: Path, backbone: nn.Module, tmp_path: Path, scales: tuple[float, ...]
) -> None:
    asked = RetrievalSettings(num_workers=0, num_resamples=10, features="gem", scales=scales)
    results = eval_revisited(backbone, root, longer_side=56, settings=asked, output_dir=tmp_path / "out")
    describe = describe_images(backbone, "gem", gem_power=3.0, scales=scales)
    boxes = [entry["bbx"] for entry in entries()]
    queries = [describe(slow_tensor(root / "jpg" / f"{n}.jpg", b, 56, 14)) for n, b in zip(QUERIES, boxes, strict=True)]
    gallery = [describe(slow_tensor(root / "jpg" / f"{name}.jpg", None, 56, 14)) for name in GALLERY]
    assert_as_published(results, torch.cat(queries), torch.cat(gallery))
    assert results.extra["num_skipped_queries"] == {"easy": 1, "medium": 1, "hard": 2}
    assert (results.settings["benchmark"], results.settings["longer_side"]) == ("roxford5k", 56)
    assert results.settings["gem_power"] == 3.0
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 + 2 + 1
    assert lines[1].startswith(f"{root / 'jpg' / QUERIES[0]}.jpg")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert EvaluationResults.from_dict(written).as_dict() == results.as_dict()
    assert written["datasets"]["gallery"]["num_images"] == 12


def test_no_query_of_a_protocol_is_no_error(root: Path, backbone: nn.Module) -> None:
    only_easy = [{**entry, "hard": []} for entry in entries()]
    write_truth(root, {"imlist": GALLERY, "qimlist": QUERIES, "gnd": only_easy})
    results = eval_revisited(backbone, root, longer_side=28, settings=SETTINGS)
    assert results.scores["hard"].image.count == 0
    assert results.scores["hard"].image.metrics == {}
    assert results.scores["easy"].image.metrics == results.scores["medium"].image.metrics
    assert results.extra["num_skipped_queries"]["hard"] == 3


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_ground_truth_of_any_pickle_protocol(root: Path, protocol: int) -> None:
    before = read_revisited(root)
    content = {"imlist": np.array(GALLERY), "qimlist": tuple(QUERIES), "gnd": entries(), "more": None}
    write_truth(root, content, protocol=protocol)
    after = read_revisited(root / "gnd_roxford5k.pkl")
    for name in ("name", "gallery", "queries", "boxes", "kinds"):
        np.testing.assert_equal(getattr(after, name), getattr(before, name))


def test_query_is_cut_to_its_box_and_keeps_the_scale_of_its_image(tmp_path: Path) -> None:
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    pixels[20:60, 30:130] = 255  # 100 wide, 40 high
    path = tmp_path / "query.png"
    Image.fromarray(pixels).save(path)
    resize = ResizeLongerSide(100, (5, 5))
    cut, _ = RevisitedImages([path], resize, [(29.6, 19.7, 130.4, 60.2)])[0]
    assert cut.shape == (3, 20, 50)
    torch.testing.assert_close(cut, ((1 - Tensor(IMAGENET_MEAN)) / Tensor(IMAGENET_STD))[:, None, None].expand_as(cut))
    whole, target = RevisitedImages([path], resize)[0]
    assert whole.shape == (3, 50, 100)
    assert target == -1


def test_longer_side_comes_to_whole_patches() -> None:
    resize = ResizeLongerSide(1024, (14, 14))
    assert resize(Image.new("RGB", (1024, 768))).shape == (3, 770, 1022)
    assert resize(Image.new("RGB", (300, 400))).shape == (3, 1022, 770)
    assert resize(Image.new("RGB", (2000, 3))).shape == (3, 14, 1022)
    with pytest.raises(ValueError, match="at least the 14 pixels of a patch"):
        ResizeLongerSide(13, (14, 14))


def with_entry(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {**content, "gnd": [{**content["gnd"][0], **values}, *content["gnd"][1:]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [content], "must hold a dict with imlist, qimlist and gnd"),
        (lambda content: {"imlist": content["imlist"]}, "must hold a dict with imlist, qimlist and gnd"),
        (lambda content: {**content, "gnd": content["gnd"][:2]}, "one entry for each of the 3 queries"),
        (
            lambda content: {**content, "gnd": [[], [], []]},
            f"query {QUERIES[0]} must have the keys bbx, easy, hard, junk",
        ),
        (lambda content: {**content, "imlist": [1, 2]}, "imlist must be a list of image names"),
        (lambda content: {**content, "imlist": []}, "imlist must be a list of image names"),
        (lambda content: {**content, "imlist": ["../../secret"]}, "names of files without folders"),
        (lambda content: {**content, "qimlist": [QUERIES[0]] * 3}, "qimlist holds a name twice"),
        (with_entry(bbx=[1, 2, 3]), "bbx must be four numbers"),
        (with_entry(bbx=[1, 2, "3", 4]), "bbx must be four numbers"),
        (with_entry(bbx=[1, 2, float("nan"), 4]), "bbx must be four numbers"),
        (with_entry(bbx=[[1], 2, 3, 4]), "bbx must be four numbers"),
        (with_entry(bbx=None), "bbx must be four numbers"),
        (with_entry(bbx=[30, 2, 10, 40]), r"bbx \[30, 2, 10, 40\] .*holds no pixel"),
        (with_entry(easy=[12]), r"easy must be positions in \[0, 12\), found \[12\]"),
        (with_entry(easy=[-1]), r"easy must be positions in \[0, 12\)"),
        (with_entry(hard=[0.5]), "hard must be a list of positions"),
        (with_entry(junk=[[1]]), "junk must be a list of positions"),
        (with_entry(junk=3), "junk must be a list of positions"),
        (with_entry(junk=[0]), "listed twice in easy, hard, junk"),
    ],
)
def test_damaged_ground_truth(root: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    write_truth(root, change({"imlist": GALLERY, "qimlist": QUERIES, "gnd": entries()}))
    with pytest.raises(ValueError, match=rf"gnd_roxford5k\.pkl.*{message}"):
        read_revisited(root)


def test_missing_files(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither gnd_roxford5k\.pkl nor gnd_rparis6k\.pkl"):
        read_revisited(tmp_path)
    write_truth(root, {"imlist": GALLERY, "qimlist": QUERIES, "gnd": entries()}, "gnd_rparis6k.pkl")
    with pytest.raises(ValueError, match="name one of the files"):
        read_revisited(root)
    assert read_revisited(root / "gnd_rparis6k.pkl").name == "rparis6k"
    (root / "gnd_rparis6k.pkl").unlink()
    (root / "jpg" / f"{GALLERY[3]}.jpg").unlink()
    (root / "jpg" / f"{QUERIES[1]}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks 2 of 15 images: {GALLERY[3]}\.jpg, {QUERIES[1]}\.jpg"):
        read_revisited(root)
    (root / "jpg").rename(root / "images")
    with pytest.raises(FileNotFoundError, match=r"no folder .*jpg with the images"):
        read_revisited(root)


def test_a_pickle_that_runs_code_is_refused(root: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("never",))

    write_truth(root, {"imlist": GALLERY, "qimlist": QUERIES, "gnd": Evil()})
    with pytest.raises(ValueError, match=r"gnd_roxford5k\.pkl .*builtins\.print, which is refused"):
        read_revisited(root)


@pytest.mark.parametrize("box", [(10, 10, 66, 40), (-2, 0, 30, 30), (0, 0, 20, 51), (70, 0, 90, 20), (64.2, 0, 65, 20)])
def test_box_outside_its_image(root: Path, backbone: nn.Module, box: tuple[float, ...]) -> None:
    write_truth(root, {"imlist": GALLERY, "qimlist": QUERIES, "gnd": [{**entries()[0], "bbx": box}, *entries()[1:]]})
    with pytest.raises(ValueError, match=rf"of query .*{QUERIES[0]}\.jpg reaches outside the image of 64 x 48 pixels"):
        eval_revisited(backbone, root, longer_side=28, settings=SETTINGS)


def test_box_a_rounding_outside_its_image_is_clipped(root: Path) -> None:
    box = (-0.6, 0.0, 64.9, 48.4)
    images = RevisitedImages([root / "jpg" / f"{QUERIES[0]}.jpg"], ResizeLongerSide(64, (1, 1)), [box])
    assert images[0][0].shape == (3, 48, 64)


def test_unreadable_image_is_named(root: Path, backbone: nn.Module) -> None:
    (root / "jpg" / f"{GALLERY[5]}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{GALLERY[5]}\.jpg"):
        eval_revisited(backbone, root, longer_side=28, settings=SETTINGS)


def test_a_network_without_patches_takes_any_size(root: Path) -> None:
    class MeanColour(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3))

    results = eval_revisited(MeanColour(), root, longer_side=50, settings=SETTINGS)
    paths = [root / "jpg" / f"{name}.jpg" for name in [*QUERIES, *GALLERY]]
    boxes = [*(entry["bbx"] for entry in entries()), *[None] * len(GALLERY)]
    tensors = [slow_tensor(path, box, 50, 1) for path, box in zip(paths, boxes, strict=True)]
    features = F.normalize(torch.cat([tensor.mean(dim=(2, 3)) for tensor in tensors]), dim=1)
    assert_as_published(results, features[:3], features[3:])
