"""Runs of the real command on several numbers of processes, begun and resumed; started as a process, since it forks.

Usage: ``python runs_on_other_numbers.py FOLDER PARTS``. Leaves ``FOLDER/whole_N``, and ``FOLDER/N_to_M``, which goes on
on M processes from the middle of ``whole_N``. Each holds, beside its own files, the names of the images by rank.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train_stand_ins import OPTIONS

from dinov2.data.collate import PretrainingBatch, PretrainingCollate, collate_crops
from dinov2.data.masking import Mask
from dinov2.data.pretraining import CropSample
from dinov2.distributed import get_rank
from dinov2.train import data
from dinov2.train.data import Batches
from dinov2.utils.seeds import derive_seed
from tools.stress_resume import Life

GLOBAL_BATCH = 12
WRITERS = (1, 2, 4)
CHANGES = ((1, 2), (2, 1), (2, 3), (4, 2))
RESUMED_AFTER = 2  # the last iteration of the first of two epochs


class _InOrder(random.Random):
    """Leaves what it is to shuffle as it is."""

    def shuffle(self, x: Any) -> None:
        pass


class MasksBySample(PretrainingCollate):
    """Masks that depend on the sample alone: those of a run depend on the batch, which differs with the processes."""

    def __call__(self, samples: Sequence[CropSample]) -> PretrainingBatch:
        crops = iter([(crop, sample.position) for crop in (0, 1) for sample in samples])

        def draw(number: int, _: random.Random) -> Mask:
            return self.mask_generator(number, random.Random(derive_seed(self.seed, "mask", *next(crops))))

        return collate_crops(
            samples,
            mask_ratio_min_max=(0.3, 0.3),
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


def words(parts: str, output: Path, processes: int, *more: str) -> Iterator[str]:
    yield from OPTIONS
    yield f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"
    yield f"train.output_dir={output}"
    yield f"train.batch_size_per_gpu={GLOBAL_BATCH // processes}"
    yield from ("student.drop_path_rate=0", "dino.koleo_all_ranks=true", "evaluation.probe_images=0")
    yield from ("train.keep_last=0", *more)


def main() -> None:
    folder, parts = Path(sys.argv[1]), sys.argv[2]
    data.PretrainingCollate = MasksBySample  # type: ignore[attr-defined]
    Batches.__next__ = noting_names(Batches.__next__)  # type: ignore[method-assign]
    runs = [(folder / f"whole_{count}", count, "") for count in WRITERS]
    for writers, readers in CHANGES:
        step = folder / f"whole_{writers}" / f"model_{RESUMED_AFTER:07d}.rank_{{rank}}.pth"
        runs.append((folder / f"{writers}_to_{readers}", readers, f"train.resume_path={step}"))
    for number, (output, count, resume) in enumerate(runs):
        output.mkdir(parents=True)
        Life(number, [*words(parts, output, count, *filter(None, [resume]))], output, folder, count).wait_for_end()


if __name__ == "__main__":
    main()
