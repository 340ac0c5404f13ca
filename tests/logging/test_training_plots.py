"""Which numbers of a run stand in which chart, and the files."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from dinov2.logging import training_plots
from dinov2.logging.plots import Chart
from dinov2.logging.training_plots import ChartGroup, chart_groups, plot_training

LOSSES = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss")


def write(path: Path, records: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_records() -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for iteration in range(9, 200, 10):
        rest = {"lr": 1e-4, "last_layer_lr": 0.0, "weight_decay": 0.04, "batch_size": 64}
        timing = {"images_per_second": 150.0, "data_wait_fraction": 0.03, "memory_gib": 3.1}
        records.append({"iteration": iteration, **dict.fromkeys(LOSSES, 9 / iteration), **rest, "timing": timing})
    for iteration in (0, 100):
        scores = {f"knn_{who}_auroc_k{k}": 0.9 - k / 1000 for who in ("image", "part") for k in (10, 20)}
        records.append({"iteration": iteration, "evaluation": scores})
    return records


def test_a_run_is_drawn_into_pictures_of_readable_size(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", run_records())
    written = plot_training(path, tmp_path)
    assert [path.name for path in written] == ["knn.png", "losses.png", "schedules.png", "throughput.png"]
    assert {path.parent for path in written} == {tmp_path / "plots"}
    sizes = []
    for picture in written:
        with Image.open(picture) as image:
            sizes.append(image.size)
    # Two charts of scores, four losses in two rows, a chart for both learning rates.
    assert sizes == [(1104, 384), (1656, 708), (1104, 384), (1656, 384)]
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in plot_training(path, tmp_path)] == first
    assert len(list((tmp_path / "plots").iterdir())) == 4


@pytest.mark.parametrize(
    ("options", "chance"),
    [("train: {batch_size_per_gpu: 16}", [("chance", 1 / 16)]), ("task: depth", []), (None, [])],
)
def test_pictures_have_the_chance_line_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str | None, chance: list[tuple[str, float]]
) -> None:
    path = write(tmp_path / "metrics.jsonl", [{"iteration": place, "crop_match": 0.5} for place in (1, 2)])
    if options is not None:
        (tmp_path / "config.yaml").write_text(options)
    drawn: list[Chart] = []
    monkeypatch.setattr(training_plots, "draw_charts", lambda charts, heading: drawn.extend(charts))
    monkeypatch.setattr(training_plots, "save_png", lambda figure, path: path)
    plot_training(path, tmp_path)
    assert [list(chart.lines) for chart in drawn] == [chance]


def test_only_what_was_recorded_is_drawn(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl", [{"iteration": 0, "total_loss": None}, {"iteration": 1, "warnings": ["x"]}]
    )
    assert [path.name for path in plot_training(path, tmp_path)] == ["losses.png"]
    write(path, [{"note": "empty"}])
    with pytest.raises(ValueError, match=r"no training or evaluation record to draw \(1 records\)"):
        plot_training(path, tmp_path)
    with pytest.raises(FileNotFoundError, match="no metrics file at"):
        plot_training(tmp_path / "missing.jsonl", tmp_path)


def named(groups: list[ChartGroup]) -> dict[str, dict[str, list[str]]]:
    """Names of curves, by group and chart."""
    return {
        group.name: {chart.title: [curve.name for curve in chart.curves] for chart in group.charts} for group in groups
    }


def test_every_number_is_drawn_in_its_group() -> None:
    records = [
        {
            "iteration": 1,
            "koleo_loss": 0.5,
            "lr": 0.1,
            "last_layer_lr": 0.0,
            "batch_size": 8,
            "grad_norm_backbone": 1.5,
            "prototypes_used_cls": 0.4,
            "prototypes_used_patch": 0.3,
            "something_new": 3,
            "warnings": ["COLLAPSE"],
            "flag": True,
            "timing": {"memory_gib": 2.0, "eta_seconds": 9.0},
            "extra": {"inner": 1.0},
        },
        {"iteration": -1, "evaluation": {"probe_cls_rank": 9.0, "probe_patch_rank": 8.0}},
        {"iteration": 2, "evaluation": {"knn_part_auroc_k100": 0.8, "knn_part_auroc_k20": 0.7}},
        {"no": "iteration", "total_loss": 5.0},
    ]
    assert named(chart_groups(records)) == {
        "knn": {"k-NN AUROC per part": ["k = 20", "k = 100"]},
        "losses": {"KoLeo loss": ["last value"]},
        "monitors": {
            "gradient norm before clipping": ["backbone"],
            "share of prototypes in use": ["class token", "patches"],
            "something new": ["last value"],
            "inner": ["last value"],
            "effective rank of the features, in directions": ["class token", "patches"],
        },
        "schedules": {"learning rate": ["all but the last layer", "last layer"]},
        "throughput": {"memory in GiB": ["last value"]},
    }
    assert list(named(chart_groups(records))) == ["knn", "losses", "monitors", "schedules", "throughput"]
    assert chart_groups([]) == []


def test_records_in_any_order_make_one_curve_with_the_warnings_marked() -> None:
    records: list[dict[str, object]] = [{"iteration": place, "kl_cls": float(place)} for place in (30, 10, 20)]
    records[1] |= {"warnings": ["COLLAPSE: …"]}
    (group,) = chart_groups(records)
    (curve,) = group.charts[0].curves
    assert curve.x.tolist() == curve.y.tolist() == [10, 20, 30]
    assert curve.last == "30"
    assert group.charts[0].marks == [10]
