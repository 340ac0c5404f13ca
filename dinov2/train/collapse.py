"""Named warnings for a run that goes wrong: its numbers, the limits they passed, and what to try.

Every rule looks at one kind of record and says what is wrong, or nothing. A warning is raised when a rule finds fault
several times in a row, once per episode: not again before the rule has found nothing for as many times.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# Targets that tell less than this about their image, in nats, teach nothing. In healthy runs masked patches stay around
# 1 (never below 0.13), while class tokens may come down to 0.08 before they are learnt; with a hundredfold learning
# rate one or both fall below.
LEAST_INFORMATION = {"cls": 0.03, "patch": 0.1}
FALL = 4  # what was never this many times the limit has not collapsed: it has not been learnt yet
LOOKS_AT_TARGETS = 3  # reports in a row
ENTROPY_AT_MAXIMUM, ENTROPY_AT_ZERO = 0.95, 0.05  # as share of log K; these only choose the words
# Directions that are nearly equal have collapsed only if they were not: class tokens of a network whose LayerScale
# starts at 1e-5 begin equal, and part while it learns.
LARGEST_COSINE = 0.99
# A rank below a tenth of its highest value has collapsed, and so has one that is small and below this share of it. That
# of the patches falls in healthy runs too, to 0.3 of what random patches had; that of the class tokens to 0.5.
SMALL_RANK = {"probe_cls_rank": (1 / 3, 8.0), "probe_patch_rank": (1 / 5, 16.0)}
LEAST_LOSS_OF_SCORE = 0.03  # of k-NN below its best, while the loss is lower than then
LOOKS_AT_SCORE = 3  # evaluations in a row

Values = Mapping[str, object]

_TRY_CALMER = "try a lower optim.base_lr (a tenth), a longer optim.warmup_epochs, or a smaller optim.clip_grad"
_KINDS = {"cls": "class tokens", "patch": "masked patches"}
# What is nearly equal, and which option pulls it apart.
_CLS_EQUAL = "class tokens of different images", "dino.koleo_loss_weight"
_PATCHES_EQUAL = "the patches of an image", "ibot.loss_weight"
_TRY_SHARPER = f"try a lower teacher.teacher_temp; else {_TRY_CALMER}"
_TRY_SPREAD = f"try a higher teacher.teacher_temp or train.centering=sinkhorn_knopp; else {_TRY_CALMER}"


@dataclass
class _Episode:
    """Turns the findings of one rule into warnings."""

    patience: int
    bad: int = 0
    good: int = 0
    raised: bool = False

    def see(self, finding: str | None) -> list[str]:
        if finding is None:
            self.good, self.bad = self.good + 1, 0
            self.raised = self.raised and self.good < self.patience
            return []
        self.good, self.bad = 0, self.bad + 1
        if self.raised or self.bad < self.patience:
            return []
        self.raised = True
        return [finding]


@dataclass
class RunWatch:
    """Sees a run's records in order and says when it collapses or overfits.

    It keeps nothing that the records do not tell, so a resumed run builds it anew from its metrics file.

    Args:
        warmup: iterations of the learning rate's warm-up; features are not judged before its end.
        total: iterations of the run; at half of them, targets should have begun to tell something.
        embed_dim: width of the features, for the text.
        num_scored: images or parts behind the k-NN score; few make it noisy, and only a fall above one standard error
            of it (at most half over their square root) counts.
    """

    warmup: int
    total: int
    embed_dim: int
    num_scored: int = 0
    _episodes: dict[str, _Episode] = field(default_factory=dict, init=False)
    _highest: dict[str, float] = field(default_factory=dict, init=False)
    _losses: list[float] = field(default_factory=list, init=False)  # since the last evaluation
    _best: tuple[float, float] | None = field(default=None, init=False)  # best score, and the loss around it

    def see_training(self, record: Values) -> list[str]:
        """Looks at a progress record; returns the warnings that it raises."""
        loss = _number(record, "total_loss")
        if loss is not None:
            self._losses.append(loss)
        warnings = self._see_targets(record)
        met = self._directions_met(record, "teacher_cosine", _CLS_EQUAL)
        if _iteration(record) >= self.warmup:
            warnings += self._judge("teacher_cosine", LOOKS_AT_TARGETS, met)
        return warnings

    def see_evaluation(self, iteration: int, figures: Values, score: tuple[str, float] | None) -> list[str]:
        """Looks at the figures of an evaluation.

        Args:
            iteration: after which it was made, -1 for the start.
            figures: of the probe set.
            score: name and value of the k-NN figure that judges a teacher, more is better; None without labelled sets.

        Returns:
            The warnings that it raises.
        """
        findings = {
            "probe_cls_rank": self._rank_fell(figures, "probe_cls_rank", "class tokens"),
            "probe_patch_rank": self._rank_fell(figures, "probe_patch_rank", "patches"),
            "probe_cls_cosine": self._directions_met(figures, "probe_cls_cosine", _CLS_EQUAL),
            "probe_patch_cosine": self._directions_met(figures, "probe_patch_cosine", _PATCHES_EQUAL),
        }
        warnings = []
        if iteration >= self.warmup:
            for rule, finding in findings.items():
                warnings += self._judge(rule, 1, finding)
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        if score is not None and loss is not None:
            warnings += self._judge("overfitting", LOOKS_AT_SCORE, self._score_falls(*score, loss))
        return warnings

    def _see_targets(self, record: Values) -> list[str]:
        """Looks at what targets tell about their image; judged from the first step, by how far it has fallen."""
        warnings = []
        for kind, limit in LEAST_INFORMATION.items():
            information = _number(record, f"teacher_information_{kind}")
            if information is None:
                continue
            was_learnt = self._raise_highest(f"information_{kind}", information) >= FALL * limit
            silent, late = information < limit, _iteration(record) >= self.total / 2
            fell = targets_say_nothing(record, kind) if silent and was_learnt else None
            warnings += self._judge(f"targets of {kind}", LOOKS_AT_TARGETS, fell)
            never = not_learning(record, kind) if silent and late and not was_learnt else None
            warnings += self._judge(f"learning of {kind}", LOOKS_AT_TARGETS, never)
        return warnings

    def _rank_fell(self, figures: Values, name: str, what: str) -> str | None:
        """Faults features that use far fewer directions than they did."""
        rank = _number(figures, name)
        if rank is None:
            return None
        highest = self._raise_highest(name, rank)
        share, small = SMALL_RANK[name]
        limit = max(highest / 10, min(highest * share, small))
        if rank >= limit:
            return None
        return (
            f"COLLAPSE: effective rank of the {what} fell to {rank:.1f} of {self.embed_dim} (highest {highest:.1f}, "
            f"limit {limit:.1f}): {_TRY_CALMER}"
        )

    def _directions_met(self, values: Values, name: str, words: tuple[str, str]) -> str | None:
        """Faults directions that were apart and are nearly equal now."""
        cosine = _number(values, name)
        if cosine is None:
            return None
        widest = self._raise_highest(name, 1 - cosine)
        if cosine <= LARGEST_COSINE or 1 - cosine > widest / 2:
            return None
        what, more = words
        return (
            f"COLLAPSE: {what} are nearly equal (mean cosine {cosine:.3f}, lowest before {1 - widest:.3f}, limit "
            f"{LARGEST_COSINE}): {_TRY_CALMER}, or a higher {more}"
        )

    def _raise_highest(self, name: str, value: float) -> float:
        self._highest[name] = max(value, self._highest.get(name, 0.0))
        return self._highest[name]

    def _judge(self, rule: str, patience: int, finding: str | None) -> list[str]:
        return self._episodes.setdefault(rule, _Episode(patience)).see(finding)

    def _score_falls(self, name: str, score: float, loss: float) -> str | None:
        if self._best is None or score >= self._best[0]:
            self._best = score, loss
            return None
        best, loss_then = self._best
        limit = max(LEAST_LOSS_OF_SCORE, 0.5 / math.sqrt(max(self.num_scored, 1)))
        if best - score <= limit or loss >= loss_then:
            return None
        return (
            f"OVERFITTING: probe k-NN falls while the loss falls ({name} {score:.3f}, more than {limit:.3f} below its "
            f"best {best:.3f} in {LOOKS_AT_SCORE} evaluations; loss {loss:.4g}, at the best {loss_then:.4g}): the best "
            f"teacher is in eval/best; try fewer optim.epochs, stronger augmentation (crops), or more photos"
        )


def targets_say_nothing(record: Values, kind: str) -> str:
    """Words for targets that are the same for all images, be they uniform, one prototype, or anything between."""
    entropy, information = _number(record, f"teacher_entropy_{kind}") or 0.0, record[f"teacher_information_{kind}"]
    numbers = f"entropy {entropy:.3f} of log K, information {information:.4f} nats, limit {LEAST_INFORMATION[kind]}"
    if entropy >= ENTROPY_AT_MAXIMUM:
        what, remedy = "teacher entropy at its maximum, the targets of {} are uniform", _TRY_SHARPER
    elif entropy <= ENTROPY_AT_ZERO:
        what, remedy = "teacher entropy at zero, one prototype takes all {}", _TRY_SPREAD
    else:
        what, remedy = "the teacher's targets of {} hardly depend on the image any more", _TRY_CALMER
    return f"COLLAPSE: {what.format(_KINDS[kind])} ({numbers}): {remedy}"


def not_learning(record: Values, kind: str) -> str:
    """Words for targets that have told nothing so far."""
    match = _number(record, "crop_match")
    crops = f"; {match:.0%} of the photos' global crops find each other in a batch" if match is not None else ""
    easier = " make crops easier to recognise (larger crops.global_crops_scale, no flips);" if kind == "cls" else ""
    return (
        f"NOT LEARNING: half of the run is over, and targets of {_KINDS[kind]} have hardly depended on the image yet "
        f"(information {record[f'teacher_information_{kind}']:.4f} nats, limit {LEAST_INFORMATION[kind]}{crops}):"
        f"{easier} train longer, or start from pretrained weights (student.pretrained_weights) or a "
        f"student.layerscale of 0.1 to 1"
    )


def _iteration(record: Values) -> int:
    iteration = record["iteration"]
    assert isinstance(iteration, int)
    return iteration


def _number(values: Values, name: str) -> float | None:
    """A finite value; None where it is absent, NaN, or null as NaN is in a metrics file."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
