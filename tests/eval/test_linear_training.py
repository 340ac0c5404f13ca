"""Training many linear classifiers at once, against one optimiser for each, and where the batches come from."""

import itertools
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_stand_ins import MemoryDataset, TokenBackbone, noisy, two_sets
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from dinov2.eval import linear_training as linear_batches
from dinov2.eval.features import Features
from dinov2.eval.linear_classifiers import LastBlocks, classifier_grid, init_classifiers, read_classifiers, unstack
from dinov2.eval.linear_training import (
    Extraction,
    LinearCheckpoint,
    LinearTrainer,
    augmented_batches,
    cached_batches,
    class_weights,
    scaled_learning_rate,
)

CPU = torch.device("cpu")
WIDTH = 6


def some_rows(num_rows: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, 5 * WIDTH, generator=generator)
    return rows, torch.randint(num_classes, (num_rows,), generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_stacked_training_equals_one_layer_and_optimiser_per_classifier(weighted: bool) -> None:
    grid = classifier_grid()
    stacks = init_classifiers(grid, WIDTH, 3)
    start = unstack(stacks)
    weights = torch.tensor([0.5, 2.0, 1.0]) if weighted else None
    trainer = LinearTrainer(stacks, num_iterations=30, global_batch_size=512, class_weights=weights)
    layers, optimizers, schedules = [], [], []
    for settings in grid:
        layer = nn.Linear(settings.kind.width(WIDTH), 3)
        layer.weight.data.copy_(start[settings.name]["weight"])
        layer.bias.data.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=scaled_learning_rate(settings, 512), momentum=0.9)
        layers.append(layer)
        optimizers.append(optimizer)
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0))
    for iteration in range(30):
        rows, labels = some_rows(16, 3, seed=iteration)
        found = trainer.step(rows, labels)
        expected = []
        for settings, layer, optimizer, schedule in zip(grid, layers, optimizers, schedules, strict=True):
            logits = layer(settings.kind.select(rows, WIDTH))
            loss = F.cross_entropy(logits, labels, weight=weights, reduction="none").mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            expected.append(loss.detach())
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
    final = unstack(stacks)
    for settings, layer in zip(grid, layers, strict=True):
        torch.testing.assert_close(final[settings.name]["weight"], layer.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(final[settings.name]["bias"], layer.bias.data, rtol=1e-4, atol=1e-6)


def test_a_classifier_that_diverges_leaves_the_others_alone() -> None:
    def train(rates: list[float]) -> dict[str, dict[str, Tensor]]:
        stacks = init_classifiers(classifier_grid(rates), WIDTH, 2)
        trainer = LinearTrainer(stacks, num_iterations=10, global_batch_size=256)
        for iteration in range(10):
            trainer.step(*some_rows(8, 2, seed=iteration))
        return unstack(stacks)

    alone, beside = train([0.01]), train([0.01, 1e38])
    assert not beside["blocks=1 lr=1e+38"]["weight"].isfinite().all()
    for name, expected in alone.items():
        torch.testing.assert_close(beside[name]["weight"], expected["weight"], rtol=0, atol=1e-6)


def test_balanced_class_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0] * 7 + [2] * 2 + [3])
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels)
    weights = class_weights(labels, 5, "balanced")
    assert weights is not None
    np.testing.assert_allclose(weights[[0, 2, 3]], expected, rtol=1e-6)
    assert weights[[1, 4]].tolist() == [0.0, 0.0]
    assert float(weights[labels].mean()) == pytest.approx(1.0)
    assert class_weights(labels, 5, "none") is None
    with pytest.raises(ValueError, match="class weighting 'equal' is not one of none, balanced"):
        class_weights(labels, 5, "equal")


def features_of(num_images: int) -> Features:
    rows = torch.arange(num_images, dtype=torch.float32)[:, None]
    names = [str(index) for index in range(num_images)]
    return Features(embeddings=rows, labels=torch.arange(num_images), group_ids=names, paths=names)


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (3, 8), (1, 2), (8, 8)])
def test_every_image_comes_once_per_pass(num_images: int, batch_size: int) -> None:
    features = features_of(num_images)
    batches = list(cached_batches(features, 0, 3 * num_images, batch_size=batch_size, seed=0, device=CPU))
    assert all(len(rows) == batch_size and torch.equal(rows[:, 0].long(), labels) for rows, labels in batches)
    stream = torch.cat([labels for _, labels in batches]).tolist()
    passes = [stream[start : start + num_images] for start in range(0, len(stream), num_images)]
    assert all(Counter(one) == Counter(range(num_images)) for one in passes)
    assert num_images < 5 or len(set(map(tuple, passes))) > 1, "the order changes"


def pretend_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(linear_batches, "get_rank", lambda: rank)
    monkeypatch.setattr(linear_batches, "get_world_size", lambda: world_size)


def image_batches(
    start: int, stop: int, *, batch_size: int = 4, num_workers: int = 0, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    extraction = Extraction(LastBlocks(TokenBackbone(), 4), CPU, 8, num_workers)
    return augmented_batches(extraction, two_sets()[0], noisy, start, stop, batch_size=batch_size, seed=seed)


@pytest.mark.parametrize("kind", ["cached", "images"])
def test_the_processes_share_the_batches_of_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(batch_size: int) -> list[tuple[Tensor, Tensor]]:
        if kind == "images":
            return list(image_batches(1, 5, batch_size=batch_size))
        return list(cached_batches(features_of(7), 1, 5, batch_size=batch_size, seed=0, device=CPU))

    alone = stream(6)
    shares = []
    for rank in range(3):
        pretend_rank(monkeypatch, rank, 3)
        shares.append(stream(2))
    for iteration, (rows, labels) in enumerate(alone):
        dealt = torch.stack([share[iteration][1] for share in shares], dim=1).flatten()
        assert torch.equal(dealt, labels)
        features = torch.stack([share[iteration][0] for share in shares], dim=1).flatten(0, 1)
        torch.testing.assert_close(features, rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmented_batches_depend_on_seed_and_iteration_alone(num_workers: int) -> None:
    state = torch.get_rng_state()
    whole = list(image_batches(0, 4))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    torch.rand(3)
    later = list(image_batches(2, 4, num_workers=num_workers))
    for (rows, labels), (expected, expected_labels) in zip(later, whole[2:], strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(rows, expected)
    other = next(image_batches(0, 1, seed=1))[0]
    assert not torch.equal(other, whole[0][0])
    # 4 batches of 4 are less than a pass over 30 images, so equal rows would be equal augmentations.
    assert len({tuple(row.tolist()) for rows, _ in whole for row in rows}) == 16


def test_augmented_images_that_cannot_be_read_or_give_no_finite_features_are_named() -> None:
    dataset = MemoryDataset([(0, 0, 0)] * 4, [0, 1, 0, 1], unreadable=frozenset({2}))
    extraction = Extraction(LastBlocks(TokenBackbone(), 4), CPU, 8, 0)
    batches = augmented_batches(extraction, dataset, noisy, 0, 1, batch_size=12, seed=0)  # it comes three times
    with pytest.raises(ValueError, match=r"needs every image, but set/2.png: truncated") as caught:
        next(batches)
    assert str(caught.value).count("2.png") == 1
    dataset = MemoryDataset([(255, 0, 0)] * 4, [0, 1, 0, 1])
    batches = augmented_batches(extraction, dataset, lambda image: noisy(image) / 0, 0, 1, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"features of 2 training images are NaN or infinite: set/\d.png"):
        next(batches)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    grid = classifier_grid([0.1, 0.01])
    trainer = LinearTrainer(init_classifiers(grid, WIDTH, 3), num_iterations=2, global_batch_size=256)
    settings = {"seed": 0, "classes": ["a", "b", "c"], "epochs": 1}
    checkpoint = LinearCheckpoint(tmp_path, settings, torch.ones(3))
    assert not checkpoint.resume(trainer), "there is no file yet"
    trainer.step(*some_rows(8, 3))
    checkpoint.save(trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear_checkpoint.pth"], "no leftovers"
    assert checkpoint.path.stat().st_size < 60_000, "a classifier must not carry its whole stack"
    with pytest.raises(ValueError, match=r"epochs is 1 there and 2 now: start anew \(--no-resume\)"):
        LinearCheckpoint(tmp_path, {**settings, "epochs": 2}, torch.ones(3)).resume(trainer)
    with pytest.raises(ValueError, match="so the backbone is another"):
        LinearCheckpoint(tmp_path, settings, torch.tensor([1.0, 1.0, 2.0])).resume(trainer)
    path = tmp_path / "linear_checkpoint.pth"
    content = torch.load(path, weights_only=True)
    assert set(content["classifiers"]) == {settings.name for settings in grid}
    for broken in ({"trainer": {}}, {"classifiers": {}}, {"trainer": {"iteration": 1, "momentum": {}}}):
        torch.save(content | broken, path)
        with pytest.raises(
            ValueError, match=r"is damaged, its classifiers and their training do not fit .* start anew"
        ):
            LinearCheckpoint(tmp_path, settings, torch.ones(3)).resume(trainer)
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        LinearCheckpoint(tmp_path, settings, torch.ones(3)).resume(trainer)


def test_files_that_hold_no_classifiers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="it lacks blocks, avgpool, classes"):
        read_classifiers(path)
    head = {"weight": torch.zeros(2, 5), "bias": torch.zeros(2), "blocks": 1, "avgpool": True, "classes": ["a", "b"]}
    torch.save(head, path)
    with pytest.raises(ValueError, match=r"weight \(2, 5\) and bias \(2,\) do not fit 2 classes"):
        read_classifiers(path)
    for broken in ({"blocks": "one"}, {"blocks": 0}, {"avgpool": 2}, {"weight": [1.0]}, {"bias": None}):
        torch.save(head | broken, path)
        with pytest.raises(ValueError, match=r"file.pth is damaged: a classifier must have the tensors"):
            read_classifiers(path)
    torch.save({"classifiers": {"x": 1}, "settings": {"classes": ["a"]}, "trainer": {}, "probe": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"file.pth is damaged: a classifier must have"):
        read_classifiers(path)


def test_the_batches_of_a_pass_do_not_depend_on_where_it_is_entered() -> None:
    batches = partial(cached_batches, features_of(11), batch_size=3, seed=5, device=CPU)
    whole = [labels.tolist() for _, labels in batches(0, 20)]
    for start, stop in itertools.pairwise((0, 1, 4, 13, 20)):
        assert [labels.tolist() for _, labels in batches(start, stop)] == whole[start:stop]
