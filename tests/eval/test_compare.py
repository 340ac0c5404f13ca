"""k-NN results side by side."""

from pathlib import Path

import pytest

from dinov2.eval.compare import compare_knn, read_named_results
from dinov2.eval.knn import RESULTS_FILE
from dinov2.eval.metrics import ClassificationMetrics
from dinov2.eval.results import KnnResults, KnnScores


def results(part_count: int) -> KnnResults:
    image = ClassificationMetrics(count=4, accuracy=0.75, balanced_accuracy=0.5, auroc=None, top5=None)
    part = ClassificationMetrics(count=part_count, accuracy=1.0, balanced_accuracy=1.0, auroc=0.25, top5=None)
    return KnnResults(
        scores=(KnnScores(k=10, image=image, part=part),),
        temperature=0.07,
        classes=("good", "bad"),
        num_train_images=8,
        num_train_parts=4,
    )


def test_a_row_per_backbone_with_parts_where_they_differ() -> None:
    lines = compare_knn({"random": results(2), "mine": results(2)}).split("\n")
    assert lines[0].split("  ")[0] == "backbone"
    assert lines[1].split() == ["random", "10", "0.750", "0.500", "-", "1.000", "1.000", "0.250"]
    assert lines[2].split()[0] == "mine"


def test_parts_of_one_photo_are_not_shown_twice() -> None:
    assert compare_knn({"random": results(4)}).split("\n")[1].split() == ["random", "10", "0.750", "0.500", "-"]


def test_results_are_read_from_their_folders(tmp_path: Path) -> None:
    (tmp_path / RESULTS_FILE).write_text(results(2).to_json())
    assert read_named_results([f"a={tmp_path}"]) == {"a": results(2)}


def test_wrong_words_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected name=folder, found 'x'"):
        read_named_results(["x"])
    with pytest.raises(FileNotFoundError, match=RESULTS_FILE):
        read_named_results([f"a={tmp_path}"])
    (tmp_path / RESULTS_FILE).write_text("{}")
    with pytest.raises(ValueError, match="is not a result"):
        read_named_results([f"a={tmp_path}"])
