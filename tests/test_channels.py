"""Networks of images of one and of four channels, from pretraining to the exported file; the rest is RGB everywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2
from dinov2.config import ConfigError
from dinov2.data.loaders import make_dataset
from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.data.transforms import as_rgb, channel_statistics, cut_tilted, make_normalize_transform, to_pillow
from dinov2.deploy.deployed import load_deployed
from dinov2.deploy.export import ExportSettings, export_model
from dinov2.eval.knn import main as knn
from dinov2.models.vision_transformer import vit_mini
from dinov2.tasks.engine import main as finetune
from tests.train.train_stand_ins import make_small, run_command

APPENDED = ", ".join(f"{{{name}: {{output: append}}}}" for name in ("lbp", "sobel", "canny"))
STEPS = {1: "[{channels: {count: 1}}]", 4: f"[{APPENDED}, {{channels: {{count: 4}}}}]"}


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_any_channels_are_resized_turned_and_normalised_channel_by_channel(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    image = to_pillow(pixels)
    assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    each = [Image.fromarray(np.ascontiguousarray(pixels[..., place])) for place in range(channels)]
    changes = (
        lambda one: one.resize((11, 9), Image.Resampling.BICUBIC),
        lambda one: one.crop((3, 2, 20, 15)).transpose(Image.Transpose.TRANSPOSE),
        lambda one: cut_tilted(one, (15.0, 10.0), (8, 6), 20.0),
    )
    for change in changes:
        expected = np.dstack([np.asarray(change(one)) for one in each])
        assert np.array_equal(np.asarray(change(image)).reshape(expected.shape), expected)
    assert as_rgb(image).mode == "RGB"
    mean, std = channel_statistics(channels)
    assert make_normalize_transform()(torch.tensor(mean).view(-1, 1, 1)).abs().max() == 0
    assert std == (0.226,) * channels


@pytest.mark.parametrize("channels", [1, 4])
def test_from_pretraining_to_the_exported_file(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole commands, one after the other, which takes seconds."""
    pytest.importorskip("onnxruntime")
    make_small(monkeypatch)
    parts = tmp_path / "parts"
    make_demo_parts(parts, parts=8, photos=2, image_size=48)
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    options = (f"student.in_channels={channels}", f"data.preprocessing={STEPS[channels]}")
    with pytest.raises(ConfigError, match=rf"gives images of 3 channels, the network takes {channels}"):
        run_command(parts, run, options[0])
    with pytest.raises(ConfigError, match=rf"gives images of {channels} channels, the network takes 3"):
        run_command(parts, run, options[1])
    assert run_command(parts, run, *options, "optim.epochs=1", "evaluation.eval_period_iterations=3") == 0
    (weights,) = run.glob("eval/*/teacher_checkpoint.pth")
    assert torch.load(weights, weights_only=True)["teacher"]["backbone.patch_embed.proj.weight"].shape[1] == channels

    sets = {name: f"GroupedJSON:split={name.upper()}:root={parts}" for name in ("train", "val")}
    flags = [f"--pretrained-weights={weights}", "--num-workers=0", "--num-resamples=0", "--nb_knn=1"]
    flags += [f"--{name}-dataset={value}" for name, value in sets.items()]
    assert knn([*flags, f"--output-dir={tmp_path / 'knn'}", "--compare-random"]) == 0

    pairs = {
        **{f"data.{name}_dataset_path": value for name, value in sets.items()},
        "task": "segmentation",
        "head.kind": {1: "pyramid", 4: "conv_decoder"}[channels],  # the first sees pixels beside tokens
        "head.channels": "8",
        "backbone.pretrained_weights": str(weights),
        "data.image_size": "32",
        "data.num_workers": "0",
        "optim.epochs": "1",
        "train.batch_size_per_gpu": "4",
        "evaluation.num_pictures": "1",
        "augmentation.rotation": "10",
        "augmentation.blur": "0.5",
    }
    assert finetune([f"--output-dir={tuned}", *(f"{name}={value}" for name, value in pairs.items())]) == 0
    model = dinov2.load(tuned / "best.pth")
    model.predictor.predict_prepared([model.predictor.prepare_blank()])
    dataset = make_dataset(dataset_str=sets["val"], preprocessing=model.preprocessing)
    path = tmp_path / "model.onnx"
    reports = export_model(model, dataset, path, ExportSettings(images=2, metric_images=2))
    assert all(report.passed for report in reports)
    exported = load_deployed(path)
    assert exported.artefact.inputs["image"][1] == len(exported.artefact.mean) == channels
    files = [dataset.get_image_path(index) for index in range(2)]
    for ours, theirs in zip(model.predict(files), exported.predict(files), strict=True):
        assert (ours.labels == theirs.labels).mean() > 0.99


def test_a_network_and_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"images have 3 channels, the network takes 4 \(student.in_channels\)"):
        vit_mini(in_chans=4)(torch.zeros(1, 3, 16, 16))
