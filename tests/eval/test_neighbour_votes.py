"""The number of neighbours that a bank chooses by judging itself; votes are tested in test_knn.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2.eval import knn as neighbour_votes
from dinov2.eval.features import Features
from dinov2.eval.knn import KnnSettings, choose_k, knn_votes, neighbour_probabilities
from dinov2.eval.metrics.classification import FloatArray


def random_bank(num_images: int = 60, photos_per_part: int = 3, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.arange(num_images) // photos_per_part
    labels = parts % 3
    embeddings = torch.randn(num_images, 6, generator=generator) + 1.5 * F.one_hot(labels, 6)
    names = [f"{index}.png" for index in range(num_images)]
    return Features(F.normalize(embeddings, dim=1), labels, [f"part {part}" for part in parts], names)


def slow_balanced_accuracy(bank: Features, k: int, largest: int, temperature: float) -> float:
    """The definition: part by part, the rest of the bank votes on its photos."""
    hits: dict[int, list[bool]] = {}
    for index, part in enumerate(bank.group_ids):
        others = torch.tensor([row for row, other in enumerate(bank.group_ids) if other != part])
        similarities, order = (bank.embeddings[others] @ bank.embeddings[index]).sort(descending=True)
        labels = bank.labels[others][order]
        votes = knn_votes(similarities[None, :largest], labels[None, :largest], k, temperature, 3)
        label = int(bank.labels[index])
        hits.setdefault(label, []).append(int(votes.argmax()) == label)
    return float(np.mean([np.mean(values) for values in hits.values()]))


@pytest.mark.parametrize("seed", range(4))
def test_the_chosen_number_is_best_by_the_definition(seed: int) -> None:
    bank = random_bank(seed=seed)
    ks = (1, 4, 15, 57)
    balanced = {k: slow_balanced_accuracy(bank, k, 57, 0.2) for k in ks}
    chosen = choose_k(bank, 3, KnnSettings(nb_knn=ks, temperature=0.2))
    assert chosen == max(ks, key=lambda k: balanced[k])
    assert len(set(balanced.values())) > 1


def test_numbers_that_a_bank_without_a_part_lacks_stand_for_all_it_has() -> None:
    bank = random_bank(6)
    assert choose_k(bank, 3, KnnSettings(nb_knn=(3, 5))) == 3  # three others can vote
    assert choose_k(bank, 3, KnnSettings(nb_knn=(5, 4))) == 4


def test_a_bank_of_one_part_cannot_judge_itself() -> None:
    assert choose_k(random_bank(5, photos_per_part=5), 3, KnnSettings(nb_knn=(1, 2))) is None


@pytest.mark.parametrize("most", [2, 10, 59])
def test_a_large_bank_is_judged_by_whole_parts(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Features] = []

    def record(bank: Features, queries: Features, num_classes: int, settings: KnnSettings) -> dict[int, FloatArray]:
        asked.append(queries)
        return neighbour_probabilities(bank, queries, num_classes, settings)

    monkeypatch.setattr(neighbour_votes, "MAX_IMAGES_FOR_CHOICE", most)
    monkeypatch.setattr(neighbour_votes, "neighbour_probabilities", record)
    bank = random_bank()
    for seed in (0, 0, 1):
        choose_k(bank, 3, KnnSettings(nb_knn=(1, 2), seed=seed))
    first, again, other = asked
    assert len(first) == max(3, most // 3 * 3)
    assert all(first.group_ids.count(part) == 3 for part in first.group_ids)
    assert first.paths == again.paths
    assert first.paths != other.paths


def test_selected_rows_belong_together() -> None:
    bank = random_bank()
    some = bank.select(torch.tensor([7, 2]))
    assert (some.paths, some.group_ids) == (["7.png", "2.png"], ["part 2", "part 0"])
    assert torch.equal(some.embeddings, bank.embeddings[[7, 2]])
    assert some.labels.tolist() == [2, 0]


def test_probabilities_sum_to_one_for_every_k() -> None:
    bank, queries = random_bank(), random_bank(9, seed=1)
    for leave in (False, True):
        settings = KnnSettings(nb_knn=(1, 7, 40), leave_one_part_out=leave)
        for probabilities in neighbour_probabilities(bank, queries, 3, settings).values():
            np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
