import pytest
import torch

from dinov2.eval.features import few_shot_subset
from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores
from dinov2.eval.results import mean_scores, summarise_tries


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("per_class", [1, 5])
def test_reference_subsets(reference, seed: int, per_class: int) -> None:
    values = reference("eval_fixture.pt")["knn"]
    expected = values["few_shot_indices"][f"n{per_class}_seed{seed}"]
    assert torch.equal(few_shot_subset(values["train_labels"], per_class, seed), expected)


def test_every_class_gives_the_same_number_or_all_it_has() -> None:
    labels = torch.tensor([3, 0, 3, 0, 3, 0, 0, 7])
    subset = few_shot_subset(labels, 3, seed=0)
    assert labels[subset].bincount().tolist() == [3, 0, 0, 3, 0, 0, 0, 1]
    assert len(subset.unique()) == len(subset)


def test_drawing_does_not_touch_the_random_state() -> None:
    before = torch.get_rng_state()
    few_shot_subset(torch.tensor([0, 0, 1]), 1, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def scores(image: dict[str, float], part: dict[str, float]) -> Scores:
    def level(figures: dict[str, float]) -> LevelScores:
        return LevelScores(
            count=9, metrics={name: MetricValue(value=value, low=0, high=1) for name, value in figures.items()}
        )

    return Scores(image=level(image), part=level(part))


def test_mean_and_spread_over_tries() -> None:
    tries = [
        scores({"accuracy": 0.5, "auroc": 0.8}, {"accuracy": 1.0}),
        scores({"accuracy": 0.7}, {"accuracy": 1.0}),
        scores({"accuracy": 0.9}, {"accuracy": 1.0}),
    ]
    summary = summarise_tries(tries)
    assert summary["image"]["accuracy"] == {
        "mean": pytest.approx(0.7),
        "std": pytest.approx(0.2),
        "values": [0.5, 0.7, 0.9],
    }
    assert summary["image"]["auroc"] == {"mean": 0.8, "std": 0.0, "values": [0.8]}  # only one try has it
    mean = mean_scores(tries)
    assert mean.image.metrics["accuracy"] == MetricValue(value=pytest.approx(0.7))
    assert (mean.part.count, mean.part.confusion) == (9, ())


def test_at_least_one_image_per_class() -> None:
    with pytest.raises(ValueError, match="must be at least 1, found 0"):
        few_shot_subset(torch.tensor([0]), 0, seed=0)
