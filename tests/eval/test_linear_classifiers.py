"""Features, grid and parameters of linear classifiers, against reference values and plain torch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dinov2.eval.linear_classifiers import (
    LEARNING_RATES,
    ClassifierSettings,
    ClassifierStack,
    FeatureKind,
    LastBlocks,
    classifier_grid,
    init_classifiers,
    join_block_tokens,
    stack_classifiers,
    unstack,
)
from dinov2.eval.linear_training import LinearTrainer, scaled_learning_rate
from dinov2.models.vision_transformer import vit_tiny


@pytest.fixture
def linear(reference: Callable[[str], Any]) -> Any:
    return reference("eval_fixture.pt")["linear"]


def upstream_name(settings: ClassifierSettings, global_batch_size: int) -> str:
    rate = f"{scaled_learning_rate(settings, global_batch_size):.5f}".replace(".", "_")
    return f"classifier_{settings.kind.blocks}_blocks_avgpool_{settings.kind.avgpool}_lr_{rate}"


def test_features_are_those_of_the_reference(linear: Any) -> None:
    rows = join_block_tokens(linear["x_tokens_list"])
    for blocks in (1, 2, 4):
        for avgpool in (False, True):
            kind, name = FeatureKind(blocks, avgpool), f"n{blocks}_avgpool{avgpool}"
            features = kind.select(rows, 32)
            torch.testing.assert_close(features, linear["features"][name], rtol=0, atol=0)
            assert features.shape[1] == kind.width(32)
            expected = linear["classifier"][name]
            stack = stack_classifiers({ClassifierSettings(kind): (expected["weight"], expected["bias"])})[0]
            torch.testing.assert_close(stack.logits(rows)[:, 0], expected["out"], rtol=0, atol=1e-5)
            torch.testing.assert_close(stack.logits_of(0, rows), expected["out"], rtol=0, atol=1e-5)


def test_training_of_twelve_classifiers_is_that_of_the_reference(linear: Any) -> None:
    reference = linear["grid"]
    grid = classifier_grid(reference["learning_rates"], (1, 4))
    batch = reference["batch_size"]
    assert [upstream_name(settings, batch) for settings in grid] == reference["names"]
    assert [scaled_learning_rate(settings, batch) for settings in grid] == pytest.approx(
        reference["group_lrs"], rel=1e-12
    )
    names = dict(zip(grid, reference["names"], strict=True))
    stacks = stack_classifiers(
        {key: (reference["start"][name]["weight"], torch.zeros(7)) for key, name in names.items()}
    )
    rows = join_block_tokens(linear["x_tokens_list"])
    trainer = LinearTrainer(stacks, num_iterations=reference["iterations"], global_batch_size=batch)
    for step in reference["history"]:
        losses = trainer.step(rows, reference["labels"])
        assert float(losses.sum()) == pytest.approx(step["loss"], abs=1e-5)
        rate = reference["group_lrs"][0] * trainer.learning_rate_factor(trainer.iteration)
        assert rate == pytest.approx(step["lr_first"], rel=1e-9, abs=1e-18)
    final = unstack(stacks)
    for settings, name in names.items():
        weight, expected = final[settings.name]["weight"].double(), reference["final"][name]
        assert float(weight.sum()) == pytest.approx(expected["weight_sum"], abs=1e-5)
        assert float(weight.abs().sum()) == pytest.approx(expected["weight_abs_sum"], abs=1e-5)
        torch.testing.assert_close(final[settings.name]["bias"], expected["bias"], rtol=0, atol=1e-5)
    mapping = linear["class_mapping"]
    mapped = stacks[0].logits_of(0, rows)[:, mapping["mapping"]]
    torch.testing.assert_close(mapped, mapping["preds"], rtol=0, atol=1e-5)


def test_no_classifier_of_the_default_grid_is_lost_at_any_batch_size(linear: Any) -> None:
    """Upstream keeps 40 of 52 at a batch of 16 and 48 at 128: names of different learning rates coincide."""
    collisions = linear["default_grid_name_collisions"]
    grid = classifier_grid()
    assert collisions["learning_rates"] == list(LEARNING_RATES)
    kept = {row["total_batch"]: row["classifiers_kept"] for row in collisions["rows"]}
    assert (kept[16], kept[128], kept[256]) == (40, 48, 52)
    for batch, count in kept.items():
        assert len({upstream_name(settings, batch) for settings in grid}) == count
        assert len({(s.kind, scaled_learning_rate(s, batch)) for s in grid}) == 52
    assert len({settings.name for settings in grid}) == 52


def test_names_are_exact_and_readable() -> None:
    assert ClassifierSettings(FeatureKind(4, True), 0.001).name == "blocks=4 avgpool lr=0.001"
    assert ClassifierSettings(FeatureKind(1, False)).name == "blocks=1"
    close = classifier_grid([1e-5, math.nextafter(1e-5, 1)], [1], [False])
    assert len({settings.name for settings in close}) == 2
    assert len(unstack(init_classifiers(close, 4, 2))) == 2


def test_initial_weights_depend_on_seed_and_settings_alone() -> None:
    whole = unstack(init_classifiers(classifier_grid(), 64, 100, seed=3))
    alone = unstack(init_classifiers(classifier_grid([0.01], [4], [True]), 64, 100, seed=3))
    other = unstack(init_classifiers(classifier_grid([0.01], [4], [True]), 64, 100, seed=4))
    name = "blocks=4 avgpool lr=0.01"
    assert torch.equal(whole[name]["weight"], alone[name]["weight"])
    assert not torch.equal(whole[name]["weight"], other[name]["weight"])
    weights = torch.cat([entry["weight"].flatten() for entry in whole.values()])
    assert float(weights.std()) == pytest.approx(0.01, rel=0.01)
    assert abs(float(weights.mean())) < 1e-4
    assert not any(entry["bias"].any() for entry in whole.values())
    assert len({float(entry["weight"][0, 0]) for entry in whole.values()}) == 52


def test_stacks_that_do_not_fit_are_refused() -> None:
    near, far = ClassifierSettings(FeatureKind(1, False), 0.1), ClassifierSettings(FeatureKind(4, False), 0.1)
    with pytest.raises(ValueError, match="must see the same features"):
        ClassifierStack([near, far], torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"1 classifiers need weights .* found \(2, 3, 4\)"):
        ClassifierStack([near], torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="features of 4 blocks cannot be taken from rows of 2 blocks"):
        FeatureKind(4, False).select(torch.zeros(1, 12), 4)


def test_last_blocks_of_a_vision_transformer() -> None:
    torch.manual_seed(0)
    model = vit_tiny(patch_size=14, img_size=28, num_register_tokens=2).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        rows = LastBlocks(model, 4)(images)
        tokens = model.forward_features(images)
    width = model.embed_dim
    assert rows.shape == (2, 5 * width)
    cls, mean = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(dim=1)
    torch.testing.assert_close(FeatureKind(1, True).select(rows, width), torch.cat([cls, mean], dim=1))
    assert LastBlocks(model, 1)(images).shape == (2, 2 * width)

    with pytest.raises(ValueError, match="Linear has no get_intermediate_layers"):
        LastBlocks(nn.Linear(3, 4), 4)
    with pytest.raises(ValueError, match="cannot take the last 13 blocks of a model of 12"):
        LastBlocks(vit_tiny(patch_size=14, img_size=28), 13)
