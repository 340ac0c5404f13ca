"""How the teacher's targets are spread, measured on the batches of training alone: no extra forward pass."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum
from dinov2.eval.representation_measures import match_rate, mean_cosine_similarity
from dinov2.loss.teacher_targets import cross_entropy
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, Predictions, Targets

MAX_ROWS = 1024  # targets whose entropy is taken, per step and process: evenly spread over those there are

Pair = tuple[Tensor, Tensor]


class TargetMeasures:
    """Measures teacher and student on every batch; means of a log period are taken by the progress report.

    `step` gives scalars of one batch, for class tokens (``cls``) and masked patches (``patch``):

    - ``teacher_entropy_*``: entropy of a target as share of its maximum ``log K``; 1 is uniform, 0 a single prototype.
    - ``teacher_information_*``: entropy of the mean target minus mean entropy of the targets, in nats: how much a
      target tells about its image. 0 where all targets are the same, whatever they look like.
    - ``kl_*``: divergence of the student's prediction from its target, in nats.
    - ``teacher_cosine``: mean cosine between the teacher's class tokens of different images.
    - ``crop_match``: share of the images whose two global crops find each other in the batch of this process, by the
      teacher's class tokens. At chance, one over the batch, the class-token loss has nothing to start from.

    `close_period` gives metrics of all batches and processes since the last call:

    - ``prototypes_used_*``: exp of the entropy of the mean target over ``K``; 1 where all are used alike.
    - ``prototypes_won_*``: share of the prototypes that were the largest of a target.

    The last batch counts when the next one comes, or when the counts are asked for: until then `forget_batch` takes it
    back, which costs the batches that stay nothing. Nothing is read from the device before the end of a period, no
    random number is drawn, and no gradient is touched.

    Args:
        student_temp: what the student's logits are divided by.
    """

    def __init__(self, student_temp: float) -> None:
        self._student_temp = student_temp
        self._step: dict[str, Tensor] = {}
        self._used: dict[str, Tensor] = {}  # [K + 1]: sum of the targets, and their number
        self._won: dict[str, Tensor] = {}  # [K]: 1 where a prototype was the largest of a target
        self._last: dict[str, list[Pair]] = {}  # sums [K] and winners [R] of the last batch, not in the two above yet

    @property
    def step(self) -> Mapping[str, Tensor]:
        """Scalars of the last batch observed; what the batch cannot tell, without masked patches say, is absent."""
        return self._step

    @torch.no_grad()
    def observe(self, targets: Targets, predictions: Predictions) -> None:
        """Measures one batch."""
        self._count_last()
        self._step = {}
        for kind, pairs in _pairs(targets, predictions):
            # Also without rows: a kind is to be there on every process.
            self._last[kind] = [(teacher.sum(dim=0), teacher.argmax(dim=1)) for teacher, _ in pairs]
            if sum(len(teacher) for teacher, _ in pairs) > 0:
                self._step |= _spread(kind, pairs, self._student_temp)
        crops = targets.features.chunk(NUM_GLOBAL_CROPS)
        if len(crops[0]) > 1:
            self._step["teacher_cosine"] = mean_cosine_similarity(crops[0])
            self._step["crop_match"] = match_rate(*crops)

    def forget_batch(self) -> None:
        """Takes the last batch back, as if it had not been observed."""
        self._step, self._last = {}, {}

    def close_period(self) -> dict[str, float]:
        """Metrics of the period that ends; every process must call it, and the next period begins."""
        self._count_last()
        metrics = {}
        for kind, used in self._used.items():
            total, winners = all_reduce_sum(used), all_reduce_sum(self._won[kind])
            num_prototypes = len(winners)
            if total[-1] > 0:
                mean = total[:-1].double().cpu() / total[-1].item()
                metrics[f"prototypes_used_{kind}"] = torch.special.entr(mean).sum().exp().item() / num_prototypes
                metrics[f"prototypes_won_{kind}"] = (winners > 0).sum().item() / num_prototypes
            used.zero_()
            self._won[kind].zero_()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the middle of a period."""
        self._count_last()
        return {"used": dict(self._used), "won": dict(self._won)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; tensors move to the device of the first batch."""
        self._used, self._won, self._last = dict(state["used"]), dict(state["won"]), {}

    def _count_last(self) -> None:
        """Adds the last batch to the period."""
        for kind, counts in self._last.items():
            device, num_prototypes = counts[0][0].device, len(counts[0][0])
            used = self._used.get(kind, torch.zeros(num_prototypes + 1)).to(device)
            won = self._won.get(kind, torch.zeros(num_prototypes)).to(device)
            for total, winners in counts:
                used[:-1] += total
                used[-1] += len(winners)
                won.index_fill_(0, winners, 1.0)
            self._used[kind], self._won[kind] = used, won
        self._last = {}


def _pairs(targets: Targets, predictions: Predictions) -> Iterator[tuple[str, list[Pair]]]:
    """The teacher's probabilities and the student's logits of the same things, ``[R, K]`` each."""
    if targets.cls is not None and predictions.global_cls is not None:
        crops = predictions.global_cls.chunk(2)
        yield "cls", [(targets.cls[1], crops[0]), (targets.cls[0], crops[1])]  # as the loss crosses them
    if targets.patches is not None and predictions.patches is not None:
        yield "patch", [(targets.patches, predictions.patches)]


def _spread(kind: str, pairs: list[Pair], student_temp: float) -> dict[str, Tensor]:
    stride = math.ceil(sum(len(teacher) for teacher, _ in pairs) / MAX_ROWS)
    pairs = [(teacher[::stride], student[::stride]) for teacher, student in pairs]
    num_rows, num_prototypes = sum(len(teacher) for teacher, _ in pairs), pairs[0][0].shape[1]
    entropy = torch.stack([torch.special.entr(teacher).sum() for teacher, _ in pairs]).sum() / num_rows
    mean = torch.stack([teacher.sum(dim=0) for teacher, _ in pairs]).sum(dim=0) / num_rows
    crossed = torch.stack([cross_entropy(student, teacher, student_temp).sum() for teacher, student in pairs]).sum()
    return {
        f"teacher_entropy_{kind}": entropy / math.log(num_prototypes),
        f"teacher_information_{kind}": torch.special.entr(mean).sum() - entropy,
        f"kl_{kind}": crossed / num_rows - entropy,
    }
