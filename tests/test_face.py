"""``import dinov2``: pretrain, finetune, load."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import dinov2
from dinov2.checkpoint.merge import extract_teacher
from dinov2.config import Config, ConfigError, load_config, parse_config, render_config
from dinov2.data.decoding import load_image
from dinov2.data.photometric import standardize_light
from dinov2.eval.command import build_frozen_backbone
from dinov2.eval.features import make_eval_transform
from dinov2.models import build
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.predict.predictor import Predictor
from dinov2.tasks import engine, load_task_config
from dinov2.tasks.classification import ClassificationTask
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.package import load_task_package
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, SegmentationPrediction
from dinov2.tasks.task import Task, TaskFacts
from dinov2.train import command
from dinov2.utils.errors import StartAgainError

OLD = Path(__file__).parent / "old_files"
TEACHER = OLD / "one" / "eval" / "training_3" / "teacher_checkpoint.pth"
PREDICTIONS = {"classification": ClassPrediction, "segmentation": SegmentationPrediction, "depth": DepthPrediction}


def very_small_vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(embed_dim=8, depth=2, num_heads=2, **options)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": very_small_vit, "vit_small": very_small_vit})


@pytest.fixture
def images() -> list[Path]:
    return sorted((OLD / "parts" / "val").rglob("*.jpeg"))[:3]


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "omegaconf", "torchmetrics", "dinov2.config")
    code = f"import sys, dinov2; dinov2.pretrain, dinov2.__version__; print([x for x in {heavy} if x in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("stored", ["light", "config"])  # a file of an earlier version has its options alone
def test_images_are_prepared_as_in_training(stored: str, images: list[Path], tmp_path: Path) -> None:
    content = torch.load(TEACHER, weights_only=True)
    plain = dinov2.load(TEACHER).embed([standardize_light(load_image(image)) for image in images])
    if stored == "light":
        content["light"] = "standardized"
    else:
        options = load_config(OLD / "one" / "config.yaml")
        path = replace(options.train, dataset_path=options.train.dataset_path + ":light=standardized")
        content["config"] = render_config(replace(options, train=path))
    torch.save(content, tmp_path / "teacher.pth")
    model = dinov2.load(tmp_path / "teacher.pth")
    np.testing.assert_array_equal(model.embed(images), plain)
    assert np.abs(dinov2.load(TEACHER).embed(images) - plain).max() > 1e-3


def test_embeddings_are_those_of_the_evaluators(images: list[Path]) -> None:
    model = dinov2.load(TEACHER)
    found = model.embed(images)
    config = load_config(OLD / "one" / "config.yaml")
    backbone = build_frozen_backbone(config, str(TEACHER), "cpu")
    transform = make_eval_transform(config.crops.global_crops_size, whole_image=config.evaluation.whole_image)
    expected = torch.cat([backbone(transform(load_image(path))[None]) for path in images])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    tokens = backbone(transform(load_image(images[0]))[None], is_training=True)["x_norm_patchtokens"]
    means = model.embed(images[0], features="patch_mean")
    np.testing.assert_allclose(means, tokens.mean(dim=1).numpy(), rtol=1e-5, atol=1e-6)
    both = model.embed(images[0], features="cls_patch_mean")
    several = model.embed(images, features="cls_patch_statistics")
    np.testing.assert_allclose(several[0], np.concatenate([found[0], means[0], tokens.std(1, correction=0)[0]]), 1e-4)
    assert model.embed([], features="cls_patch_statistics").shape == (0, 24)
    np.testing.assert_allclose(both[0, 8:] / np.linalg.norm(both[0, 8:]), means[0] / np.linalg.norm(means), rtol=1e-4)


def test_images_come_as_files_pictures_and_arrays_one_or_many(images: list[Path]) -> None:
    model = dinov2.load(TEACHER)
    expected = model.embed(images)
    opened = [load_image(path) for path in images]
    np.testing.assert_array_equal(model.embed(iter(map(str, images)), batch_size=2), model.embed(opened, batch_size=2))
    np.testing.assert_allclose(model.embed(opened[1]), expected[1:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.embed(np.asarray(opened[1])), expected[1:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.embed(np.stack(list(map(np.asarray, opened)))), expected, rtol=1e-5, atol=1e-6)
    assert model.embed([]).shape == (0, 8)
    pixels = np.asarray(opened[1])
    for alike in (torch.from_numpy(pixels.copy()), torch.from_numpy(pixels.transpose(2, 0, 1).copy()), pixels / 255):
        np.testing.assert_allclose(model.embed(alike), expected[1:2], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"\[H, W, C\] of numbers, .* found float64 \[2, 2, 5\]"):
        model.embed(np.zeros((2, 2, 5)))
    with pytest.raises(OSError, match=r"nothing\.png"):
        model.embed("nothing.png")
    with pytest.raises(ValueError, match=r"predicts nothing: train a head on it with dinov2\.finetune"):
        model.predict(opened)


def test_an_opened_image_gives_the_features_of_its_file(images: list[Path], tmp_path: Path) -> None:
    model = dinov2.load(TEACHER)
    levels = np.linspace(0, 65535, 48 * 48).reshape(48, 48)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.open(images[0]).convert("RGBA").save(tmp_path / "alpha.png")
    Image.open(images[0]).save(tmp_path / "turned.jpg", exif=turned)
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as opened:
            np.testing.assert_array_equal(model.embed(opened), model.embed(path), err_msg=path.name)


def test_images_are_read_with_the_range_of_training(tmp_path: Path) -> None:
    """Of the teacher's file, else of the dataset string in its options; files, opened images and arrays alike."""
    levels = np.linspace(0, 255, 48 * 48).reshape(48, 48).round()
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "plain.png")
    values = (levels / 255 * 4095).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "float.tif")
    expected = dinov2.load(TEACHER).embed(tmp_path / "plain.png")
    content = torch.load(TEACHER, weights_only=True)
    text = (OLD / "one" / "config.yaml").read_text(encoding="utf-8")
    found = re.search(r"dataset_path: (GroupedJSON[^\n]*)", text)
    assert found is not None
    named = text.replace(found[1], f"{found[1]}:bits=12")
    for more in ({"value_range": [0.0, 4095.0], "config": text}, {"config": named}):
        torch.save({**content, **more}, tmp_path / "teacher.pth")
        model = dinov2.load(tmp_path / "teacher.pth")
        with Image.open(tmp_path / "float.tif") as opened:
            for image in (tmp_path / "float.tif", opened, values, torch.from_numpy(values), values.astype(np.uint16)):
                np.testing.assert_allclose(model.embed(image), expected, rtol=0.02, atol=0.02)


def test_what_cannot_be_embedded_or_loaded_is_said(tmp_path: Path) -> None:
    model = dinov2.load(TEACHER)
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        model.embed([], batch_size=0)
    with pytest.raises(ValueError, match=r"found uint8 \[9\]"):
        model.embed(np.zeros(9, dtype=np.uint8))
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        dinov2.load(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([["a.png"]], r"found list; only predict takes lists in the list"),
        ([None], "an image is a file, a PIL image, an array .*found NoneType"),
        (None, "found NoneType"),
        (b"\x89PNG", r"found bytes; open bytes by PIL\.Image\.open\(io\.BytesIO\(data\)\)"),
        ([{"path": "a.png"}], "found dict"),
        (3, "found int"),
    ],
)
def test_what_stands_for_no_image_is_said(images: Any, message: str) -> None:
    model = dinov2.load(TEACHER)
    with pytest.raises(TypeError, match=message):
        model.embed(images)
    with pytest.raises(TypeError, match=message):
        dinov2.load(OLD / "segmentation" / "best.pth").predict(images)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", r"device 'gpu' is unknown; GPUs are called cuda; allowed are auto, cpu, cuda"),
        ("cuda:9", r"device cuda:9 was asked for, but torch sees (no GPU|\d GPUs)"),
        (torch.device("cuda", 99), r"device cuda:99 was asked for"),
        ("tpu!", "device 'tpu!' is unknown; allowed are auto"),
    ],
)
def test_a_device_that_is_not_there_is_said(device: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dinov2.load(TEACHER, device=device)


def test_no_device_is_the_best_and_the_users_folder_is_found(
    monkeypatch: pytest.MonkeyPatch, images: list[Path]
) -> None:
    monkeypatch.setenv("HOME", str(OLD))
    found = dinov2.load("~/one/eval/training_3/teacher_checkpoint.pth", device=None)
    assert found.embed("~/" + str(images[0].relative_to(OLD))).shape == (1, 8)


def test_files_that_are_loaded_in_another_way_are_said() -> None:
    with pytest.raises(ValueError, match=r"state of a fine-tuning run, .*load the best\.pth beside it"):
        dinov2.load(OLD / "classification" / "model_0000004.rank_0.pth")
    with pytest.raises(ValueError, match=r"best\.pth is a fine-tuned model and describes itself: leave config out"):
        dinov2.load(OLD / "classification" / "best.pth", OLD / "one" / "config.yaml")


def test_a_config_beside_weights_that_is_not_of_pretraining_does_not_stand_in_the_way(
    images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(OLD / "classification" / "config.yaml", tmp_path)
    extract_teacher(TEACHER, tmp_path / "backbone.pth")
    with caplog.at_level("WARNING", "dinov2"):
        assert dinov2.load(tmp_path / "backbone.pth").embed(images).shape == (3, 8)
    assert "config.yaml does not describe the backbone in" in caplog.text


class Unfinished(Task):
    name = "unfinished"


class Named(ClassificationTask):
    name = "named"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, r"tasks must be classes by name, such as \{\*\*TASKS, 'mine': Mine\}, found none"),
        ([Named], "found a list"),
        ({"unfinished": Unfinished}, "'unfinished' must be a class derived from .* with its heads"),
        ({"other": Named}, "'other' calls itself name = 'named'; both must be the same"),
        ({"named": Named(load_task_config(), TaskFacts(classes=("a", "b"), unit=""))}, "must be a class"),
        ({"loss": type("Loss", (Named,), {"name": "loss"})}, "a task cannot be called 'loss'"),
        ({"named": type("Wrong", (Named,), {"options": dict})}, "options of the task 'named' must be a dataclass"),
    ],
)
def test_tasks_of_ones_own_that_cannot_work_are_said(tasks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dinov2.finetune(tasks=tasks)


def test_options_come_from_the_file_the_folder_or_the_call(images: list[Path], tmp_path: Path) -> None:
    expected = dinov2.load(TEACHER).embed(images)
    content = torch.load(TEACHER, weights_only=True)
    path = tmp_path / "teacher.pth"
    torch.save(content, path)
    assert dinov2.load(path).embed(images).shape == expected.shape  # told from the shapes of its parameters
    text = (OLD / "one" / "config.yaml").read_text(encoding="utf-8")
    for config in (OLD / "one" / "config.yaml", parse_config(text, "text")):
        np.testing.assert_array_equal(dinov2.load(path, config).embed(images), expected)
    torch.save({**content, "config": text}, path)
    np.testing.assert_array_equal(dinov2.load(str(path)).embed(images), expected)
    extract_teacher(path, tmp_path / "backbone.safetensors")
    np.testing.assert_array_equal(dinov2.load(tmp_path / "backbone.safetensors").embed(images), expected)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        dinov2.load(tmp_path / "nowhere.pth")


def test_a_released_backbone_comes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: list[Path]) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    released = very_small_vit(patch_size=14, img_size=518, num_register_tokens=4, init_values=1.0)
    path = tmp_path / "checkpoints" / "dinov2_vits14_reg4_pretrain.pth"
    torch.save(released.state_dict(), path)
    model = dinov2.load("dinov2_vits14_reg")
    assert model.image_size == (224, 224)
    np.testing.assert_array_equal(model.embed(images), dinov2.load(path, "dinov2_vits14_reg").embed(images))
    with pytest.raises(FileNotFoundError, match="no released backbone; those are dinov2_vits14, "):
        dinov2.load("dinov2_vitx14")


@pytest.mark.parametrize("task", PREDICTIONS)
def test_a_fine_tuned_model_predicts_and_embeds(task: str, images: list[Path]) -> None:
    model = dinov2.load(OLD / task / "best.pth")
    found = model.predict(images)
    assert [type(prediction) for prediction in found] == [PREDICTIONS[task]] * 3
    (single,) = model.predict(Image.open(images[0]))
    assert type(single) is PREDICTIONS[task]
    assert model.embed(images).shape == (3, 8)


def test_a_model_of_parts_predicts_for_lists_of_images(images: list[Path]) -> None:
    model = dinov2.load(OLD / "per_part" / "best.pth")
    together, alone = model.predict([images[:2], images[2]])
    expected = Predictor.of(load_task_package(OLD / "per_part" / "best.pth"))
    (part,) = expected.predict_parts([[load_image(path) for path in images[:2]]])
    np.testing.assert_array_equal(together.probabilities, part.probabilities)
    assert type(alone) is ClassPrediction


def test_options_of_fine_tuning_come_as_sections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[TaskConfig] = []
    monkeypatch.setattr(engine, "finetune", lambda config, *, resume: asked.append(config) or 0)
    path = OLD / "classification" / "config.yaml"
    assert dinov2.finetune(path, train={"output_dir": tmp_path}, data={"max_photos": 3}) == tmp_path
    assert asked == [load_task_config(path, [f"train.output_dir={tmp_path}", "data.max_photos=3"])]
    assert dinov2.finetune({"task": "depth"}, loss={"l1": 1}) == Path(".")
    assert (asked[1].task, asked[1].loss.l1) == ("depth", 1.0)


def test_options_of_a_run_come_as_sections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Config, bool]] = []
    codes = [0, 130, 75]

    def run(config: Config, *, resume: bool) -> int:
        asked.append((config, resume))
        return codes.pop(0)

    monkeypatch.setattr(command, "pretrain", run)
    path = OLD / "one" / "config.yaml"
    folder = dinov2.pretrain(path, resume=False, train={"output_dir": tmp_path, "seed": 5})
    assert folder == tmp_path
    assert asked == [(load_config(path, [f"train.output_dir={tmp_path}", "train.seed=5"]), False)]
    with pytest.raises(KeyboardInterrupt):
        dinov2.pretrain(asked[0][0])
    with pytest.raises(StartAgainError, match="the same call goes on"):
        dinov2.pretrain({"train": {"seed": 5}})
    with pytest.raises(ConfigError, match=r"train\.sede \(in the arguments\); did you mean train\.seed"):
        dinov2.pretrain(path, train={"sede": 5})
