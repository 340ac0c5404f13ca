"""Files of an earlier version load, and give the numbers that they gave then.

Everything in ``old_files`` was written by the commit ad08cef, before the house was rebuilt, and is not to be written
anew: where a format changes, the old one is still read. Options name no network that is small enough, so ``vit_tiny``
stood for `very_small_vit` then, as it does here; all else went through the commands, with the set at ``data/parts``.

- ``parts``: the set that tools/make_demo_parts.py drew, of 12 parts x 2 photos.
- ``one``, ``two``: pretraining on one and two processes, stopped after iteration 4 of 0 to 7 as SIGTERM does it; the
  first run skipped a batch as not finite.
- ``classification``: fine-tuning with low-rank additions, stopped in its second epoch of three.
- ``per_part``, ``multi_label``, ``segmentation``, ``depth``: what finished fine-tuning leaves for use.
- ``knn``, ``linear``, ``log_regression``: evaluations of the teacher in ``one``.
- ``image_index.npz``: where the images of an ImageNet lie.
- ``expected.json``: what the functions in `MEASURED` returned.
"""

import csv
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov2.checkpoint.integrity import check_run
from dinov2.checkpoint.merge import merge_checkpoint
from dinov2.config import load_config
from dinov2.data.datasets.image_net import load_or_make_index
from dinov2.eval import knn as knn_command
from dinov2.eval import linear as linear_command
from dinov2.eval.command import build_frozen_backbone
from dinov2.eval.linear_classifiers import read_classifiers
from dinov2.eval.log_regression_model import load_log_regression
from dinov2.eval.report import write_report
from dinov2.eval.results import compare_results, read_named_results
from dinov2.logging import read_metrics
from dinov2.models import build
from dinov2.models.pretrained import read_checkpoint
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.predict.predictor import Predictor
from dinov2.tasks import engine as finetune_command
from dinov2.tasks.package import load_task_package
from dinov2.tasks.predictions import ClassPrediction, SegmentationPrediction
from dinov2.train import command as train_command
from dinov2.train.evaluation import read_best
from tools.replay_batch import replay_batch

OLD = Path(__file__).parent / "old_files"
STOPPED_AFTER = 4
CONFIG = OLD / "one" / "config.yaml"
TEACHER = OLD / "one" / "eval" / "training_3" / "teacher_checkpoint.pth"
SETS = {split: f"GroupedJSON:split={split.upper()}:root={OLD / 'parts'}" for split in ("train", "val", "test")}
TASKS = ("classification", "per_part", "multi_label", "segmentation", "depth")


def very_small_vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(embed_dim=8, depth=2, num_heads=2, **options)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": very_small_vit})


def finish(command: Callable[[list[str]], int], run: str, output: Path, *pairs: str) -> list[dict[str, float]]:
    """Lets the command go on in a copy of the run's folder; returns losses, schedules and figures since the stop."""
    shutil.copytree(OLD / run, output)
    assert command(["--config", str(output / "config.yaml"), f"train.output_dir={output}", *pairs]) == 0
    assert "ORDER OF THE DATA CHANGES" not in (output / "log" / "log.txt").read_text(encoding="utf-8")
    names = ("lr", "weight_decay", "momentum", "teacher_temp", "skipped_batches", "probe_patch_cosine", "image_auroc")
    records = [record for record in read_metrics(output / "metrics.jsonl") if record["iteration"] > STOPPED_AFTER]
    rows = [record.get("evaluation", record) for record in records]
    return [{name: row[name] for name in row if name.endswith("_loss") or name in names} for row in rows]


def finish_pretraining(run: str, output: Path, *pairs: str) -> list[dict[str, float]]:
    sets = [f"evaluation.{split}_dataset_path={SETS[split]}" for split in ("train", "val")]
    return finish(train_command.main, run, output, f"train.dataset_path={SETS['train']}", *sets, *pairs)


def finish_fine_tuning(output: Path) -> list[dict[str, float]]:
    sets = [f"data.{split}_dataset_path={name}" for split, name in SETS.items()]
    backbone = (f"backbone.config_file={CONFIG}", f"backbone.pretrained_weights={TEACHER}")
    # Random changes of images are drawn in another order since they are torchvision's.
    plain = [f"augmentation.{name}=0" for name in ("hflip", "brightness", "contrast")]
    return finish(finetune_command.main, "classification", output, *sets, *backbone, *plain)


def replay(output: Path) -> list[dict[str, float]]:
    """Losses of the skipped batch with the newest weights."""
    shutil.copytree(OLD / "one", output)
    return [replay_batch(output, weights=str(output / "model_0000004.rank_{rank}.pth"), device="cpu").losses]


def merged(run: str, output: Path) -> list[float]:
    """Sums of absolute values over all tensors of the newest step."""
    content = read_checkpoint(merge_checkpoint(OLD / run, output.with_suffix(".pth"), what="all").path)
    return [sum(float(tensor.abs().sum()) for tensor in content[what].values()) for what in ("student", "teacher")]


def photo() -> Any:
    """A pattern of 40 x 56 pixels that needs no random numbers."""
    y, x, colour = np.indices((40, 56, 3))
    return ((x * (3 + colour) + y * 5 + x * y // 16 * colour + 90 * (x // 14 % 2)) % 256).astype(np.uint8)


def features(run: str, _: Path) -> Any:
    """The class token of a teacher that an evaluation during training has left."""
    weights = OLD / run / TEACHER.relative_to(OLD / "one")
    backbone = build_frozen_backbone(load_config(OLD / run / "config.yaml", []), str(weights), "cpu")
    return backbone(torch.from_numpy(photo())[None, :16, :16].permute(0, 3, 1, 2) / 128 - 1)[0].tolist()


def answer(task: str, _: Path) -> Any:
    """Probabilities; pixels of each class, and how sure they are; mean and spread of the depth."""
    package = load_task_package(OLD / task / "best.pth")
    if package.task.max_images:
        return Predictor.of(package).predict_parts([[photo(), photo()[::-1].copy()]])[0].probabilities.tolist()
    (said,) = Predictor.of(package).predict([photo()])
    if isinstance(said, ClassPrediction):
        return said.probabilities.tolist()
    if isinstance(said, SegmentationPrediction):
        return [*map(float, np.bincount(said.labels.ravel(), minlength=2)), float(said.scores.mean())]
    return [float(said.depth.mean()), float(said.depth.std())]


def classifiers(_: Path) -> list[float]:
    """Sums of absolute values of linear classifiers; probabilities of a logistic regression."""
    files = (OLD / "linear" / name for name in ("linear_checkpoint.pth", "linear_head.pth"))
    sums = [
        sum(float(part.abs().sum()) for one in read_classifiers(file)[0].values() for part in one) for file in files
    ]
    model = load_log_regression(OLD / "log_regression" / "log_regression.npz")
    return [*sums, *model.probabilities(np.linspace(-1, 1, 3 * len(model.mean)).reshape(3, -1) ** 2)[:, 1].tolist()]


MEASURED: dict[str, Callable[[Path], Any]] = {
    "one": partial(finish_pretraining, "one"),
    "two, on one process": lambda output: finish_pretraining("two", output, "train.batch_size_per_gpu=6"),
    "classification": finish_fine_tuning,
    "bad batch": replay,
    "classifiers": classifiers,
    **{
        f"{function.__name__} {run}": partial(function, run)
        for function in (merged, features)
        for run in ("one", "two")
    },
    **{f"answer {task}": partial(answer, task) for task in TASKS},
}


@pytest.mark.parametrize("name", MEASURED)
def test_numbers_are_those_of_then(name: str, tmp_path: Path) -> None:
    ours, theirs = MEASURED[name](tmp_path / "out"), json.loads((OLD / "expected.json").read_text("utf-8"))[name]
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("run", "ranks"), [("one", 1), ("two", 2)])
def test_runs_are_found_whole(run: str, ranks: int) -> None:
    found = check_run(OLD / run)
    assert [(step.name, step.ranks, step.state) for step in found.steps] == [("model_0000004", ranks, "good")]
    assert found.good
    assert {teacher.state for teacher in found.teachers} == {"good"}


def test_a_run_starts_from_the_teacher() -> None:
    config = load_config(CONFIG, [f"student.pretrained_weights={TEACHER}"])
    state = train_command.build_model(config, torch.device("cpu")).state_dict()
    saved = {name: tensor for name, tensor in read_checkpoint(TEACHER)["teacher"].items() if "backbone." in name}
    assert saved
    assert all(torch.equal(state[f"{net}.{name}"], saved[name]) for net in ("student", "teacher") for name in saved)


def test_evaluators_say_the_same_of_every_photo(tmp_path: Path) -> None:
    words = ["--config-file", str(CONFIG), "--pretrained-weights", str(TEACHER), "--num-workers=0"]
    words += [f"--{split}-dataset={SETS[split]}" for split in ("train", "val")]
    assert knn_command.main([*words, "--nb_knn", "4", f"--output-dir={tmp_path / 'knn'}"]) == 0
    head = f"--classifier-fpath={OLD / 'linear' / 'linear_head.pth'}"
    assert linear_command.main([*words, head, f"--output-dir={tmp_path / 'linear'}"]) == 0
    for file in (Path("knn", "predictions.csv"), Path("linear", "predictions.csv")):
        ours, theirs = (list(csv.DictReader((at / file).read_text("utf-8").splitlines())) for at in (tmp_path, OLD))
        assert [float(row["score"]) for row in ours] == pytest.approx([float(row["score"]) for row in theirs], rel=1e-4)


def test_results_and_small_files_are_read(tmp_path: Path) -> None:
    folders = {name: OLD / name for name in ("knn", "linear", "log_regression")}
    folders |= {name: OLD / name / "val" for name in TASKS[1:]}
    table = compare_results(read_named_results([f"{name}={folder}" for name, folder in folders.items()]))
    page = write_report(OLD / "one", tmp_path / "report.html", results=[OLD]).read_text(encoding="utf-8")
    assert all(name in table and name in page for name in folders)
    best = read_best(OLD / "one" / "eval" / "best")
    assert (best and best.iteration, best and best.metric) == (3, "part_auroc")
    index = load_or_make_index(OLD, "image_index", ("n01", "n02"), lambda: pytest.fail("the kept index is not taken"))
    assert (index.classes, list(index.paths)) == (("n01", "n02"), ["n01/a.JPEG", "n02/b.JPEG"])
