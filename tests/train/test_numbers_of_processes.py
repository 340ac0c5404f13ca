"""Runs on several numbers of processes, begun and resumed, have the losses of one process, and the same images.

Started as a process, since it forks, this file makes the runs on ``FOLDER/parts``, evaluated on ``PARTS``: ``python
test_numbers_of_processes.py FOLDER PARTS``. It leaves ``FOLDER/whole_N``; ``FOLDER/N_to_M``, which goes on on M
processes from the middle of ``whole_N``; and runs of both methods and all ways of sharding. Each holds, beside its own
files, the names of the images by rank.
"""

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from train_stand_ins import LAST, NETWORKS, OPTIONS, checkpoint, evaluation_pairs, evaluations, records, run_forking

from dinov2.data.collate import PretrainingBatch, PretrainingCollate, collate_crops
from dinov2.data.masking import Mask
from dinov2.data.pretraining import CropSample
from dinov2.distributed import get_rank
from dinov2.train import data
from dinov2.train.data import Batches
from dinov2.utils.seeds import derive_seed
from tools.stress_resume import Life

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 12
WRITERS = (1, 2, 4)
CHANGES = ((1, 2), (2, 1), (2, 3), (4, 2))
FIRST_EPOCH_ENDS = 2  # number of its last iteration
# With separate heads. What a method reduces does not know how weights are shared, so not every pair is tried.
STRATEGIES = {"centering": ("SHARD_GRAD_OP", "NO_SHARD"), "sinkhorn_knopp": ("FULL_SHARD", "NO_SHARD")}
TERMS = {"total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss"}
NORMS = {"grad_norm_backbone", "grad_norm_dino_head"}
SCHEDULES = {"lr", "weight_decay", "momentum", "teacher_temp", "last_layer_lr"}


class _InOrder(random.Random):
    """Leaves what it is to shuffle as it is."""

    def shuffle(self, x: Any) -> None:
        pass


class MasksBySample(PretrainingCollate):
    """Masks that depend on the sample alone: those of a run depend on the batch, which differs with the processes."""

    def __call__(self, samples: Sequence[CropSample]) -> PretrainingBatch:
        crops = iter([(crop, sample.position) for crop in (0, 1) for sample in samples])

        def draw(*_: Any) -> Mask:
            own = random.Random(derive_seed(self.seed, "mask", *next(crops)))
            return self.mask_generator(own.randrange(self.mask_generator.num_patches // 2), own)

        return collate_crops(
            samples,
            mask_ratio_min_max=self.mask_ratio_min_max,
            mask_probability=1.0,
            num_tokens=self.mask_generator.num_patches,
            mask_generator=draw,
            rng=_InOrder(),
        )


def noting_names(real: Any) -> Any:
    def following(self: Batches) -> PretrainingBatch:
        batch: PretrainingBatch = real(self)
        with (Path(self._config.train.output_dir) / f"names.rank_{get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps([Path(name).name for name in batch.names]) + "\n")
        return batch

    return following


def wanted(folder: Path, parts: str) -> Iterator[tuple[str, int, list[str]]]:
    """Name, number of processes, and options of each run."""
    for count in WRITERS:
        yield f"whole_{count}", count, []
    for writers, readers in CHANGES:
        step = folder / f"whole_{writers}" / f"model_{FIRST_EPOCH_ENDS:07d}.rank_{{rank}}.pth"
        yield f"{writers}_to_{readers}", readers, [f"train.resume_path={step}"]
    for method, strategies in STRATEGIES.items():
        more = [f"train.centering={method}", "ibot.separate_head=true", "student.block_chunks=2", "optim.clip_grad=0.3"]
        more += [*evaluation_pairs(Path(parts)), "evaluation.probe_images=3", "optim.epochs=1"]
        yield method, 1, more
        for strategy in strategies:
            sharding = [f"{network}.sharding_strategy={strategy}" for network in NETWORKS]
            yield f"{method}_{strategy}", 2, [*more, *sharding]


def main() -> None:
    folder, parts = Path(sys.argv[1]), sys.argv[2]
    data.PretrainingCollate = MasksBySample
    Batches.__next__ = noting_names(Batches.__next__)
    for number, (name, count, more) in enumerate(wanted(folder, parts)):
        output = folder / name
        output.mkdir(parents=True)
        words = [
            *OPTIONS, f"train.dataset_path=GroupedJSON:split=TRAIN:root={folder}/parts", f"train.output_dir={output}",
            f"train.batch_size_per_gpu={GLOBAL_BATCH // count}", "student.drop_path_rate=0",
            "dino.koleo_all_ranks=true", "evaluation.probe_images=0", "train.keep_last=0",
            "data.max_bad_fraction=0.2", *more,
        ]  # fmt: skip
        Life(number, words, output, folder, count).wait_for_end()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(parts, folder / "parts")
    unreadable_image(folder).write_bytes(b"no image")
    run_forking(__file__, str(folder), str(parts))
    return folder


def unreadable_image(folder: Path) -> Path:
    return min((folder / "parts" / "train").rglob("*.jpeg"))


def lines(folder: Path) -> dict[int, dict[str, Any]]:
    return {record["iteration"]: record for record in records(folder) if "evaluation" not in record}


def names(folder: Path) -> list[list[str]]:
    """Images of each iteration in the order of the run's stream: rank r has every r-th of M."""
    by_rank = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("names.rank_*.jsonl"))
    ]
    return [[name for row in zip(*batches, strict=True) for name in row] for batches in zip(*by_rank, strict=True)]


def assert_same_losses(ours: dict[str, Any], expected: dict[str, Any], rel: float = 3e-6) -> None:
    assert ours.keys() >= TERMS | NORMS | SCHEDULES
    for name in (TERMS | NORMS | SCHEDULES | {"grad_norm_ibot_head"}) & ours.keys():
        assert ours[name] == pytest.approx(expected[name], rel=rel, abs=1e-7), (ours["iteration"], name)


@pytest.mark.parametrize(("writers", "readers"), CHANGES)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(runs: Path, writers: int, readers: int) -> None:
    changed, undisturbed = runs / f"{writers}_to_{readers}", runs / f"whole_{writers}"
    resumed, whole = lines(changed), lines(undisturbed)
    assert list(resumed) == list(range(FIRST_EPOCH_ENDS + 1, LAST + 1))
    for iteration, record in resumed.items():
        assert_same_losses(record, whole[iteration])
    assert resumed[LAST]["total_loss"] != resumed[LAST - 1]["total_loss"]
    images = names(undisturbed)
    assert [len(batch) for batch in images] == [GLOBAL_BATCH] * (LAST + 1)
    assert names(changed) == images[FIRST_EPOCH_ENDS + 1 :], "none is left out or comes twice"
    found = checkpoint(changed)
    assert (found["world_size"], found["samples_seen"]) == (readers, GLOBAL_BATCH * (LAST + 1))


def assert_same(ours: Path, expected: Path, rel: float) -> None:
    for iteration, line in lines(expected).items():
        assert_same_losses(lines(ours)[iteration], line, rel)
    assert names(ours) == names(expected)


@pytest.mark.parametrize("processes", WRITERS[1:])
def test_undisturbed_runs_agree_too(runs: Path, processes: int) -> None:
    assert_same(runs / f"whole_{processes}", runs / "whole_1", rel=3e-6)


@pytest.mark.parametrize(
    ("method", "strategy"), [(method, one) for method, several in STRATEGIES.items() for one in several]
)
def test_two_processes_train_as_one_however_they_share(runs: Path, method: str, strategy: str) -> None:
    """Also what monitors measure: three images of the probe set need padding on two processes."""
    two, one = runs / f"{method}_{strategy}", runs / method
    assert_same(two, one, rel=2e-5)
    metrics, expected_metrics = evaluations(two), evaluations(one)
    assert metrics[-1] == pytest.approx(expected_metrics[-1], rel=1e-4), "the start is the same network"
    assert metrics[FIRST_EPOCH_ENDS].keys() == expected_metrics[FIRST_EPOCH_ENDS].keys()
    line = lines(two)[FIRST_EPOCH_ENDS]
    assert line.keys() == lines(one)[FIRST_EPOCH_ENDS].keys() >= {"prototypes_won_cls", "prototypes_used_patch"}
    assert (two / "eval" / "best" / "best.json").exists()
    unreadable = [checkpoint(two, FIRST_EPOCH_ENDS, rank)["unreadable"]["names"] for rank in (0, 1)]
    assert unreadable == [[str(unreadable_image(runs))]] * 2, "whichever process came upon it"
    place = Path("eval", f"training_{FIRST_EPOCH_ENDS}", "teacher_checkpoint.pth")
    ours, expected = (torch.load(folder / place, weights_only=True)["teacher"] for folder in (two, one))
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=2e-5, msg=name)


if __name__ == "__main__":
    main()
