"""What the report says of single results: rankings, few-shot tries, names of weights, long values."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from report_stand_ins import BAD, make_photos, make_results, make_retrieval
from test_report import Page

from dinov2.eval.report import write_report
from dinov2.eval.report.results import weights_name
from dinov2.eval.results import summarise_tries


def section(page: Page, start: str, end: str) -> str:
    return page.text.partition(start)[2].partition(end)[0]


def test_the_worst_rankings_stand_beside_what_was_taken_for_them(tmp_path: Path) -> None:
    paths = make_photos(tmp_path / "photos", 6)
    make_retrieval(paths, [2, 1, 7, 3, 1, 2]).write(tmp_path / "run")
    page = Page(write_report(tmp_path / "run", num_mistakes=2))
    told = section(page, "Which mistakes are the worst?", "How did training go?")
    assert "6 rankings, " in told
    assert "To which photos does one of another part come nearest? 4" in told
    worst, second = told.index("has rank 7; average precision 0.143"), told.index("has rank 3; average precision 0.333")
    assert worst < told.index("right: " + str(paths[4])) < second < told.index("right: " + str(paths[5]))
    assert "has rank 2" not in told
    assert "The first 2 are shown." in told
    assert len(page.images()) == 4


def test_rankings_of_a_benchmark_are_shown_by_protocol(tmp_path: Path) -> None:
    make_retrieval(["a.jpg", "b.jpg", "c.jpg"], [1, 4, 1], ("easy", "hard")).write(tmp_path / "run")
    told = Page(write_report(tmp_path / "run")).text
    for protocol in ("easy", "hard"):
        assert f"To which photos does one that does not show the same ({protocol}) come nearest? 1" in told


def test_results_of_another_kind_have_a_table_of_their_own(tmp_path: Path) -> None:
    paths = [f"{number}.png" for number in range(8)]
    make_results(paths, [0.1, 0.2, 0.9, 0.7] * 2, [0, 0, 1, 1] * 2).write(tmp_path / "run" / "knn")
    make_retrieval(paths, [1, 2] * 4).write(tmp_path / "run" / "retrieval")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    table = section(Page(write_report(tmp_path / "run")), "How good are the features?", "What do these figures mean?")
    classified, _, ranked = table.partition("mAP")
    assert table.count("method weights judged on") == 2
    assert "AUROC" in classified
    assert "AUROC" not in ranked
    assert "precision of the nearest precision of the nearest 5" in ranked


def test_few_shot_tries_are_a_table(tmp_path: Path) -> None:
    paths = [f"{number}.png" for number in range(8)]
    whole = make_results(paths, [0.1, 0.2, 0.9, 0.4, 0.6, 0.2, 0.8, 0.7], [0, 0, 1, 1] * 2)
    tries = summarise_tries([whole.scores["k=10"], whole.scores["k=10"]])
    tries["part"]["auroc"] = {"mean": 0.625, "std": 0.125, "values": [0.5, 0.75]}
    del tries["image"]["auroc"]
    long = {"candidates": list(range(500))}
    replace(whole, extra={"few_shot": {"n=2 k=2": tries}, "choice": long}).write(tmp_path / "run")
    text = Page(write_report(tmp_path / "run")).text
    per_photo, _, per_part = section(Page(tmp_path / "run" / "report.html"), "with few labels?", "computed").partition(
        "with few labels?"
    )
    assert per_photo.startswith(" (per photo)")
    assert per_part.startswith(" (per part)")
    assert "0.625 ± 0.125 0.500 to 0.750" in per_part
    assert "AUROC" not in per_photo
    assert '"mean"' not in text  # as JSON, nobody can read it
    assert "… (the rest is in results.json)" in text
    assert json.dumps(long)[:390] in text
    assert json.dumps(long)[:410] not in text


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ({"path": "outputs/run/eval/training_39/teacher_checkpoint.pth"}, "teacher of training_39"),
        ({"path": "/models/dinov2_vits14_pretrain.pth"}, "models/dinov2_vits14_pretrain"),
        ({"path": "", "random": True}, "random weights"),
        ({}, "weights not named"),
    ],
)
def test_names_of_weights(weights: dict[str, object], name: str) -> None:
    assert weights_name(weights) == name


def test_damaged_rankings_are_said_so(tmp_path: Path) -> None:
    make_retrieval(["a.jpg", "b.jpg"], [1, 2]).write(tmp_path / "run")
    path = tmp_path / "run" / "predictions.csv"
    path.write_text(path.read_text().replace("0.500000", "half"))
    text = Page(write_report(tmp_path / "run")).text
    assert "line 3: the score 'half' is no number" in text
    path.write_text("image,part,label,score\n")
    assert "lacks the columns variant, first_hit, best_wrong_image" in Page(write_report(tmp_path / "run")).text
    assert BAD not in text  # labels decide nothing in a retrieval
