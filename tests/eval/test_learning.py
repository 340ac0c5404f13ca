"""Whether a run learnt: what is said of courses that learnt, stood still, collapsed and overfitted, and of gaps."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from dinov2.eval.learning import BAD, GOOD, WARN, Learning, did_it_learn

Records = list[dict[str, Any]]

# Courses of ViT-Ti/32 on steel strip, batches of 16, 150 iterations: with the recipe of the magnetic tiles, and with a
# learning rate of 1e-9 and of a hundred times too much.
LEARNT = {
    "crop_match": (0.331, 0.412, 0.406, 0.456, 0.519, 0.456),
    "teacher_information_cls": (0.886, 0.864, 0.773, 0.822, 0.835, 0.814),
    "teacher_information_patch": (1.207, 1.102, 0.971, 1.031, 1.093, 1.124),
    "probe_cls_rank": (43.6, 18.3, 14.9, 15.0),
    "probe_patch_rank": (93.8, 54.6, 36.7, 34.6),
    "probe_cls_cosine": (0.281, 0.050, 0.055, 0.058),
    "probe_patch_cosine": (0.701, 0.786, 0.801, 0.800),
    "probe_patch_drift": (0.0, 0.126, 0.150, 0.151),
}
STILL = {
    "crop_match": (0.338, 0.363, 0.319, 0.369, 0.419, 0.369),
    "teacher_information_cls": (0.876, 0.867, 0.874, 0.891, 0.887, 0.866),
    "teacher_information_patch": (1.207, 1.126, 1.140, 1.168, 1.167, 1.091),
    "probe_cls_rank": (43.6, 43.5, 43.7, 43.7),
    "probe_patch_rank": (93.8, 93.8, 93.9, 93.9),
    "probe_cls_cosine": (0.281, 0.281, 0.281, 0.281),
    "probe_patch_cosine": (0.701, 0.701, 0.701, 0.701),
    "probe_patch_drift": (0.0, 0.0004, 0.0007, 0.0008),
}
COLLAPSED = {
    "crop_match": (0.294, 0.237, 0.219, 0.256, 0.325, 0.225),
    "teacher_information_cls": (0.672, 0.281, 0.004, 0.0, 0.0, 0.0),
    "teacher_information_patch": (0.926, 0.324, 0.526, 0.002, 0.002, 0.002),
    "probe_cls_rank": (43.6, 6.7, 3.1, 3.0),
    "probe_patch_rank": (93.8, 11.7, 5.9, 5.7),
    "probe_cls_cosine": (0.281, 0.784, 0.982, 0.982),
    "probe_patch_cosine": (0.701, 0.869, 0.967, 0.973),
    "probe_patch_drift": (0.0, 0.202, 0.267, 0.272),
}
BEATEN = {"random": {"score": 0.70, "gain": 0.20, "low": 0.12, "high": 0.27}}
COMPARISON = {
    "metric": "part_auroc", "variant": "k=10", "score": 0.90, "low": 0.84, "high": 0.95, "chance": 0.5, "count": 400,
    **BEATEN, "image_statistics": {"score": 0.80, "gain": 0.10, "low": 0.03, "high": 0.18},
}  # fmt: skip


def course(values: dict[str, Sequence[float | None]], scores: Sequence[float] = (), **compared: Any) -> Records:
    """Six reports and four evaluations of 150 iterations; with labels, the last is compared."""
    records: Records = []
    for number, iteration in enumerate((9, 29, 59, 89, 119, 149)):
        found = {name: column[number] for name, column in values.items() if not name.startswith("probe")}
        records.append({"iteration": iteration, "total_loss": 7.0 - iteration / 100, **found})
    for number, iteration in enumerate((-1, 49, 99, 149)):
        metrics: dict[str, Any] = {name: row[number] for name, row in values.items() if name.startswith("probe")}
        if scores and iteration > 0:
            metrics |= {f"knn_part_auroc_k{k}": scores[number - 1] for k in (10, 20)}
            metrics |= {"comparison": COMPARISON | compared} if compared and iteration == 149 else {}
        records.append({"iteration": iteration, "evaluation": metrics})
    return records


def answer(records: Records, **options: Any) -> Learning:
    found = did_it_learn(records, **{"batch_size": 16, "total_iterations": 150, **options})
    assert found is not None
    return found


def remarks(found: Learning) -> dict[str, str]:
    return {one.name: one.remark for one in found.findings}


@pytest.mark.parametrize(
    ("values", "words", "tone"),
    [
        (LEARNT, "The method worked: it does not look collapsed", GOOD),
        (STILL, "No: features are what they were at the start", BAD),
        (COLLAPSED, "No, it collapsed: class tokens and patches use hardly any directions; the targets of", BAD),
        (LEARNT | {"crop_match": (0.05,) * 6, "teacher_information_cls": (0.01,) * 6}, "In part at best: the", WARN),
        (
            LEARNT | {"teacher_information_cls": (0.01,) * 6, "teacher_information_patch": (0.05,) * 6},
            "No: the targets tell nothing about their images.",
            BAD,
        ),
    ],
)
def test_without_labels_the_course_itself_is_told(values: Any, words: str, tone: str) -> None:
    found = answer(course(values))
    assert found.answer.startswith(words)
    assert found.tone == tone
    assert [one.name for one in found.findings] == [
        "crops that find each other",
        "effective rank of class tokens",
        "effective rank of patches",
        "information of class tokens",
        "information of masked patches",
        "drift of patch similarities",
    ]
    assert "only labels can say" in found.answer or tone != GOOD


def test_each_number_has_a_word() -> None:
    found = answer(course(LEARNT))
    assert [(one.value, one.tone) for one in found.findings] == [
        ("0.456 (chance 0.062)", GOOD), ("15.0", GOOD), ("34.6", GOOD), ("0.814 nats", GOOD), ("1.124 nats", GOOD),
        ("0.151", GOOD),
    ]  # fmt: skip
    assert remarks(found)["crops that find each other"] == "above chance, up from 0.331 in the first report"
    assert remarks(found)["effective rank of patches"].startswith("down from 93.8, as usual; below 16.0 it would")
    assert remarks(answer(course(STILL)))["drift of patch similarities"] == "hardly changed: below 0.01"
    collapsed = remarks(answer(course(COLLAPSED)))
    assert collapsed["effective rank of class tokens"] == "collapsed: below 8.0, and it was 43.6"
    at_chance = remarks(answer(course(LEARNT | {"crop_match": (0.3, 0.2, 0.1, 0.08, 0.07, 0.07)})))
    assert at_chance["crops that find each other"] == "at chance: the class token tells no image from another"
    equal = LEARNT | {"probe_cls_cosine": (0.281, 0.9, 0.998, 0.9995)}
    assert remarks(answer(course(equal)))["effective rank of class tokens"].startswith("collapsed: nearly equal, mean")
    never_apart = STILL | {"probe_cls_cosine": (0.9999997, 0.9999998, 0.9999999, 1.0), "probe_cls_rank": (1.001,) * 4}
    one = remarks(answer(course(never_apart)))["effective rank of class tokens"]
    assert one == "one direction only, from 1.0 at the start: all look the same"
    text = str(found).splitlines()
    assert text[0].startswith("Did it learn? The method worked")
    assert text[1] == (
        "  crops that find each other      0.456 (chance 0.062)  above chance, up from 0.331 in the first report"
    )


def gain(gain: float, low: float, high: float) -> dict[str, float]:
    return {"score": 0.9 - gain, "gain": gain, "low": low, "high": high}


@pytest.mark.parametrize(
    ("compared", "words", "tone"),
    [
        ({"count": 400}, "Yes: k-NN is better than a random backbone of the same shape and than simple image", GOOD),
        (
            {"image_statistics": gain(-0.01, -0.05, 0.03)},
            "Hardly: k-NN is no better than simple image statistics.",
            WARN,
        ),
        ({"random": gain(0.02, -0.01, 0.05)}, "No sign of it: k-NN is no better than a random backbone", BAD),
        ({"random": {"score": 0.5, "gain": 0.4}}, "The method worked: it does not look collapsed", GOOD),
        ({"too_few": "3 beside the most frequent class"}, "The method worked: it does not look collapsed", GOOD),
        ({"start": gain(0.001, -0.01, 0.01)}, "No sign of it: k-NN is no better than the weights that it start", BAD),
    ],
)
def test_with_labels_what_has_to_be_beaten_decides(compared: Any, words: str, tone: str) -> None:
    """An interval that holds 0 beats nothing, whatever the gain; none, or one of too few parts, decides nothing."""
    found = answer(course(LEARNT, (0.8, 0.85, 0.9), **compared))
    assert found.answer.startswith(words)
    assert found.tone == tone
    lines = remarks(found)
    if "too_few" in compared:
        why = "too few parts to tell (3 beside the most frequent class)"
        assert f"Whether they are of use cannot be told, as there are {why}." in found.answer
        assert lines["against simple image statistics"].startswith(f"{why}: +0.100")
        assert lines["k-NN AUROC per part, k = 10"].startswith(f"chance is 0.500; {why}")
        return
    if "low" not in compared.get("random", {"low": 0}):
        assert "cannot be told, as there is no interval to tell by." in found.answer
        return
    assert lines["k-NN AUROC per part, k = 10"] == "above chance, 0.500; 95 % interval 0.840 to 0.950"
    if tone == GOOD:
        assert lines["against simple image statistics"] == "better: +0.100, 95 % interval +0.030 to +0.180"
    elif tone == WARN:
        assert lines["against simple image statistics"].startswith("no better: -0.010")


@pytest.mark.parametrize(
    ("compared", "options", "words", "tone"),
    [
        ([{}], {}, "Yes: linear classifier is better than a random backbone of the same shape and than simple", GOOD),
        ([{"random": gain(0.02, -0.01, 0.05)}], {}, "No sign of it: linear classifier is no better than a random", BAD),
        ([{}, {"evaluator": "k-NN", "random": gain(0, -1, 1)}], {}, "In part: linear classifier is better", WARN),
        ([{"untold": "too few parts to tell (3)"}], {}, "The method worked: it does not look collapsed", GOOD),
        ([{}], {"from_pretrained": True}, "Yes: linear classifier is better", WARN),
    ],
)
def test_evaluators_decide_where_the_run_had_no_labels(compared: Any, options: Any, words: str, tone: str) -> None:
    given = [COMPARISON | {"evaluator": "linear classifier"} | one for one in compared]
    found = answer(course(LEARNT), compared=given, **options)
    assert found.answer.startswith(words)
    assert found.tone == tone
    assert "only labels can say" not in found.answer
    assert ("weights that it started from was not measured" in found.answer) == bool(options)
    assert sum(one.name == "linear classifier AUROC per part, k = 10" for one in found.findings) == 1


def test_a_score_that_chance_explains_is_said_to_be_that() -> None:
    found = answer(course(LEARNT, (0.5, 0.5, 0.52), score=0.52, low=0.41, high=0.63, random=gain(0.0, -0.1, 0.1)))
    assert remarks(found)["k-NN AUROC per part, k = 10"].startswith("not distinguishable from chance, 0.500; 95 %")
    worse = answer(course(LEARNT, (0.5, 0.5, 0.52), image_statistics=gain(-0.2, -0.3, -0.1)))
    assert remarks(worse)["against simple image statistics"].startswith("worse: -0.200")


def test_overfitting_names_the_best_teacher() -> None:
    found = answer(course(LEARNT, (0.93, 0.86, 0.8), count=400))
    assert "It was better after iteration 49, whose teacher eval/best keeps." in found.answer
    assert found.tone == WARN
    assert remarks(found)["k-NN AUROC per part"] == "mean over all k; fallen from 0.930 after iteration 49"
    few = answer(course(LEARNT, (0.93, 0.86, 0.85), count=20))
    assert "fallen" not in remarks(few)["k-NN AUROC per part"], "twenty parts say nothing so exactly"


def test_weights_that_had_learnt_before_must_move_or_improve() -> None:
    """A run that stands still on released weights beats a random backbone, and has learnt nothing."""
    found = answer(course(STILL, (0.9, 0.9, 0.9), count=400), from_pretrained=True)
    assert found.answer.startswith("No: features are what they were at the start")


# Schedules of 300 iterations: those of the solar cells' former recipe, and what auto makes of them.
FORMER = {"momentum": (0.985, 0.986, 0.99, 0.994, 0.998, 0.999), "lr": (0.0008, 0.001, 0.0009, 0.0006, 0.0002, 1e-6)}
AUTO = {"momentum": (0.9, 0.91, 0.93, 0.96, 0.98, 0.993), "lr": (0.0003, 0.00035, 0.0003, 0.0002, 0.0001, 1e-6)}


@pytest.mark.parametrize(
    ("schedule", "options", "changes"),
    [
        (FORMER, {"patch_size": 32}, ["teacher.momentum_teacher=auto", "student.patch_size=16", "optim.base_lr=auto"]),
        (FORMER, {}, ["teacher.momentum_teacher=auto", "optim.base_lr=auto"]),
        (FORMER, {"patch_size": 16, "total_iterations": 125_000}, []),
        (AUTO, {"patch_size": 32}, ["student.patch_size=16"]),
        (AUTO, {"patch_size": 16}, []),
        (AUTO, {"patch_size": 16, "total_iterations": 40}, []),
        (FORMER, {"patch_size": 32, "from_pretrained": True}, []),
    ],
)
def test_a_recipe_that_hinders_is_named_with_what_to_change(schedule: Any, options: Any, changes: list[str]) -> None:
    records = course(STILL | schedule)
    for record in records:
        record["batch_size"] = 32
    found = answer(records, **{"total_iterations": 300, **options})
    _, _, advice = found.answer.partition(" To change: ")
    assert [change.partition(",")[0].split()[0] for change in advice.split("; ") if change] == changes
    assert len(found.findings) == 6 + len(changes)
    learnt = answer(course(LEARNT | schedule, (0.5, 0.6, 0.9), **COMPARISON), **{"total_iterations": 150, **options})
    assert learnt.tone == GOOD or options.get("from_pretrained")
    assert "To change" not in learnt.answer, "what labels say is good has no need of it"


def test_a_run_that_stopped_early_is_not_condemned() -> None:
    early = [record for record in course(STILL) if record["iteration"] < 50]
    found = answer(early, total_iterations=1000)
    assert found.answer.startswith("After 50 of 1000 iterations: It is too early to tell. No: features are what")
    assert found.tone == WARN
    collapsed = [record for record in course(COLLAPSED) if record["iteration"] < 100]
    assert answer(collapsed, total_iterations=1000).answer.startswith("After 100 of 1000 iterations: No, it collapsed")


def test_runs_of_before_gaps_and_broken_values_are_read() -> None:
    old = course(LEARNT, (0.8, 0.85, 0.9))
    found = answer(old)
    assert remarks(found)["what k-NN has to beat"] == "was not measured at the last evaluation"
    assert found.answer.startswith("The method worked")
    assert "what k-NN has to beat was not measured" in found.answer
    assert did_it_learn([]) is None
    assert did_it_learn([{"note": "x"}, {"iteration": None, "crop_match": 0.5}]) is None
    assert did_it_learn([{"iteration": 3, "total_loss": None}]) is None
    broken = course(LEARNT)
    for record in broken[:3]:
        record |= {"crop_match": None, "teacher_information_cls": float("nan"), "teacher_information_patch": True}
    broken[-1]["evaluation"] |= {"probe_cls_rank": None, "probe_patch_drift": float("nan")}
    assert answer(broken).tone == GOOD
    shuffled = sorted(course(LEARNT), key=lambda record: json.dumps(record, sort_keys=True))
    assert answer(shuffled) == answer(course(LEARNT))
    without = did_it_learn(course(LEARNT))
    assert without is not None
    assert remarks(without)["crops that find each other"] == "0.331 in the first report; chance is not known"
    only_reports = answer([record for record in course(LEARNT) if "evaluation" not in record])
    assert "Nothing measured says so" in only_reports.answer or only_reports.tone == WARN
    hostile = course(LEARNT, (0.8, 0.8, 0.8), random="<script>", image_statistics=None, count="many")
    assert answer(hostile).findings[0].name == "k-NN AUROC per part"
