"""The report of a run: what it says, that it is safe and self-contained, and what it does with incomplete folders."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest
from PIL import Image
from report_stand_ins import (
    BAD,
    DONE,
    GOOD,
    HOSTILE_IMAGE,
    HOSTILE_WARNING,
    make_images,
    make_results,
    make_retrieval,
    make_run,
)

from dinov2.config import render_config
from dinov2.eval.metrics.classification import MetricValue, Scores
from dinov2.eval.report import write_report
from dinov2.eval.report.mistakes import EmbeddedImage, ImageShelf, view_mistakes
from dinov2.eval.report.page import main
from dinov2.eval.report.results import find_results, weights_name
from dinov2.eval.results import Comparison, summarise_tries
from dinov2.tasks import load_task_config

# Paths, scores and labels of eight images.
EIGHT = [f"{number}.png" for number in range(8)], [0.1, 0.2, 0.9, 0.4, 0.6, 0.2, 0.8, 0.7], [0, 0, 1, 1] * 2
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Tags, addresses and text of a page; checks that every tag is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.pieces).split())  # what a reader gets, with single spaces

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    def section(self, start: str, end: str) -> str:
        return self.text.partition(start)[2].partition(end)[0]

    def images(self) -> list[Image.Image]:
        addresses = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        return [Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) for address in addresses]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, which tests leave as it is."""
    return make_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    """Its report, with a picture of a hostile name."""
    return Page(write_report(whole, whole.parent / "page.html", pictures=[whole.parent / "images" / HOSTILE_IMAGE]))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def test_a_run_is_told_whole(page: Page) -> None:
    text = page.text
    assert "run <u>7" in text
    assert f"Stopped, or still running: {DONE} of 50 iterations are recorded." in text
    assert "eval/training_39/teacher.pth: part auroc 0.875 after iteration 39" in text
    assert "images GroupedJSON:split=TRAIN:root=/data/<parts> & more" in text
    assert "plots/patch_pca.png" in text
    assert "plots/losses.png" not in text  # the page draws that by itself
    assert "1 of 20 values not finite, first at iteration 11" in text
    for question in ("Did anything look wrong?", "How good are the features?", "Which mistakes are the worst?"):
        assert question in text
    assert page.tags.count("h1") == 1


def test_charts_are_drawings_in_the_page(page: Page) -> None:
    drawings = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)">(.*?)</svg>', page.source, re.DOTALL)
    assert {"k-NN AUROC per part", "total loss", "learning rate"} <= {label for label, _ in drawings}
    for _, drawing in drawings:
        minidom.parseString(f'<svg xmlns:xlink="x">{drawing}</svg>')
    assert "last layer 0" in page.section("learning rate", "teacher momentum")
    assert "k = 10 0.805 k = 20 0.815 k = 100 0.895" in page.text


def test_nothing_is_loaded_and_nothing_runs(page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "form", "base", "b", "u", "i"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.images()
    ids = [value for _, name, value in page.attributes if name == "id"]
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            assert value.startswith("data:") or (tag in ("a", "use") and value[0] == "#" and value[1:] in ids), value
    assert "url(" not in page.source
    assert "@import" not in page.source
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", "content", policy) in page.attributes
    # The names are there, as text.
    for name in (GOOD, BAD, HOSTILE_IMAGE, HOSTILE_WARNING, "part 0 <i>"):
        assert " ".join(name.split()) in page.text


def test_changed_options_come_first_with_their_defaults(page: Page) -> None:
    table = page.section("options differ from their defaults.", "All options")
    assert re.search(r"5 of \d+ options differ from their defaults", page.text)
    named = re.findall(r"(?:student|optim|train|data|crops|teacher|evaluation)\.\w+", table)
    assert named == [
        "train.dataset_path",
        "train.OFFICIAL_EPOCH_LENGTH",
        "student.arch",
        "optim.epochs",
        "optim.warmup_epochs",
    ]
    assert "optim.epochs 5 100" in table
    assert "optim.base_lr" in page.text.partition("All options")[2]


def test_warnings_are_counted_and_alike_ones_shown_once(page: Page) -> None:
    told = page.section("Did anything look wrong?", "How good")
    assert "Warnings and errors in the logs: 6." in told
    assert "3 times from 2026-01-02 10:00:10 to 2026-01-02 10:00:12" in told
    assert told.count("is unreadable") == 2  # the first and the last of them
    assert "image 2 is unreadable (2.5 %)" in told
    assert "with a second line" in told
    assert "ValueError: boom" in told
    assert "iteration 40/50" not in told
    # What matters most stands first: alarms and errors before plain warnings.
    places = [told.index(words) for words in ("COLLAPSE", "the command failed", "image 0 is unreadable")]
    assert places == sorted(places)


def test_results_stand_with_their_intervals_and_where_they_come_from(whole: Path, tmp_path: Path) -> None:
    results = make_results(*EIGHT, evaluator="linear")
    results.write(tmp_path / "other" / "deep")
    make_retrieval(EIGHT[0], [1, 2] * 4).write(tmp_path / "other" / "retrieval")
    page = Page(write_report(whole, tmp_path / "r.html", results=[tmp_path / "other"]))
    table = page.section("How good are the features?", "What do these metrics mean?")
    assert [table.count(name) for name in ("k-NN", "linear classifier")] == [2, 1]
    assert table.index("eval/training_19") < table.index("eval/training_39") < table.index("other/deep")
    auroc = results.scores["k=10"].part.metrics["auroc"]
    assert f"{auroc.value:.3f} {auroc.low:.3f} to {auroc.high:.3f}" in table
    details = page.text.partition("What do these metrics mean?")[2]
    assert details.count("All metrics:") == 3  # not of the teacher that a later one replaced
    assert "chosen by leaving one part out" in details
    assert "ab" * 32 in details
    assert "0123456789abcdef" in details
    # Results of another kind have a table of their own.
    classified, _, ranked = table.partition("mAP")
    assert table.count("method weights evaluated on") == 2
    assert "AUROC" in classified
    assert "AUROC" not in ranked
    assert "precision of the nearest precision of the nearest 5" in ranked


def test_further_sets_and_results_without_a_choice_stand_too(tmp_path: Path) -> None:
    variants = ("lr=0.1", "lr=0.2", "lr=0.1 on other lot")
    make_results(*EIGHT, evaluator="linear", variants=variants).write(tmp_path / "run" / "linear")
    level = {"count": 6, "figures": {"map": {"value": 0.625}, "mp@1": {"value": 0.5, "low": 0.25, "high": 0.75}}}
    values = make_results(*EIGHT).as_dict()
    values |= {"evaluator": "retrieval", "chosen": "", "classes": []}
    values["scores"] = {name: {"image": level, "part": level} for name in ("easy", "hard")}
    (tmp_path / "run" / "retrieval").mkdir()
    (tmp_path / "run" / "retrieval" / "results.json").write_text(json.dumps(values))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    page = Page(write_report(tmp_path / "run"))
    table = page.section("How good are the features?", "What do these metrics mean?")
    rows = re.findall(r"(linear classifier|retrieval) (lr=\S+(?: on other lot)?|easy|hard) ", table)
    assert rows == [
        ("linear classifier", "lr=0.1"),
        ("linear classifier", "lr=0.1 on other lot"),
        ("retrieval", "easy"),
        ("retrieval", "hard"),
    ]
    assert "6 images 0.625 0.500 0.250 to 0.750" in table  # without columns of other evaluators
    assert "lr=0.2" in page.text  # among all variants
    meanings = page.section("What do these metrics mean?", "All metrics:")
    assert "mAP how far in front" in meanings
    assert "top 5" not in meanings, "of six classes, which nobody has here"


def test_a_metric_without_an_interval_says_none(tmp_path: Path) -> None:
    make_results(list("abcd"), [0.1, 0.2, 0.9, 0.4], [0, 0, 1, 1], num_resamples=0).write(tmp_path)
    table = Page(write_report(tmp_path)).section("How good are the features?", "What do these")
    assert not re.search(r"\d to \d", table)
    assert re.search(r"2 parts 1\.000 1\.000 1\.000 0\.000", table)


def test_the_worst_mistakes_come_first(tmp_path: Path) -> None:
    """Two parts of two images are missed in part, one good image raises an alarm, one image is gone."""
    paths = make_images(tmp_path / "images", 8)
    # Parts:  0 good        1 bad       2 good      3 bad
    positive = [0.9, 0.3, 0.02, 0.7, 0.1, 0.2, 0.4, 0.0004]
    make_results(paths, positive, [0, 0, 1, 1, 0, 0, 1, 1]).write(tmp_path)
    paths[2].unlink()
    paths[6].write_bytes(b"no image")
    page = Page(write_report(tmp_path))
    missed, _, alarms = page.section("Which mistakes are the worst?", "How did training go?").partition(
        "a false alarm?"
    )
    names = re.findall(r"image_\d\d\.png", missed)
    assert list(dict.fromkeys(names)) == ["image_07.png", "image_02.png", "image_06.png"]
    for words in (
        "were missed? 3",
        f"probability of {BAD}: below 0.1 %",
        "0 of 1 other image of this part classified rightly",
        "1 of 1 other image of this part classified rightly",  # image 3 found what image 2 did not
        "Not shown: the file is no longer there.",
        "Not shown: the file cannot be read",
    ):
        assert words in missed
    assert alarms.split()[0] == "1"
    assert f"{BAD}: 90 %" in alarms
    assert HOSTILE_IMAGE in alarms
    images = page.images()
    for image in images:
        image.load()
    assert [(image.format, image.size) for image in images] == [("JPEG", (256, 192))] * 2
    few = Page(write_report(tmp_path, num_mistakes=1))
    assert "were missed? 3" in few.text
    assert "The first 1 are shown." in few.text
    assert "image_02.png" not in few.text


def test_mistakes_are_shown_with_the_values_that_were_evaluated(tmp_path: Path) -> None:
    """Twelve bits in files of 16 look black otherwise."""
    paths = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((30, 40), 2048, dtype=np.uint16)).save(path)
        paths.append(path)
    found = make_results(paths, [0.9, 0.1, 0.2, 0.8], [0, 0, 1, 1])
    counts = {**found.datasets["val"], "value_range": [0.0, 4095.0]}
    damaged = {"val": {**counts, "value_range": ["x"]}}
    for datasets, level in (({"train": counts, "val": counts}, 128), (found.datasets, 8), (damaged, 8)):
        replace(found, datasets=datasets).write(tmp_path)
        (one,), _ = find_results(tmp_path, [])
        shelf = ImageShelf(10**6)
        (view,) = view_mistakes(one, shelf, 4)
        address = view.groups[0].mistakes[0].image.address
        with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
            assert abs(np.asarray(image.convert("L")).mean() - level) <= 2


def test_several_classes_are_mixed_up(tmp_path: Path) -> None:
    values = make_results(["a.png", "b.png", "c.png"], [0.1, 0.2, 0.3], [0, 0, 1]).as_dict()
    (tmp_path / "results.json").write_text(json.dumps(values | {"classes": ["x", "y", "z"]}))
    (tmp_path / "predictions.csv").write_text(
        "image,part,label,prediction,score\na.png,1,x,y,0.5\nb.png,2,x,z,0.9\nc.png,3,y,y,0.99\nd.png,4,,z,0.99\n"
    )
    text = Page(write_report(tmp_path)).text
    assert "Which images were taken for something else? 2" in text
    assert text.index("x, but called z with probability 90 %") < text.index("x, but called y with probability 50 %")
    assert "3 labelled images" in text


RANKING = "image,part,variant,score,first_hit,best_wrong_image\n"


@pytest.mark.parametrize(
    ("evaluator", "content", "said"),
    [
        ("knn", "image,part,label\na,b,c\n", "lacks the columns prediction, score"),
        ("knn", "image,part,label,prediction,score\na,b,c,d,high\n", "line 2: the score 'high' is no number"),
        ("knn", "image,part,label,prediction,score\na,b\n", "line 2: the line ends too early"),
        ("knn", "", "lacks the columns image"),
        ("retrieval", "image,part,score\n", "lacks the columns variant, first_hit, best_wrong_image"),
        ("retrieval", f"{RANKING}a,a,parts,0.5,first,b\n", "line 2: the first_hit 'first' is no number"),
    ],
)
def test_damaged_predictions_are_said_so(tmp_path: Path, evaluator: str, content: str, said: str) -> None:
    make_results(["a.png", "b.png"], [0.1, 0.9], [0, 1], evaluator=evaluator).write(tmp_path)
    (tmp_path / "predictions.csv").write_text(content)
    assert said in Page(write_report(tmp_path)).text


def test_the_page_stays_small(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "images", 3)
    first = ImageShelf(10**9).thumbnail(paths[0])
    shelf = ImageShelf(2 * len(first.address) + 10)
    found = [shelf.thumbnail(path) for path in (paths[0], paths[0], paths[1])]
    assert [bool(image.address) for image in found] == [True, True, False]
    assert "too large" in found[2].problem
    assert sum(len(image.address) for image in found) <= shelf.max_bytes
    wide = tmp_path / "wide.png"
    Image.new("RGB", (4000, 1000)).save(wide)
    assert (first.width, first.height) == (256, 192)
    drawn = ImageShelf(10**9).picture(wide)
    assert (drawn.width, drawn.height) == (1800, 450)
    assert shelf.thumbnail(tmp_path / "none.png") == EmbeddedImage(problem="the file is no longer there")


def test_incomplete_folders_give_what_they_have(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole / "config.yaml", tmp_path)
    text = Page(write_report(tmp_path)).text
    assert "No training is recorded in this folder." in text
    assert "There is no metrics.jsonl in the folder" in text
    assert "No results of evaluators were found." in text
    assert "No pictures were found." in text
    assert "No logs were found" in text

    (tmp_path / "config.yaml").unlink()
    metrics = Path(shutil.copy(whole / "metrics.jsonl", tmp_path))
    text = Page(write_report(tmp_path)).text
    assert f"{DONE} iterations are recorded; how many were planned is not known." in text
    assert "There is no config.yaml in the folder." in text

    metrics.write_text("")
    assert "metrics.jsonl holds no numbers yet." in Page(write_report(tmp_path)).text
    metrics.write_text('{"iteration": 1, "total_loss": 2.0}\nnot json\n{"iteration": 2')
    assert "1 damaged line(s) of metrics.jsonl are left out of the curves." in Page(write_report(tmp_path)).text


def test_files_of_other_versions_are_shown_as_far_as_possible(run: Path) -> None:
    (run / "config.yaml").write_text("train:\n  an_old_option: <b>3</b>\n")
    (run / "eval" / "training_19" / "results.json").write_text('{"evaluator": "knn", "scores": []}')
    (run / "eval" / "best" / "best.json").write_text("[" * 100_000)
    page = Page(write_report(run))
    assert "The file could not be understood by this version: unknown option train.an_old_option" in page.text
    assert "an_old_option: <b>3</b>" in page.text
    assert "eval/training_19 cannot be read" in page.text
    assert "eval/training_39" in page.text
    assert "best.json is damaged (RecursionError)" in page.text


def test_what_may_not_be_read_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("dinov2.eval.report.page.load_config", refuse)
    (run / "log" / "log.txt").unlink()
    (run / "log" / "log.txt").mkdir()
    text = Page(write_report(run)).text
    assert re.search("could not be understood by this version: .*Permission denied: .*config.yaml", text)
    assert "log.txt cannot be read: Is a directory" in text


def test_a_finished_run_with_names_that_are_no_text(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 49, "total_loss": 2.0, "batch_size": 32}\n')
    with (run / "log" / "log.txt").open("ab") as file:
        file.write(b"2026-01-02 11:00:00,001 WARNING data.py:9 bytes \xff\x00\x1b[31m\n")
    (run / "plots" / "odd\udcff.png").write_bytes((run / "plots" / "patch_pca.png").read_bytes())
    page = Page(write_report(run))
    assert "plots/odd\\udcff.png" in page.text
    assert not {"\x00", "\x1b"} & set(page.source)
    assert "Finished: all 50 iterations are done." in page.text


def test_what_is_no_run_is_an_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        write_report(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is not the folder of a run: it holds none of config\.yaml, metrics\.jsonl"):
        write_report(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        write_report(run, results=[tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"there is no picture or folder .*none\.png"):
        write_report(run, pictures=[tmp_path / "none.png"])
    with pytest.raises(ValueError, match="num_mistakes must be at least 0, found -1"):
        write_report(run, num_mistakes=-1)
    assert not (run / "report.html").exists()


def test_the_command_names_the_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    output = tmp_path / "new" / "page.html"
    assert main([str(run), "--output", str(output), "--num-mistakes", "0", "--pictures", str(run / "plots")]) == 0
    assert "The first 0 are shown" not in Page(output).text
    assert "plots/losses.png" in Page(output).text  # named by hand


def test_the_worst_rankings_stand_beside_what_was_taken_for_them(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "images", 6)
    make_retrieval(paths, [2, 1, 7, 3, 1, 2]).write(tmp_path / "run")
    page = Page(write_report(tmp_path / "run", num_mistakes=2))
    told = page.section("Which mistakes are the worst?", "How did training go?")
    assert "6 rankings, " in told
    assert "To which images does one of another part come nearest? 4" in told
    worst, second = told.index("has rank 7; average precision 0.143"), told.index("has rank 3; average precision 0.333")
    assert worst < told.index("right: " + str(paths[4])) < second < told.index("right: " + str(paths[5]))
    assert "has rank 2" not in told
    assert "The first 2 are shown." in told
    assert len(page.images()) == 4
    assert BAD not in told  # labels decide nothing in a retrieval
    make_retrieval(["a.jpg", "b.jpg", "c.jpg"], [1, 4, 1], ("easy", "hard")).write(tmp_path / "run")
    told = Page(write_report(tmp_path / "run")).text
    for protocol in ("easy", "hard"):
        assert f"To which images does one that does not show the same ({protocol}) come nearest? 1" in told


def test_few_shot_tries_are_a_table(tmp_path: Path) -> None:
    whole = make_results(*EIGHT)
    tries = summarise_tries([whole.scores["k=10"], whole.scores["k=10"]])
    tries["part"]["auroc"] = {"mean": 0.625, "std": 0.125, "values": [0.5, 0.75]}
    del tries["image"]["auroc"]
    long = {"candidates": list(range(500))}
    replace(whole, extra={"few_shot": {"n=2 k=2": tries}, "choice": long}).write(tmp_path / "run")
    page = Page(write_report(tmp_path / "run"))
    text = page.text
    per_image, _, per_part = page.section("with few labels?", "computed").partition("with few labels?")
    assert per_image.startswith(" (per image)")
    assert per_part.startswith(" (per part)")
    assert "0.625 ± 0.125 0.500 to 0.750" in per_part
    assert "AUROC" not in per_image
    assert '"mean"' not in text  # as JSON, nobody can read it
    assert "… (the rest is in results.json)" in text
    assert json.dumps(long)[:390] in text
    assert json.dumps(long)[:410] not in text


def test_names_of_weights() -> None:
    teacher = "outputs/run/eval/training_39/teacher_checkpoint.pth"
    assert weights_name({"path": teacher}) == "teacher of training_39"
    assert weights_name({"path": "/models/dinov2_vits14_pretrain.pth"}) == "models/dinov2_vits14_pretrain"
    assert weights_name({"path": "", "random": True}) == "random weights"
    assert weights_name({}) == "weights not named"


def test_whether_it_learnt_comes_first_as_in_the_log(page: Page, run: Path) -> None:
    text = page.text
    places = [text.index(words) for words in ("Did it learn?", "warnings in the logs", "What was this run?")]
    assert places == sorted(places)
    assert "Report of a pretraining run" in text
    told = page.section("Did it learn?", "warnings in the logs")
    assert "After 40 of 50 iterations: " in told
    assert "effective rank of class tokens 20.2 not collapsed; 25.2 at the start" in told
    assert "what k-NN has to beat - was not measured at the last evaluation" in told
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    better = {"score": 0.5, "gain": 0.3, "low": 0.1, "high": 0.5}
    records[-1]["evaluation"]["comparison"] = {
        "metric": "part_auroc", "variant": "k=20", "score": 0.8, "low": 0.7, "high": 0.9, "chance": 0.5, "count": 90,
        "random": better, "image_statistics": better,
    }  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    compared = Page(write_report(run))
    assert "Yes: k-NN is better than a random backbone of the same shape and than simple image" in compared.text
    assert ("section", "class", "answer good") in compared.attributes
    chart = compared.section("k-NN AUROC per part", "Did the losses behave?")
    assert "chance 0.5 random backbone 0.5 image statistics 0.5" in chart


def test_it_is_judged_by_results_of_its_own_teachers(run: Path, tmp_path: Path) -> None:
    """Of a teacher that a later one replaced, or of other weights, results say nothing about what came out."""

    def write(name: str, weights: str, low: float) -> None:
        beside = [
            Comparison(
                variant="k=10", yardstick=yardstick, level="part", metric="auroc", value=0.9, reference=reference,
                low=low, high=0.6, verdict="better" if low > 0 else "not distinguishable",
            )
            for yardstick, reference in (("chance", 0.5), ("image statistics", 0.7), ("random backbone", 0.6))
        ]  # fmt: skip
        results = make_results(*EIGHT, evaluator="linear", weights=weights)
        replace(results, comparisons=beside).write(tmp_path / name)

    def told(*names: str) -> str:
        page = Page(write_report(run, results=[tmp_path / name for name in names]))
        return page.section("Did it learn?", "warnings in the logs")

    write("moved", f"/elsewhere/{run.name}/eval/training_39/teacher_checkpoint.pth", 0.1)
    write("former", str(run / "eval" / "training_19" / "teacher_checkpoint.pth"), -0.1)
    write("foreign", "outputs/run/teacher_checkpoint.pth", -0.1)
    better = (
        "Yes: linear classifier is better than a random backbone of the same shape and than simple image statistics."
    )
    assert better in told("moved/results.json")
    assert better in told("moved", "former", "foreign")
    assert "linear classifier AUROC per part, k = 10, teacher of training_39 0.900" in told("moved")
    assert "No sign of it: linear classifier is no better than a random backbone" in told("former")
    assert "linear classifier" not in told("foreign")


def make_fine_tuning(folder: Path, *pairs: str, num_classes: int = 2) -> Path:
    """A run of a segmentation head with many metrics and names that would break a careless page."""
    folder.mkdir()
    config = load_task_config(None, ["task=segmentation", "data.train_dataset_path=VOC:root=/<b>&", *pairs])
    (folder / "config.yaml").write_text(render_config(config))
    records: list[dict[str, object]] = [{"iteration": n, "total_loss": 3.0 - n / 10, "lr": 1e-3} for n in range(10)]
    for step in (4, 9):
        ious = {f"iou/{BAD} {number}": number / num_classes for number in range(num_classes)}
        records.append({"iteration": step, "evaluation": {"loss": 2.0 - step / 10, "miou": 0.4901, **ious}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_fine_tuning_run_is_told_as_one(tmp_path: Path) -> None:
    run = make_fine_tuning(tmp_path / "run", num_classes=200)
    page = Page(write_report(run))
    assert "Report of a fine-tuning run: segmentation" in page.text
    assert "Did it learn?" not in page.text
    assert "10 steps are recorded, and the best weights are not scored yet." in page.text
    assert "could not be understood" not in page.text
    assert "images to learn from VOC:root=/<b>&" in page.text
    assert "optim.lr" in page.section("With which options", "Written")
    scores = page.section("Did it get better on val?", "Did the losses behave?")
    assert "The 12 of 200 with the lowest last value." in scores
    assert scores.count("<script>") == 12
    losses = page.section("loss on train and val", "How were")
    assert "train 2.1 val 1.1" in losses

    results = make_results(*EIGHT, evaluator="finetune segmentation")
    replace(results, extra={"warnings": ["NOTHING FOUND: <i>no pixel</i> is called defect"]}).write(run / "val")
    page = Page(write_report(run))
    assert "Finished: the best weights of 10 steps are scored on val." in page.text
    assert page.text.index("NOTHING FOUND: <i>no pixel</i>") < page.text.index("warnings in the logs")
    assert "How good is it?" in page.text
    assert "teacher" not in page.section("Did the losses behave?", "With which options")

    # Charts are drawn by the page; what shows images is there, and of the epochs the last one.
    for name in (
        "plots/iou.png",
        "plots/val_worst_cases.png",
        "valid_preds/epoch_0001.png",
        "valid_preds/epoch_0002.png",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40)).save(run / name)
    shown = Page(write_report(run)).section("What does it look like?", "With which options")
    assert shown.split() == ["plots/val_worst_cases.png", "valid_preds/epoch_0002.png"]


def test_an_unscored_run_repeats_what_its_last_epoch_said(tmp_path: Path) -> None:
    run = make_fine_tuning(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 12, "evaluation": {"miou": 0.4}, "warnings": ["NOTHING FOUND: x"]}) + "\n")
    assert "NOTHING FOUND: x" in Page(write_report(run)).text.partition("warnings in the logs")[0]


def test_an_evaluation_is_told_as_one(tmp_path: Path) -> None:
    beside = Comparison(
        variant="k=10", yardstick="image statistics <i>", level="part", metric="auroc", value=0.75, reference=0.875,
        low=-0.25, high=0.0625, verdict="not distinguishable",
    )  # fmt: skip
    results = make_results(*EIGHT, evaluator="log_regression")
    replace(results, comparisons=[beside], notes=("only one class <b>",)).write(tmp_path / "run")
    page = Page(write_report(tmp_path / "run"))
    assert "Report of an evaluation: logistic regression" in page.text
    assert "Results of an evaluator; nothing was trained here." in page.text
    beaten = page.section("What does it have to beat?", "All metrics:")
    assert "k=10 not distinguishable from image statistics <i> AUROC per part 0.750 0.875 -0.250 to +0.062" in beaten
    assert "only one class <b>" in beaten
    for words in ("How did training go?", "With which options", "Did it learn?"):
        assert words not in page.text


@pytest.mark.parametrize(
    "text",
    [
        "task: [segmentation]",
        "task: &a x\nb: *a",
        "- 1",
        "task: '<script>alert(1)</script>'\n1: {2: 3}",
        "task: x\ndata: " + "[" * 3000,
    ],
    ids=["list", "alias", "sequence", "hostile", "deep"],
)
def test_configs_of_any_kind_and_broken_records_make_a_page(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    lines = [
        {"iteration": 3, "total_loss": None, "crop_match": "x"},
        {"iteration": 900000, "total_loss": "inf", "evaluation": None},
        {"iteration": 7, "evaluation": {"comparison": {"metric": 3, "random": {"score": "y"}}}},
        {"iteration": 8, "evaluation": {"knn_part_auroc_k10": None, "comparison": [1]}},
        {"iteration": True, "timing": {"memory_gib": [1]}},
        {"warnings": "COLLAPSE", "iteration": 9, "teacher_temp": 0.04},
        {"iteration": 10**20, "total_loss": 1e308, "crop_match": float("-inf")},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = make_results(*EIGHT)
    for name, value in (("string", "NaN"), ("list", [1])):
        metrics = {"auroc": MetricValue(value=value)}
        level = replace(results.scores["k=10"].part, metrics=metrics)
        replace(results, scores={"k=10": Scores(image=level, part=level)}).write(tmp_path / name)
    page = Page(write_report(tmp_path))
    assert page.text.count("ValueError: auroc is ") == 2
    assert "script" not in page.tags
    assert "Report of a" in page.text
