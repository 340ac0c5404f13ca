"""Options and set-up that all evaluators share."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from eval_command_sets import TINY, dataset_strings, make_parts

from dinov2.config.command_line import option, parse
from dinov2.eval.command import EvaluatorOptions, evaluator_session, flag_pairs


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return make_parts(tmp_path / "parts: line 4")


def options_of(root: Path, output_dir: Path) -> EvaluatorOptions:
    train, val = dataset_strings(root)
    return EvaluatorOptions(overrides=TINY, output_dir=str(output_dir), train_dataset=train, val_dataset=val)


def test_a_session_has_sets_backbone_and_settings(parts: Path, tmp_path: Path) -> None:
    options = replace(options_of(parts, tmp_path / "out"), image_size=56, whole_image=True, autocast="bf16", seed=7)
    with evaluator_session(options) as setup:
        assert setup.backbone(setup.train_dataset[0][0][None]).shape == (1, setup.backbone.embed_dim)
        assert setup.val_dataset[0][0].shape == (3, 56, 56)
        assert not any(parameter.requires_grad for parameter in setup.backbone.parameters())
        assert not setup.backbone.training
        assert (setup.batch_size, setup.autocast_dtype, setup.weights) == (64, torch.bfloat16, "")
        train, val = dataset_strings(parts)
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


def test_the_config_names_what_the_flags_leave_open(parts: Path, tmp_path: Path) -> None:
    train, val = dataset_strings(parts)
    config = tmp_path / "model.yaml"
    config.write_text(
        "student: {arch: vit_tiny, patch_size: 14}\ncrops: {global_crops_size: 28, local_crops_size: 14}\n"
        "train: {device: cpu}\n"
        f"evaluation: {{batch_size: 5, train_dataset_path: '{train}', val_dataset_path: 'no'}}\n"
    )
    options = EvaluatorOptions(config_file=str(config), output_dir=str(tmp_path), val_dataset=val)
    with evaluator_session(options, extra_pairs=["evaluation.temperature=0.5"]) as setup:
        assert (setup.batch_size, setup.config.evaluation.temperature) == (5, 0.5)
        assert len(setup.train_dataset) == len(setup.val_dataset) == 16


def test_the_same_weights_are_drawn_whatever_was_drawn_before(parts: Path, tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        torch.randn(3)
        with evaluator_session(options_of(parts, tmp_path)) as setup:
            drawn.append((setup.backbone.patch_embed.proj.weight.clone(), torch.randn(2)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_a_set_that_serves_for_both_is_opened_once(parts: Path, tmp_path: Path) -> None:
    train, _ = dataset_strings(parts)
    with evaluator_session(replace(options_of(parts, tmp_path), val_dataset=train)) as setup:
        assert setup.train_dataset is setup.val_dataset


def test_missing_sets(parts: Path, tmp_path: Path) -> None:
    both = options_of(parts, tmp_path)
    with (
        pytest.raises(ValueError, match="needs --train-dataset and --val-dataset"),
        evaluator_session(replace(both, train_dataset=None, val_dataset=None)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="needs --val-dataset"),
        evaluator_session(replace(both, val_dataset=None)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="needs --train-dataset or --val-dataset"),
        evaluator_session(replace(both, train_dataset=None, val_dataset=None), any_of_them=True),
    ):
        pass
    with evaluator_session(replace(both, train_dataset=None), any_of_them=True) as setup:
        assert len(setup.val_dataset) == 16
        with pytest.raises(ValueError, match="--train-dataset is needed"):
            _ = setup.train_dataset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "evaluation.image_size=30 is not divisible by student.patch_size=14"),
        ({"part_aggregation": "median"}, "'median' is not one of"),
        ({"part_top_k": 0}, "must be at least 1"),
        ({"features": "best"}, "evaluation.features"),
        ({"pretrained_weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_bad_options(parts: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    options = replace(options_of(parts, tmp_path), **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message), evaluator_session(options):
        pass


@dataclass(frozen=True)
class MoreOptions(EvaluatorOptions):
    """Options of a command with its own."""

    temperature: float | None = option(None, help="temperature")
    nb_knn: tuple[int, ...] | None = option(None, help="neighbours")


def test_a_command_adds_options_of_its_own() -> None:
    argv = ["student.arch=vit_tiny", "--temperature=0.1", "--num_resamples", "5", "--nb_knn", "3", "4"]
    options = parse(MoreOptions, argv, description="d", example="e")
    assert (options.temperature, options.num_resamples, options.overrides) == (0.1, 5, ("student.arch=vit_tiny",))
    names = {"temperature": "temperature", "nb_knn": "nb_knn", "features": "features"}
    assert flag_pairs(options, names) == ["evaluation.temperature=0.1", "evaluation.nb_knn=[3, 4]"]
