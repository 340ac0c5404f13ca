import logging

import pytest
import torch
from eval_stand_ins import Backbone, MemoryDataset, random_set
from torch import Tensor, nn

from dinov2.eval.features import Features, evaluating, extract_features
from dinov2.eval.utils import MetricCollection, MetricLogger, ModelWithNormalize


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (7, 0), (100, 0), (4, 2)])
def test_rows_follow_the_dataset(batch_size: int, num_workers: int) -> None:
    model, dataset = Backbone(), random_set(7, 3, seed=0)
    features = extract_features(model, dataset, batch_size=batch_size, num_workers=num_workers)
    expected = torch.cat([model(dataset[index][0][None]) for index in range(7)]).detach()
    torch.testing.assert_close(features.embeddings, expected)
    assert features.embeddings.dtype == torch.float32
    assert features.labels.tolist() == dataset.labels
    assert features.group_ids == dataset.groups
    assert features.paths == [f"set/{index}.png" for index in range(7)]
    assert len(features) == 7
    assert not features.embeddings.requires_grad


def test_every_module_gets_its_mode_back() -> None:
    model = nn.Sequential(Backbone(), nn.Dropout(0.9), nn.BatchNorm1d(8))
    model.train()
    model[2].eval()
    first = extract_features(model, random_set(5, 2, seed=0), num_workers=0)
    second = extract_features(model, random_set(5, 2, seed=0), num_workers=0)
    assert torch.equal(first.embeddings, second.embeddings)  # no dropout
    assert [module.training for module in model] == [True, True, False]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert model.training


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    model = Backbone()
    before = torch.get_rng_state()
    extract_features(model, random_set(5, 2, seed=0), num_workers=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_labels_are_kept() -> None:
    dataset = MemoryDataset([(1, 2, 3), (4, 5, 6)], [None, 1])
    features = extract_features(Backbone(), dataset, num_workers=0)
    assert features.labels.tolist() == [-1, 1]
    assert features.group_ids == ["set/0.png", "set/1.png"]


def test_autocast_changes_precision_only() -> None:
    model, dataset = Backbone(), random_set(6, 2, seed=0)
    exact = extract_features(model, dataset, num_workers=0)
    rounded = extract_features(model, dataset, num_workers=0, autocast_dtype=torch.bfloat16)
    assert rounded.embeddings.dtype == torch.float32
    assert not torch.equal(exact.embeddings, rounded.embeddings)
    torch.testing.assert_close(exact.embeddings, rounded.embeddings, rtol=0.05, atol=0.05)


def test_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dinov2"):
        extract_features(Backbone(), random_set(5, 2, seed=0), batch_size=2, num_workers=0)
    assert "features: 5 of 5" in caplog.text


class NotFinite(nn.Module):
    """Spoils the features of images whose red value is 255."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(2, 3))
        return torch.where(means[:, :1] == 1, torch.full_like(means, self.value), means)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalise", [False, True])
def test_features_that_are_not_finite(value: float, normalise: bool) -> None:
    dataset = MemoryDataset([(255, 0, 0), (9, 0, 0), (255, 1, 1)], [0, 1, 0], name="photos")
    model: nn.Module = NotFinite(value)
    model = ModelWithNormalize(model) if normalise else model
    with pytest.raises(ValueError, match=r"features of 2 of 3 images are NaN or infinite: photos/0.png, photos/2.png$"):
        extract_features(model, dataset, num_workers=0)


def test_many_bad_features_are_cut_short() -> None:
    dataset = MemoryDataset([(255, 0, 0)] * 9, [0] * 9)
    with pytest.raises(ValueError, match=r"features of 9 of 9 .*set/4.png, …$"):
        extract_features(NotFinite(float("nan")), dataset, num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_that_cannot_be_read(num_workers: int) -> None:
    dataset = MemoryDataset([(1, 2, 3)] * 4, [0] * 4, unreadable=frozenset({2}), name="line 4")
    with pytest.raises(ValueError, match=r"evaluation needs every image, but line 4/2.png: truncated"):
        extract_features(Backbone(), dataset, num_workers=num_workers)


def test_empty_dataset() -> None:
    with pytest.raises(ValueError, match="has no images"):
        extract_features(Backbone(), MemoryDataset([], []), num_workers=0)


def test_features_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \[B, D\], not \(2, 3, 4, 4\)"):
        extract_features(nn.Identity(), random_set(2, 2, seed=0), num_workers=0)


def test_transform_that_returns_no_tensor() -> None:
    dataset = random_set(2, 2, seed=0)
    dataset.transform = None
    with pytest.raises(TypeError, match="must return a tensor, not Image"):
        extract_features(Backbone(), dataset, num_workers=0)


def test_columns_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"equally long, not \[2, 3\]"):
        Features(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), ["a"] * 3, ["a"] * 2)


def test_normalised_rows_have_unit_length_in_float32() -> None:
    model = ModelWithNormalize(Backbone().to(torch.bfloat16))
    rows = model(torch.rand(5, 3, 4, 4).to(torch.bfloat16))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))


def test_names_that_users_import() -> None:
    assert MetricCollection.__name__ == "MetricCollection"
    assert MetricLogger.__name__ == "MetricLogger"


def test_no_image_that_can_be_read() -> None:
    dataset = MemoryDataset([(1, 2, 3)] * 2, [0] * 2, unreadable=frozenset({0, 1}))
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        extract_features(Backbone(), dataset, num_workers=0)
