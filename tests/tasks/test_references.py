"""Images beside one without a defect: trained, evaluated, shipped and applied, for all tasks that compare."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tune_stand_ins import BACKBONE, KINDS, finetune, make_small
from numpy.typing import NDArray
from PIL import Image

import dinov2
from dinov2.data.datasets.dense_targets import BadTargetError
from dinov2.models.task_model import ComparingTaskModel
from dinov2.predict import images as infer_images
from dinov2.tasks.package import load_task_package

SIZE = 32
TASKS = ("classification", "segmentation", "detection")


def board(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blocks of black and white, of which any may be a defect for all that one image tells."""
    return np.kron(rng.integers(0, 2, (8, 8)), np.ones((4, 4))).astype(np.uint8) * 255


def make_boards(root: Path, count: int = 12) -> Path:
    """Boards with their templates; every second one has an inverted square of 8 pixels."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root.parent / "backbone.yaml").write_text(BACKBONE, encoding="utf-8")
    for split in ("train", "val"):
        rows: list[dict[str, Any]] = []
        for folder in (split, f"{split}/template", f"{split}/masks"):
            (root / folder).mkdir(parents=True)
        for number in range(count):
            template, mask = board(rng), np.zeros((SIZE, SIZE), np.uint8)
            if number % 2:
                top, left = rng.integers(0, SIZE - 8, 2)
                mask[top : top + 8, left : left + 8] = 1
            names = [f"{split}/{folder}{number:02d}.png" for folder in ("", "template/", "masks/")]
            for name, pixels in zip(names, (template ^ (255 * mask), template, mask), strict=True):
                Image.fromarray(pixels).save(root / name)
            rows.append(
                {
                    "img_path": names[0],
                    "reference": names[1],
                    "mask_path": names[2],
                    "gt_label": number % 2,
                    "group_id": f"{split}{number}",
                }
            )
        content = {"metainfo": {"classes": ["good", "defect"], "mask_classes": ["good", "defect"]}, "data_list": rows}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_boards(tmp_path_factory.mktemp("compared") / "boards")


def assert_alike(first: Any, second: Any) -> None:
    """Equal but for rounding: batches of other sizes add up in another order."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        first, second = list(first.values()), list(second.values())
    if isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_alike(one, other)
    else:
        assert first == (pytest.approx(second, abs=1e-4) if isinstance(second, float) else second)


@pytest.mark.parametrize(
    ("task", "resize"),
    [*((task, "stretch") for task in TASKS), ("segmentation", "original"), ("detection", "original")],
)
def test_training_evaluation_and_prediction_see_the_reference(
    boards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    resize: str,
) -> None:
    make_small(monkeypatch)
    pairs = ("data.reference=true", "augmentation.vflip=0.5", "optim.epochs=1", f"data.resize={resize}")
    mixed = () if task == "classification" else ("augmentation.mosaic=0.5", "augmentation.copy_paste=0.5")
    assert finetune(boards, tmp_path / "out", *pairs, *mixed, task=task) == 0
    best = tmp_path / "out" / "best.pth"
    package = load_task_package(best)
    assert package.settings["reference"] is True
    assert isinstance(package.model, ComparingTaskModel)

    model = dinov2.load(best)
    paths = [boards / "val" / f"{number:02d}.png" for number in range(3)]
    templates = [boards / "val" / "template" / path.name for path in paths]
    found = model.predict(paths, templates)
    for path, template, one in zip(paths, templates, found, strict=True):
        (alone,) = model.predict(np.asarray(Image.open(path)), Image.open(template))
        assert_alike(alone.to_dict(), one.to_dict())
    assert_alike(
        model.predict(paths[:2], templates[0])[1].to_dict(), model.predict(paths[1], templates[0])[0].to_dict()
    )

    words = ["--weights", str(best), "--input", str(boards / "val" / "0[0-2].png"), "--device", "cpu"]
    folder = ["--reference", str(boards / "val" / "template")]
    assert infer_images.main([*words, *folder, "--output-dir", str(tmp_path / "found")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "found" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line, one in zip(lines, found, strict=True):
        assert_alike({name: line[name] for name in one.to_dict()}, one.to_dict())
    assert f"--reference {boards / 'val' / 'template'}\n" in capsys.readouterr().err


def test_missing_and_needless_references_are_told(
    boards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    for name, pair in (("alone", "data.reference=false"), ("compared", "data.reference=true")):
        assert finetune(boards, tmp_path / name, pair, "optim.epochs=1", task="segmentation") == 0
    alone, compared = (dinov2.load(tmp_path / name / "best.pth") for name in ("alone", "compared"))
    image, template = (boards / "val" / folder / "00.png" for folder in ("", "template"))
    with pytest.raises(ValueError, match=r"compares each image with one without a defect .*: give its"):
        compared.predict(image)
    with pytest.raises(ValueError, match=r"takes no reference; train with data\.reference=true"):
        alone.predict(image, template)
    for images, references, text in (
        ([image], [], "the references end after 0, and the images do not"),
        ([image], [template] * 2, "the images end after 1, and the references do not"),
    ):
        with pytest.raises(ValueError, match=text):
            compared.predict(images, references)
    with pytest.raises(ValueError, match=r"00\.png: its reference has 30 x 32 pixels \(height x width\), the image 32"):
        compared.predict([image], [np.zeros((30, 32), np.uint8)])

    words = ["--weights", str(tmp_path / "compared" / "best.pth"), "--input", str(image), "--device", "cpu"]
    with pytest.raises(ValueError, match="give its reference"):
        infer_images.main([*words, "--output-dir", str(tmp_path / "x")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"00\.png: its reference .*empty/00\.png does not exist \(1 of 1"):
        infer_images.main([*words, "--output-dir", str(tmp_path / "x"), "--reference", str(tmp_path / "empty")])


def test_a_set_with_a_missing_or_wrongly_sized_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    root = make_boards(tmp_path / "boards")
    pairs = ("data.reference=true", "optim.epochs=1")
    template = root / "val" / "template" / "03.png"
    Image.new("L", (SIZE, SIZE - 1)).save(template)
    with pytest.raises(BadTargetError, match=r"val/03\.png: image 3 of the set has 32 x 32 .*template/03\.png 31 x 32"):
        finetune(root, tmp_path / "out", *pairs)
    template.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"val/03\.png \(image 3 of the set\): its reference .*03\.png does not"
    ):
        finetune(root, tmp_path / "other", *pairs)


def test_what_one_image_cannot_tell_is_learnt_by_comparing(boards: Path) -> None:
    """Every block may be a defect; beside the template, unseen boards are told apart within seconds."""
    from dinov2.models.heads.pyramid import PyramidHead
    from dinov2.models.vision_transformer import DinoVisionTransformer

    torch.manual_seed(0)
    backbone = DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    head = PyramidHead(32, 2, num_blocks=1, channels=16, output_stride=2, image_channels=6)
    model = ComparingTaskModel(backbone, head, blocks=[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def batch(split: str) -> list[torch.Tensor]:
        def read(folder: str) -> torch.Tensor:
            paths = sorted((boards / split / folder).glob("*.png"))
            return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))

        images, templates = (
            read(folder).float()[:, None].expand(-1, 3, -1, -1) / 128 - 1 for folder in ("", "template")
        )
        return [images, templates, read("masks").long()]

    images, templates, masks = batch("train")
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(images, templates)["logits"], masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, templates, masks = batch("val")
    with torch.no_grad():
        found = model.eval()(images, templates)["logits"].argmax(dim=1)
    assert (found & masks).sum() / (found | masks).sum() > 0.7
    assert set(KINDS) >= set(TASKS)
