"""Commands of the evaluators: options, the set-up that they share, what each writes, and their doors."""

import json
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_stand_ins import TINY, dataset_flags, dataset_string, make_parts, read_csv
from test_retrieval_revisited import make_benchmark

from dinov2.config import load_config, render_config
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain
from dinov2.eval import knn, linear, log_regression
from dinov2.eval.command import EvaluatorOptions, build_frozen_backbone, dataset_fingerprint, evaluator_session
from dinov2.eval.log_regression_model import load_log_regression
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval import evaluation as retrieval
from dinov2.predict.model import load_model
from dinov2.utils.files import LostFolderError

MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "knn": knn.main,
    "linear": linear.main,
    "log_regression": log_regression.main,
    "retrieval": retrieval.main,
}
QUICK = {
    "knn": [],
    "linear": ["--epochs=2", "--epoch-length=10", "--num-resamples=10", "--batch-size=8"],
    "log_regression": [],
    "retrieval": ["--num-resamples=20"],
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("sets") / "parts: line 4")


def run(evaluator: str, out: Path, *words: str) -> EvaluationResults:
    assert MAINS[evaluator]([*TINY, "--num-workers=0", *QUICK[evaluator], *words, "--output-dir", str(out)]) == 0
    return EvaluationResults.from_dict(json.loads((out / "results.json").read_text()))


def log_of(out: Path) -> str:
    return (out / "log" / "log.txt").read_text()


# What all commands share


@pytest.mark.parametrize(
    ("evaluator", "words", "message"),
    [
        ("knn", ["--part-top-k=0"], "must be at least 1"),
        ("knn", ["--features=best"], "evaluation.features"),
        ("knn", ["--image-size=30"], "evaluation.image_size=30 is not divisible by student.patch_size=14"),
        ("knn", ["--temperature=0"], "evaluation.temperature .*must be greater than 0"),
        ("knn", ["--nb_knn", "0"], "evaluation.nb_knn .*must be at least 1"),
        ("knn", ["--n-per-class-list", "0"], "numbers from 1 up, or -1"),
        ("knn", ["--pretrained-weights=nowhere.pth"], r"nowhere\.pth"),
        ("linear", ["--epochs=0"], "epochs must be at least 1"),
        ("linear", ["--learning-rates", "-0.1"], "learning rates must be one or more positive numbers"),
        ("linear", ["--n-last-blocks", "13"], "cannot take the last 13 blocks of a model of 12"),
        ("linear", ["--test-class-mapping-fpaths", "none"], "1 class mappings were given for 0 test sets"),
        ("linear", ["--val-class-mapping-fpath", "nowhere.npy"], "no class mapping at nowhere.npy"),
        ("linear", ["--classifier-fpath", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        ("log_regression", ["--cs", "0"], "cs must be one or more finite numbers above 0"),
        ("log_regression", ["--hold-out-fraction=1"], "hold_out_fraction must be between 0 and 1"),
        ("log_regression", ["--n-per-class-list", "0"], "n_per_class_list"),
        ("log_regression", ["--test-datasets", "Nothing:root=x"], "Nothing"),
        ("retrieval", ["--train-dataset=", "--gallery=train+val"], "needs --train-dataset"),
        ("retrieval", ["--ks", "0"], "ks must be"),
        ("retrieval", ["--scales", "0"], "scales must be"),
        ("retrieval", ["--features=gem", "--gem-power=-1"], "must be above 0"),
        ("retrieval", ["--whitening=VAL", "--whitening-dim=1000"], "16 images give 1 to 15"),
        ("retrieval", ["--revisited", "nowhere"], "nowhere holds neither"),
    ],
)
def test_bad_options(parts: Path, tmp_path: Path, evaluator: str, words: list[str], message: str) -> None:
    words = [word.replace("=VAL", f"={dataset_string(parts, 'val')}") for word in words]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MAINS[evaluator]([*TINY, *dataset_flags(parts), "--output-dir", str(tmp_path), *words])


@pytest.mark.parametrize("evaluator", MAINS)
def test_datasets_are_needed(evaluator: str, tmp_path: Path) -> None:
    named = "--val-dataset" if evaluator == "retrieval" else "--train-dataset and --val-dataset"
    with pytest.raises(ValueError, match=f"needs {named}"):
        MAINS[evaluator]([*TINY, "--output-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("evaluator", "flags"),
    [
        ("knn", "--nb-knn --temperature --gather-on-cpu --n-per-class-list --n-tries --leave-one-part-out"),
        ("linear", "--test-datasets --val-class-mapping-fpath --epoch-length --no-augment"),
        ("log_regression", "--test-datasets --n-per-class-list --hold-out-fraction --cs"),
        ("retrieval", "--revisited --whitening --scales --gallery"),
    ],
)
def test_doors_show_help_with_an_example(
    evaluator: str,
    flags: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{evaluator}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(repository / "eval" / f"{evaluator}.py"), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in (*flags.split(), "--config-file", "--pretrained-weights", "_ and - mean the same", "example:"):
        assert text in shown


def test_wrong_choices(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--features", "max"], ["--gallery", "train"], ["--whitening-kind", "zca"]):
        with pytest.raises(SystemExit) as stop:
            retrieval.main(words)
        assert stop.value.code == 2
        assert "invalid choice" in capsys.readouterr().err


def options_of(root: Path, output_dir: Path) -> EvaluatorOptions:
    train, val = (dataset_string(root, split) for split in ("train", "val"))
    return EvaluatorOptions(overrides=TINY, output_dir=str(output_dir), train_dataset=train, val_dataset=val)


def test_a_session_has_sets_backbone_and_settings(parts: Path, tmp_path: Path) -> None:
    options = replace(options_of(parts, tmp_path / "out"), image_size=56, whole_image=True, autocast="bf16", seed=7)
    with evaluator_session(options) as setup:
        assert setup.backbone(setup.train_dataset[0][0][None]).shape == (1, setup.backbone.embed_dim)
        assert setup.val_dataset[0][0].shape == (3, 56, 56)
        assert not any(parameter.requires_grad for parameter in setup.backbone.parameters())
        assert not setup.backbone.training
        assert (setup.batch_size, setup.autocast_dtype, setup.weights) == (64, torch.bfloat16, "")
        train, val = (dataset_string(parts, split) for split in ("train", "val"))
        assert setup.settings == {
            "arch": "vit_tiny",
            "patch_size": 14,
            "image_size": [56, 56],
            "whole_image": True,
            "autocast": "bf16",
            "seed": 7,
            "train_dataset": train,
            "val_dataset": val,
        }
    assert "the backbone is random (seed 7)" in (tmp_path / "out" / "log" / "log.txt").read_text()


def test_sets_that_are_the_same_or_missing(parts: Path, tmp_path: Path) -> None:
    both = options_of(parts, tmp_path)
    with evaluator_session(replace(both, val_dataset=both.train_dataset)) as setup:
        assert setup.train_dataset is setup.val_dataset
    with evaluator_session(both) as setup:
        assert both.val_dataset
        setup.open_tests([both.val_dataset])
    assert "all 16 images of test that were looked at are in val too, such as" in log_of(tmp_path)
    for train, message in ((both.train_dataset, "needs --val-dataset"), (None, "needs --train-dataset or --val-")):
        session = evaluator_session(replace(both, train_dataset=train, val_dataset=None), any_of_them=train is None)
        with pytest.raises(ValueError, match=message), session:
            pass
    with evaluator_session(replace(both, train_dataset=None), any_of_them=True) as setup:
        assert len(setup.val_dataset) == 16
        with pytest.raises(ValueError, match="--train-dataset is needed"):
            _ = setup.train_dataset


CONFIG = load_config(None, [*TINY, "student.num_register_tokens=2"])


def test_saved_weights_come_back_frozen_and_whole(tmp_path: Path) -> None:
    source = build_frozen_backbone(CONFIG, "", "cpu", seed=3)
    weights = source.state_dict()
    for absent in ((), ("mask_token",)):  # which evaluation does not need
        teacher = {f"backbone.{name}": value for name, value in weights.items() if name not in absent}
        torch.save({"teacher": teacher}, tmp_path / "t.pth")
        loaded = build_frozen_backbone(CONFIG, str(tmp_path / "t.pth"), "cpu")
        images = torch.rand(2, 3, 28, 28)
        assert torch.equal(loaded(images), source(images))
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    del weights["register_tokens"]
    torch.save(weights, tmp_path / "no_registers.pth")
    with pytest.raises(ValueError, match=r"no_registers.pth .* options that fit it: student.num_register_tokens=0\."):
        build_frozen_backbone(CONFIG, str(tmp_path / "no_registers.pth"), "cpu")


def test_without_a_config_the_weights_say_what_they_are(parts: Path, tmp_path: Path) -> None:
    source = build_frozen_backbone(CONFIG, "", "cpu", seed=3)
    state = {"teacher": source.state_dict()}
    flags = replace(options_of(parts, tmp_path / "out"), overrides=("train.device=cpu",))
    for name, content, size in (
        ("own", state | {"config": render_config(CONFIG)}, (28, 28)),
        ("bare", state["teacher"], (28, 28)),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        with evaluator_session(replace(flags, pretrained_weights=str(tmp_path / f"{name}.pth"))) as setup:
            assert (setup.config.student.arch, setup.config.student.num_register_tokens) == (CONFIG.student.arch, 2)
            images = setup.val_dataset[0][0][None]
            assert images.shape[-2:] == size
            torch.testing.assert_close(setup.backbone(images), source(images))
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"head\.pth does not say which backbone it holds.*--config") as caught:
        evaluator_session(replace(flags, pretrained_weights=str(tmp_path / "head.pth"))).__enter__()
    assert len(str(caught.value)) < 500


def test_images_go_through_the_steps_of_training_unless_others_are_named(parts: Path, tmp_path: Path) -> None:
    source, chain = build_frozen_backbone(CONFIG, "", "cpu", seed=3), Chain.parse([{"gamma": {"gamma": 0.5}}])
    other = Chain.parse(["median"])
    content = {"teacher": source.state_dict(), "config": render_config(CONFIG), "preprocessing": chain.to_values()}
    torch.save(content, tmp_path / "teacher.pth")
    (tmp_path / "other.yaml").write_text("preprocessing: [median]\n", encoding="utf-8")
    flags = replace(
        options_of(parts, tmp_path / "out"),
        overrides=("train.device=cpu",),
        pretrained_weights=str(tmp_path / "teacher.pth"),
    )
    plain = make_dataset(dataset_str=dataset_string(parts, "val")).get_image(0)
    for options, expected in ((flags, chain), (replace(flags, preprocessing=tmp_path / "other.yaml"), other)):
        with evaluator_session(options) as setup:
            assert {setup.preprocessing, *(one.preprocessing for one in setup.datasets.values())} == {expected}
            assert setup.settings["preprocessing"] == expected.to_values()
            image = setup.val_dataset.get_image(0)
            np.testing.assert_array_equal(np.asarray(image), expected(np.array(plain)).stacked)
            tests = setup.open_tests([dataset_string(parts, "test")])
            assert tests["test"].preprocessing == expected
            assert dataset_fingerprint(setup.val_dataset)["preprocessing"] == expected.to_values()
        assert ("takes the place of the preprocessing" in log_of(tmp_path / "out")) == (expected is other)
    model = load_model(tmp_path / "teacher.pth")
    assert model.preprocessing == chain
    without = replace(model, preprocessing=Chain())
    np.testing.assert_array_equal(model.embed(np.array(plain)), without.embed(chain(np.array(plain)).stacked))


def test_random_weights_follow_the_seed_alone(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn = []
    for _ in range(2):
        torch.randn(3)
        with evaluator_session(options_of(parts, tmp_path)) as setup:
            drawn.append((setup.backbone.patch_embed.proj.weight.clone(), torch.randn(2)))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    before = torch.get_rng_state()
    first, again, other = (build_frozen_backbone(CONFIG, "", "cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.blocks[0].attn.qkv.weight, again.blocks[0].attn.qkv.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert "the backbone is random" in caplog.text


# Each command


def test_knn_writes_results_predictions_and_log(parts: Path, tmp_path: Path) -> None:
    results = run("knn", tmp_path, *dataset_flags(parts), "--nb_knn", "3", "50")
    assert list(results.scores) == ["k=3", "k=16"]
    assert results.classes == ("good", "defect")
    assert (results.datasets["train"]["num_images"], results.datasets["train"]["num_parts"]) == (16, 8)
    scores = results.scores[results.chosen]
    assert scores.image.metrics["accuracy"].value == 1.0
    assert scores.part.metrics["auroc"].value == scores.part.metrics["auroc"].low == 1.0
    assert (scores.image.count, scores.part.count) == (16, 8)
    assert results.settings["image_size"] == [28, 28]
    assert results.settings["temperature"] == 0.07
    log = log_of(tmp_path)
    assert "the backbone is random" in log
    assert "k=3*" in log
    rows = read_csv((tmp_path / "predictions.csv").read_text())
    assert [row["image"] for row in rows] == [str(parts / "val" / f"{photo}.png") for photo in range(16)]
    assert all(row["label"] == row["prediction"] for row in rows)


def test_config_file_and_flags_of_knn_agree(parts: Path, tmp_path: Path) -> None:
    config, train = tmp_path / "model.yaml", dataset_string(parts, "train")
    config.write_text(
        "student: {arch: vit_tiny, patch_size: 14, layerscale: 1.0}\n"
        "crops: {global_crops_size: 28, local_crops_size: 14}\n"
        "train: {device: cpu}\n"
        f"evaluation: {{nb_knn: [4], temperature: 0.1, train_dataset_path: '{train}', val_dataset_path: 'no'}}\n"
    )
    flags = [*TINY, *dataset_flags(parts), "--temperature=0.1", "--nb_knn", "4"]
    written = []
    for name, argv in (("file", ["--config-file", str(config), dataset_flags(parts)[1]]), ("flags", flags)):
        knn.main([*argv, "--output-dir", str(tmp_path / name), "--num-workers=0"])
        written.append((tmp_path / name / "results.json").read_text())
    assert written[0] == written[1]
    assert json.loads(written[0])["settings"]["temperature"] == 0.1


def test_one_set_is_enough_when_parts_are_left_out(parts: Path, tmp_path: Path) -> None:
    words = [dataset_flags(parts)[1], "--nb_knn", "1", "16"]
    results = run("knn", tmp_path / "one", *words, "--leave-one-part-out")
    assert list(results.scores) == ["k=1", "k=14"]
    assert results.settings["leave_one_part_out"] is True
    assert "optimistic" in results.settings["chosen_by"]
    assert results.datasets["train"] == results.datasets["val"]
    assert results.scores["k=1"].part.metrics["accuracy"].value == 1.0
    with pytest.raises(ValueError, match="needs --train-dataset"):
        run("knn", tmp_path / "two", *words)


def test_few_shot_flags_of_knn(parts: Path, tmp_path: Path) -> None:
    flags = ["--n-per-class-list", "2", "-1", "--n-tries", "3", "--gather-on-cpu"]
    results = run("knn", tmp_path, *dataset_flags(parts), *flags)
    assert list(results.scores) == ["k=10", "k=16", "n=2 k=2"]
    assert "mean ± std [min, max] over tries" in log_of(tmp_path)
    assert len(results.extra["few_shot"]["n=2 k=2"]["part"]["auroc"]["values"]) == 3


def test_linear_writes_results_and_a_head_that_can_be_evaluated(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    test = dataset_string(parts, "test")
    results = run("linear", out, *dataset_flags(parts), "--test-datasets", test)
    on_test = results.scores[f"{results.chosen} on test"]
    assert len(results.scores) == 53
    assert on_test.part.count == 8
    assert on_test.image.metrics["accuracy"].value == 1.0
    assert results.settings["test_datasets"] == {"test": test}
    assert (results.settings["global_batch_size"], results.settings["augment"]) == (8, False)
    assert torch.load(out / "linear_head.pth", weights_only=True)["classes"] == ["good", "defect"]
    assert "chosen by auroc on the validation set itself" in log_of(out)

    chosen_on_test = [f"--train-dataset={dataset_string(parts, 'train')}", f"--val-dataset={test}"]
    run("linear", tmp_path / "used up", *chosen_on_test)
    assert "--val-dataset names the split TEST, and the best classifier is chosen on it" in log_of(tmp_path / "used up")
    assert "names the split TEST" not in log_of(out)

    evaluated = tmp_path / "evaluated"
    head = ["--classifier-fpath", str(out / "linear_head.pth")]
    two = ["--test-datasets", test, dataset_string(parts, "train")]
    again = run("linear", evaluated, *dataset_flags(parts), *two, *head)
    assert "--train-dataset has no effect with --classifier-fpath" in log_of(evaluated)
    assert list(again.scores) == [again.chosen, f"{again.chosen} on test 1", f"{again.chosen} on test 2"]
    assert again.scores[again.chosen] == results.scores[results.chosen]
    assert (evaluated / "predictions_test_2.csv").exists()


def test_published_augmentation_and_upstreams_flags(parts: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "swap.npy", np.array([1, 0]))
    flags = ["--augment", "--val-metric-type=mean_per_class_accuracy", "--learning_rates", "0.05", "0.1"]
    flags += ["--eval-period-iterations=5", "--class-weighting=balanced", "--no-resume", "--features=cls"]
    flags += ["--test-datasets", dataset_string(parts, "test"), dataset_string(parts, "test")]
    flags += ["--test-class-mapping-fpaths", "none", str(tmp_path / "swap.npy")]
    results = run("linear", tmp_path / "out", *dataset_flags(parts), *flags)
    assert len(results.scores) == 10
    assert (results.settings["augment"], results.settings["val_metric"]) == (True, "balanced_accuracy")
    plain, swapped = (
        results.scores[f"{results.chosen} on test {number}"].image.metrics["accuracy"].value for number in (1, 2)
    )
    assert plain + swapped == pytest.approx(1.0), "the second set's classes mean the opposite"
    assert len((tmp_path / "out" / "linear_metrics.jsonl").read_text().splitlines()) == 4
    assert "--features has no effect" in log_of(tmp_path / "out")


def test_log_regression_writes_results_predictions_model_and_log(parts: Path, tmp_path: Path) -> None:
    train, val = (dataset_string(parts, split) for split in ("train", "val"))
    flags = "--cs 0.001 0.1 10 --metric-type=log_loss --max_train_iters=200 --n-per-class-list -1 2 --n_tries=2"
    flags += " --hold-out-repeats=2 --class-weighting=balanced --features=patch_mean"
    results = run("log_regression", tmp_path, *dataset_flags(parts), "--test-datasets", val, train, *flags.split())
    chosen = results.chosen
    assert list(results.scores) == [
        *(f"{variant}{evaluated}" for variant in (chosen, "n=2") for evaluated in ("", " on test 1", " on test 2"))
    ]
    assert results.scores[chosen].image.metrics["accuracy"].value == 1.0
    assert results.scores[chosen].part.metrics["auroc"].value == 1.0
    settings = results.settings
    assert (settings["cs"], settings["metric"], settings["max_iter"]) == ([0.001, 0.1, 10.0], "log_loss", 200)
    assert (settings["n_tries"], settings["hold_out_repeats"]) == (2, 2)
    assert settings["chosen_by"] == "log_loss on held-out parts of the training set, 2 times"
    assert (settings["features"], settings["image_size"]) == ("patch_mean", [28, 28])
    assert settings["test_datasets"] == {"test 1": val, "test 2": train}
    assert load_log_regression(tmp_path / "log_regression.npz").classes == ("good", "defect")
    for name, split in (("predictions", "val"), ("predictions_test_1", "val"), ("predictions_test_2", "train")):
        rows = read_csv((tmp_path / f"{name}.csv").read_text())
        assert [row["image"] for row in rows] == [str(parts / split / f"{photo}.png") for photo in range(16)]
        assert all(row["label"] == row["prediction"] for row in rows)
    log = log_of(tmp_path)
    assert f"{chosen}*" in log
    assert "mean ± std [min, max] over tries" in log


def test_defaults_of_the_command_of_log_regression_are_those_of_the_library(parts: Path, tmp_path: Path) -> None:
    results = run("log_regression", tmp_path, *dataset_flags(parts), "--num-resamples=0")
    assert len(results.settings["cs"]) == 45
    assert results.settings["metric"] == ""
    assert results.extra["choice_of_c"]["metric"] == "auroc"
    assert results.extra["choice_of_c"]["repeats"] == 5
    assert list(results.datasets) == ["train", "val"]


def test_retrieval_of_parts(parts: Path, tmp_path: Path) -> None:
    results = run("retrieval", tmp_path, "--val-dataset", dataset_string(parts, "val"), "--ks", "1", "3")
    figures = results.scores["parts"].image.metrics
    assert list(figures) == ["map", "mp@1", "mp@3", "recall@1", "recall@3", "hit@1", "hit@3"]
    assert figures["map"].low is not None
    assert figures["map"].value > 0.5  # by chance about 0.2
    assert (results.extra["num_queries"], results.extra["num_skipped_queries"]) == ({"parts": 16}, {"parts": 0})
    assert results.settings["features"] == "cls"
    assert results.settings["image_size"] == [28, 28]
    assert results.weights == {"path": "", "random": True}
    assert len(read_csv((tmp_path / "predictions.csv").read_text())) == 16
    log = log_of(tmp_path)
    assert results.table().splitlines()[-1] in log
    assert "without effect" not in log


def test_reidentification_needs_neither_labels_nor_parts(parts: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for number, path in enumerate(sorted((parts).rglob("*.png"))[:8]):
        (root / f"{number}.png").write_bytes(path.read_bytes())
    words = ["--val-dataset", f"ImageFolder:root={root}", "--reidentification"]
    results = run("retrieval", tmp_path, *words, "--features", "cls_patch_statistics")
    assert results.scores["reidentification"].image.count == 8
    assert {row["variant"] for row in read_csv((tmp_path / "predictions.csv").read_text())} == {"reidentification"}


def test_all_options_of_retrieval_of_parts(parts: Path, tmp_path: Path) -> None:
    results = run(
        "retrieval",
        tmp_path,
        *dataset_flags(parts),
        *("--gallery", "train+val", "--features", "gem", "--gem-power", "2", "--scales", "1", "0.7071", "1.4142"),
        *("--whitening", dataset_string(parts, "train"), "--whitening-kind", "learned", "--whitening-dim", "5"),
    )
    assert results.extra["num_gallery"] == {"parts": 32}
    assert results.settings["features"] == "gem"
    assert results.settings["gem_power"] == 2.0
    assert results.settings["scales"] == [1.0, 0.7071, 1.4142]
    assert (results.settings["whitening"], results.settings["whitening_dim"]) == ("learned", 5)
    assert results.settings["whitening_dataset"] == dataset_string(parts, "train")
    log = log_of(tmp_path)
    assert "the set of the whitening" not in log, "its images are in the gallery only, as is usual"
    assert "without effect" not in log


def test_retrieval_on_a_revisited_benchmark(parts: Path, tmp_path: Path) -> None:
    benchmark = str(make_benchmark(tmp_path / "roxford5k"))
    words = ["--revisited", benchmark, "--longer-side", "42", "--whitening", dataset_string(parts, "train")]
    results = run(
        "retrieval", tmp_path, *words, "--features", "patch_mean", "--gallery", "train+val", "--image-size", "56"
    )
    assert list(results.scores) == ["easy", "medium", "hard"]
    assert results.settings["benchmark"] == "roxford5k"
    assert results.settings["longer_side"] == 42
    assert "image_size" not in results.settings
    assert list(results.datasets) == ["queries", "gallery", "whitening"]
    log = log_of(tmp_path)
    assert "without effect here: --gallery, --image-size" in log


def test_options_without_effect_on_retrieval_are_named(parts: Path, tmp_path: Path) -> None:
    words = [*dataset_flags(parts), "--gem-power", "2"]
    run("retrieval", tmp_path, *words, "--whitening-dim", "3", "--part-aggregation", "mean", "--longer-side", "500")
    log = log_of(tmp_path)
    expected = "--part-aggregation, --gem-power, --whitening-dim, --longer-side, --train-dataset"
    assert f"without effect here: {expected}" in log


@pytest.mark.parametrize(("name", "evaluator"), [("knn", knn), ("log_regression", log_regression)])
def test_results_are_not_written_where_another_folder_has_come_to_lie(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, evaluator: Any
) -> None:
    """A lost disk leaves an empty folder: the table is printed, and the command fails."""
    out = tmp_path / "out"

    def lose(*_: object) -> dict[str, Any]:
        out.rename(tmp_path / "moved")
        out.mkdir()
        return {"datasets": {}, "weights": {}, "revision": ""}

    monkeypatch.setattr(evaluator, "find_origins", lose)
    with pytest.raises(LostFolderError, match="out was moved or replaced, or its disk is gone"):
        run(name, out, *dataset_flags(parts), "--num-resamples=0")
    assert not list(out.iterdir())
    assert not (tmp_path / "moved" / "results.json").exists()
