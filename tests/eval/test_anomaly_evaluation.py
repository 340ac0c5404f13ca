"""The evaluator of anomaly detection: which parts teach, what is written, the memory file, the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from eval_stand_ins import tiny_transformer

from dinov2.data.datasets import GroupedJSON
from dinov2.data.preprocessing import Chain
from dinov2.eval.anomaly import eval_anomaly
from dinov2.eval.anomaly.evaluation import MEMORY_FILE, AnomalySettings, find_good_parts, main
from dinov2.eval.anomaly.memory import PatchMemory
from dinov2.eval.features import make_eval_transform
from dinov2.eval.results import PREDICTIONS_FILE, RESULTS_FILE, compare_results, read_named_results
from tests.anomaly_plates import draw_plates


def make_set(root: Path) -> Path:
    """Of eight plates in ``train`` one is defective, of six in ``val`` three."""
    return draw_plates(root, {"train": (8, 1), "val": (6, 3)})


def test_evaluation_of_a_drawn_set(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    train, val = (
        GroupedJSON(root=root, split=split, transform=make_eval_transform((28, 42), whole_image=True))
        for split in ("TRAIN", "VAL")
    )
    settings = AnomalySettings(num_resamples=30, calibration_share=0.75, rotations=2, smoothing=1.0)
    out = tmp_path / "out"
    model = tiny_transformer()
    results = eval_anomaly(
        model, train, val, settings, num_workers=0, output_dir=out, random_backbone=tiny_transformer()
    )
    assert results.extra["defective_images_left_out"] == results.extra["good_images_of_other_parts_left_out"] == 1
    assert (results.extra["images_in_memory"], results.extra["images_for_thresholds"]) == (4, 10)
    memory = PatchMemory.load(out / MEMORY_FILE)
    assert memory.num_patches == 4 * 2 * 6
    assert memory.thresholds == results.extra["thresholds"]
    assert memory.operating_point("part").num_good == 5
    found, statistics = results.scores["memory"], results.yardsticks["patch statistics"]
    assert found.image.count == 12
    assert found.part.metrics["auroc"].value == statistics.part.metrics["auroc"].value == 1.0
    assert statistics.image.metrics["pixel_aupro_0.3"].value > 0.5
    assert {one.yardstick for one in results.comparisons} == {"chance", "patch statistics", "random backbone"}
    assert results.yardsticks["random backbone"].image.metrics == found.image.metrics, (
        "the same weights, the same scores"
    )
    written = read_named_results([f"mine={out}"])
    assert written["mine"].as_dict() == json.loads((out / RESULTS_FILE).read_text())
    shown = compare_results(written, yardsticks=True)
    assert "image aupro at 0.3" in shown
    assert "part aupro" not in shown
    lines = (out / PREDICTIONS_FILE).read_text().splitlines()
    assert lines[0] == "image,part,label,prediction,score"
    assert len(lines) == 13
    grown = eval_anomaly(model, train, val, settings, memory=memory, num_workers=0, image_statistics=False)
    assert grown.extra["num_patches"] == 2 * memory.num_patches
    assert grown.extra["num_centres"] == len(memory.centres), "the same parts add nothing"
    with pytest.raises(ValueError, match="made with something else"):
        eval_anomaly(tiny_transformer(), *(train, val), AnomalySettings(blocks=(1,)), memory=memory, num_workers=0)
    with pytest.raises(ValueError, match="foreground=pca, and the memory of good parts was built with none"):
        eval_anomaly(model, train, val, replace(settings, foreground="pca"), memory=memory, num_workers=0)


def test_what_lies_outside_of_a_region_of_interest_does_not_count(tmp_path: Path) -> None:
    """A defect outside of it is seen, as pixels stay as they are, and makes no image anomalous."""
    root = make_set(tmp_path / "set")
    region = {"polygon": [[0, 30], [64, 30], [64, 48], [0, 48]], "blacken": False}  # below the defects
    scores = []
    for chain in (Chain(), Chain.parse([{"region_of_interest": region}])):
        sets = [GroupedJSON(root=root, split=split, transform=make_eval_transform((28, 42), whole_image=True))
                for split in ("TRAIN", "VAL")]  # fmt: skip
        for dataset in sets:
            dataset.preprocessing = chain
        settings = AnomalySettings(num_resamples=10, calibration_share=0.75, smoothing=1.0)
        results = eval_anomaly(tiny_transformer(), *sets, settings, num_workers=0, image_statistics=False)
        scores.append(results.predictions.scores[results.predictions.labels == 1])
    assert (scores[1] < 0.95 * scores[0]).all()


def test_parts_that_teach(tmp_path: Path) -> None:
    dataset = GroupedJSON(root=make_set(tmp_path), split="TRAIN")
    good = find_good_parts(dataset, 0, 0.2, seed=0)
    assert good.calibration == [], "one part sets no threshold"
    assert good.memory == list(range(2, 16))
    with pytest.raises(ValueError, match="no good part"):
        find_good_parts(dataset, 2, 0.2, seed=0)


@pytest.mark.parametrize(("name", "wrong"), [("coreset", 0.0), ("rotations", 0), ("calibration_share", 1.0)])
def test_settings_out_of_range(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=name):
        AnomalySettings(**{name: wrong})


def test_the_command_looks_at_whole_images() -> None:
    with pytest.raises(ValueError, match="whole image"):
        main(["--no-whole-image"])
