"""Did a pretraining run learn? The answer that its records give, with every number that it rests on in words."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Targets that tell less than this about their image, in nats, teach nothing. In healthy runs masked patches stay around
# 1 (never below 0.13), while class tokens may come down to 0.08 before they are learnt; with a hundredfold learning
# rate one or both fall below.
MIN_INFORMATION = {"cls": 0.03, "patch": 0.1}
FALL = 4  # what was never this many times the limit has not collapsed: it has not been learnt yet
# A rank below a tenth of its highest value has collapsed, and so has one that is small and below this share of it. In
# healthy runs both fall to 0.3 of it as well, but stay above what is small.
SMALL_RANK = {"probe_cls_rank": (1 / 3, 8.0), "probe_patch_rank": (1 / 5, 16.0)}
# Directions that are nearly equal have collapsed only if they were not: class tokens of a network whose LayerScale
# starts at 1e-5 begin equal, and part while it learns.
MAX_COSINE = 0.99
MIN_SCORE_DROP = 0.03  # of k-NN below its best
MIN_RANK = 2.0  # below it, there is one direction; class tokens may begin so, see `MAX_COSINE`
# Over the chance, as share of what there is between chance and 1. Of 512 pairs in batches of 16, chance itself stays
# below 0.02; a recipe under which the class token learnt nothing stayed at 0.03.
MIN_CROP_MATCH = 0.05
# Similarities of patches change by 0.1 to 0.3 within a hundred steps of learning; with a learning rate of 1e-9 by less
# than 0.001.
MIN_DRIFT = 0.01
# From scratch in a few hundred steps, a teacher that lagged by a fifth of the run, patches of 32 pixels and twice the
# learning rate each cost 0.03 of k-NN's accuracy on steel strip, and together most of what there was to learn.
MAX_LAG = 0.1  # of the run
SHORT_LAG = 12.0  # iterations, of which no run is too short
MAX_PATCH = 16  # pixels
SHORT_RUN, MAX_SHORT_RATE = 3_600, 0.003  # iterations; peak learning rate for a batch of 1024, by the square root

DEFAULT_METRICS = ("part_auroc", "part_balanced_accuracy")  # the first that there is: AUROC needs two classes
COMPARISON = "comparison"  # of an evaluation's record, see `dinov2.train.baselines`
RANDOM, STATISTICS, START = "random", "image_statistics", "start"
BASELINE_NAMES = {
    RANDOM: "a random backbone of the same shape",
    STATISTICS: "simple image statistics",
    START: "the weights that it started from",
}
KINDS = {"cls": "class tokens", "patch": "masked patches"}
GOOD, WARN, BAD = "good", "warn", "bad"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A number of a run with a word on it; ``tone`` is good, warn, bad, or empty where it decides nothing."""

    name: str
    value: str
    remark: str
    tone: str = ""


@dataclass(frozen=True)
class Learning:
    """The answer to whether a run learnt: a sentence, its tone, and what it rests on."""

    answer: str
    tone: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        rows = [(f"  {one.name}", one.value, one.remark) for one in self.findings]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
        lines = [f"{name:{widths[0]}}  {value:{widths[1]}}  {remark}" for name, value, remark in rows]
        return "\n".join([f"Did it learn? {self.answer}", *lines])


def finite_number(values: Record, name: str) -> float | None:
    """A finite value; None where it is absent, NaN, or null as NaN is in a metrics file."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def score_of(metrics: Mapping[str, float], metric: str = "") -> tuple[str, float] | None:
    """Picks the metric that decides which teacher is best.

    Args:
        metrics: by name, such as ``knn_part_auroc_k10``.
        metric: ``part_auroc_k10`` for one k, ``part_auroc`` for the mean over all k, which is steadier; empty for
            ``part_auroc`` where there are two classes, else ``part_balanced_accuracy``.

    Returns:
        Name and value; None where there is no such metric.
    """
    for name in (metric,) if metric else DEFAULT_METRICS:
        pattern = re.compile(rf"knn_{re.escape(name)}" + ("" if re.search(r"_k\d+$", name) else r"_k\d+"))
        values = [value for key, value in metrics.items() if pattern.fullmatch(key)]
        if values:
            return name, sum(values) / len(values)
    return None


def metric_words(metric: str) -> str:
    """What people call a metric such as ``part_auroc`` or ``image_accuracy_k10``."""
    level, _, name = re.sub(r"_k\d+$", "", metric).partition("_")
    return f"{name.replace('_', ' ').replace('auroc', 'AUROC')} per {level}"


def smallest_drop(num_scored: float) -> float:
    """How far a score of so many images or parts must fall before that says something: one standard error of it."""
    return max(MIN_SCORE_DROP, 0.5 / math.sqrt(max(num_scored, 1)))


def rank_limit(name: str, highest: float) -> float:
    """The effective rank below which features have collapsed that once had the highest."""
    share, small = SMALL_RANK[name]
    return max(highest / 10, min(highest * share, small))


def did_it_learn(
    records: Sequence[Record],
    *,
    batch_size: int | None = None,
    total_iterations: int | None = None,
    best_metric: str = "",
    from_pretrained: bool = False,
    patch_size: int | None = None,
    compared: Sequence[Record] = (),
) -> Learning | None:
    """Answers from the records of a pretraining run, finished or not, what it learnt.

    Without labels the answer rests on crops that find each other, on ranks, on what the targets tell, and on how far
    patches have moved; these say whether the method worked, not whether its features are of use. With labels the
    comparison with a random backbone and with simple image statistics decides: that of k-NN at the last evaluation, and
    those of evaluators.

    Args:
        records: of ``metrics.jsonl``; values may be missing or null.
        batch_size: images per process, from which the chance that crops find each other follows; None if not known.
        total_iterations: length of the run; None if not known.
        best_metric: ``evaluation.best_metric`` of the run, see `score_of`.
        from_pretrained: whether the run started from weights that had learnt already.
        patch_size: longer side of a patch in pixels; None if not known.
        compared: what evaluators found of the run's teacher, each as the ``comparison`` of an evaluation's record, with
            ``evaluator``, and with ``untold`` where something speaks against telling.

    Returns:
        The answer; None where nothing was recorded that tells.
    """
    numbered = [record for record in records if isinstance(record.get("iteration"), int)]
    numbered.sort(key=lambda record: record["iteration"])
    reports = [record for record in numbered if "evaluation" not in record]
    evaluations = [record for record in numbered if isinstance(record.get("evaluation"), Mapping)]
    done = max((record["iteration"] + 1 for record in numbered), default=0)
    if done == 0:
        return None
    labelled, verdicts, fell = _labelled(evaluations, best_metric, compared)
    ranks, collapsed = _ranks(evaluations)
    information, silent, fallen = _information(reports)
    crops, recognised = _crops(reports, batch_size)
    drift, moved = _drift(evaluations)
    findings = (*labelled, *crops, *ranks, *information, *drift)
    if not findings:
        return None
    doubts, changes = ([], []) if from_pretrained else _recipe(reports, total_iterations, patch_size)
    answer, tone = _answer(
        verdicts,
        fell,
        collapsed=[*collapsed, *fallen],
        silent=silent,
        recognised=recognised,
        moved=moved,
        from_pretrained=from_pretrained,
    )
    if tone != GOOD and total_iterations and done < total_iterations / 2 and not (collapsed or fallen):
        answer, tone = f"It is too early to tell. {answer}", WARN
    if changes and not (verdicts and tone == GOOD):
        answer += f" To change: {'; '.join(changes)}."
    if total_iterations and done < total_iterations:
        answer = f"After {done} of {total_iterations} iterations: {answer}"
    return Learning(answer, tone, (*findings, *doubts))


def _answer(
    verdicts: Sequence[tuple[str, str]],
    fell: str,
    *,
    collapsed: Sequence[str],
    silent: Sequence[str],
    recognised: bool | None,
    moved: bool | None,
    from_pretrained: bool,
) -> tuple[str, str]:
    """The sentence and its tone, from what the findings came to."""
    told = dict.fromkeys(sentence for tone, sentence in verdicts if tone)
    tones = {tone for tone, _ in verdicts if tone}
    is_good = tones == {GOOD}
    if collapsed and not is_good:
        return f"No, it collapsed: {'; '.join(collapsed)}.{fell}", BAD
    if moved is False and not (is_good and not from_pretrained):
        return "No: features are what they were at the start, as patches have hardly changed.", BAD
    if tones:
        start = "Yes" if is_good else "In part" if GOOD in tones else "Hardly" if WARN in tones else "No sign of it"
        but = f" But it shows signs of collapse: {'; '.join(collapsed)}." if collapsed else ""
        if is_good and from_pretrained and not any(BASELINE_NAMES[START] in sentence for sentence in told):
            but += f" Whether it is better than {BASELINE_NAMES[START]} was not measured."
        tone = (WARN if but or fell else GOOD) if is_good else BAD if tones == {BAD} else WARN
        return f"{start}: {'; '.join(told)}.{fell}{but}", tone
    if len(silent) == len(KINDS):
        return "No: the targets tell nothing about their images.", BAD
    if silent or recognised is False:
        which = [f"the targets of {kind} tell nothing about their images" for kind in silent]
        which += ["the crops of an image do not find each other"] if recognised is False else []
        return f"In part at best: {' and '.join(which)}.", WARN
    use = (
        f"Whether they are of use cannot be told, as {verdicts[0][1]}."
        if verdicts
        else "Whether they are of use only labels can say (evaluation.train_dataset_path and "
        "evaluation.val_dataset_path, or results of an evaluator)."
    )
    known = [recognised is True, moved is True]
    if not any(known):
        return f"Nothing measured says so. {use}", WARN
    return (f"The method worked: it does not look collapsed, and features have changed. {use}{fell}"), GOOD if all(
        known
    ) else WARN


def _recipe(
    reports: Sequence[Record], total_iterations: int | None, patch_size: int | None
) -> tuple[list[Finding], list[str]]:
    """What of a run's schedule and network hindered runs from scratch, and the options that change it."""
    found = []
    momentum, rate = ([value for _, value in _course(reports, name)] for name in ("momentum", "lr"))
    if total_iterations and momentum and min(momentum) < 1:
        lag = 1 / (1 - min(momentum))
        if lag > max(MAX_LAG * total_iterations, SHORT_LAG):
            remark = f"more than a tenth of the run's {total_iterations}: the teacher hardly follows"
            auto = "teacher.momentum_teacher=auto teacher.final_momentum_teacher=auto"
            found.append((Finding("lag of the teacher", f"{lag:.0f} iterations", remark, WARN), auto))
    if patch_size and patch_size > MAX_PATCH:
        remark = f"above {MAX_PATCH}: fine texture is lost in them"
        smaller = f"student.patch_size={MAX_PATCH}, with crops of a multiple of it"
        found.append((Finding("side of a patch", f"{patch_size} pixels", remark, WARN), smaller))
    if rate and total_iterations and total_iterations <= SHORT_RUN:
        most = MAX_SHORT_RATE * math.sqrt((finite_number(reports[-1], "batch_size") or 1024) / 1024)
        if max(rate) > most:
            remark = f"above {most:.2g}, which short runs from scratch bear with this batch"
            auto = "optim.base_lr=auto optim.lr=0"
            found.append((Finding("highest learning rate", f"{max(rate):.2g}", remark, WARN), auto))
    return [finding for finding, _ in found], [change for _, change in found]


def _course(records: Sequence[Record], name: str) -> list[tuple[int, float]]:
    """Iterations and finite values of a metric."""
    found = ((record["iteration"], finite_number(record, name)) for record in records)
    return [(iteration, value) for iteration, value in found if value is not None]


def _first_and_last(course: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The first report, and the mean of the last tenth of all: one report may hold few images."""
    last = [value for _, value in course[-max(1, len(course) // 10) :]]
    return course[0][1], sum(last) / len(last)


def _crops(reports: Sequence[Record], batch_size: int | None) -> tuple[list[Finding], bool | None]:
    """How often crops of an image find each other, and whether that is more than chance."""
    course = _course(reports, "crop_match")
    if not course:
        return [], None
    first, last = _first_and_last(course)
    name, value = "crops that find each other", f"{last:.3f}"
    if batch_size is None or batch_size < 2:
        return [Finding(name, value, f"{first:.3f} in the first report; chance is not known")], None
    chance = 1 / batch_size
    value = f"{value} (chance {chance:.3f})"
    above, before = ((share - chance) / (1 - chance) for share in (last, first))
    if above < MIN_CROP_MATCH:
        return [Finding(name, value, "at chance: the class token tells no image from another", BAD)], False
    if above < before / 2:
        return [Finding(name, value, f"above chance, but fallen from {first:.3f} in the first report", WARN)], True
    how = "up" if above > before + MIN_CROP_MATCH else "down" if above < before - MIN_CROP_MATCH else "little changed"
    tone = GOOD if how == "up" else ""
    return [Finding(name, value, f"above chance, {how} from {first:.3f} in the first report", tone)], True


def _ranks(evaluations: Sequence[Record]) -> tuple[list[Finding], list[str]]:
    """Effective ranks of the features, and which of them have collapsed."""
    metrics = [{"iteration": record["iteration"], **record["evaluation"]} for record in evaluations]
    findings, collapsed = [], []
    for name, what in (("probe_cls_rank", "class tokens"), ("probe_patch_rank", "patches")):
        course = _course(metrics, name)
        if not course or course[-1][0] < 0:
            continue
        first, last, highest = course[0][1], course[-1][1], max(value for _, value in course)
        limit = rank_limit(name, highest)
        cosine = _course(metrics, name.replace("rank", "cosine"))
        # Class tokens of a network with a small LayerScale begin nearly equal.
        widest = max((1 - value for _, value in cosine), default=0.0)
        equal = widest >= 1 - MAX_COSINE and 1 - cosine[-1][1] < min(1 - MAX_COSINE, widest / 2)
        remark, tone = f"not collapsed; {first:.1f} at the start", GOOD
        if last < limit:
            remark, tone = f"collapsed: below {limit:.1f}, and it was {highest:.1f}", BAD
        elif equal:
            remark, tone = f"collapsed: nearly equal, mean cosine {cosine[-1][1]:.3f}", BAD
        elif last < MIN_RANK:
            remark, tone = f"one direction only, from {first:.1f} at the start: all look the same", WARN
        elif last < highest / 2:
            remark = f"down from {highest:.1f}, as usual; below {limit:.1f} it would have collapsed"
        if tone == BAD:
            collapsed.append(what)
        findings.append(Finding(f"effective rank of {what}", f"{last:.1f}", remark, tone))
    return findings, [f"{' and '.join(collapsed)} use hardly any directions"] if collapsed else []


def _information(reports: Sequence[Record]) -> tuple[list[Finding], list[str], list[str]]:
    """What the targets tell; which kinds tell nothing, and which of these told something before."""
    findings, silent, fallen = [], [], []
    for kind, limit in MIN_INFORMATION.items():
        course = _course(reports, f"teacher_information_{kind}")
        if not course:
            continue
        first, last = _first_and_last(course)
        remark, tone = f"the targets tell images apart ({first:.3f} in the first report, limit {limit})", GOOD
        if last < limit:
            remark, tone = f"nothing: below {limit}, the targets are the same for all images", BAD
            silent.append(KINDS[kind])
            if max(value for _, value in course) >= FALL * limit:
                fallen.append(KINDS[kind])
        findings.append(Finding(f"information of {KINDS[kind]}", f"{last:.3f} nats", remark, tone))
    said = f"the targets of {' and '.join(fallen)} do not depend on the image any more"
    return findings, silent, [said] if fallen else []


def _drift(evaluations: Sequence[Record]) -> tuple[list[Finding], bool | None]:
    """How far patches have moved since the start, and whether that is more than nothing."""
    metrics = [{"iteration": record["iteration"], **record["evaluation"]} for record in evaluations]
    course = [(iteration, value) for iteration, value in _course(metrics, "probe_patch_drift") if iteration >= 0]
    if not course:
        return [], None
    last = course[-1][1]
    moved = last >= MIN_DRIFT
    remark = "patches have changed since the start" if moved else f"hardly changed: below {MIN_DRIFT}"
    return [Finding("drift of patch similarities", f"{last:.3f}", remark, GOOD if moved else BAD)], moved


def _labelled(
    evaluations: Sequence[Record], best_metric: str, compared: Sequence[Record]
) -> tuple[list[Finding], list[tuple[str, str]], str]:
    """The scores and what they have to beat; tone and sentence of each comparison; and whether k-NN was better once."""
    scored = [(record["iteration"], record["evaluation"]) for record in evaluations]
    course = []
    for iteration, metrics in scored:
        finite = {name: value for name in metrics if (value := finite_number(metrics, name)) is not None}
        found = score_of(finite, best_metric)
        if found is not None:
            course.append((iteration, *found))
    findings: list[Finding] = []
    fell, by_labels = "", list(compared)
    if course:
        comparison = scored[-1][1].get(COMPARISON) if scored[-1][0] == course[-1][0] else None
        comparison = comparison if isinstance(comparison, Mapping) else {}
        metric, last = course[-1][1:]
        best_at, _, best = max(course, key=lambda one: one[2])
        limit = smallest_drop(finite_number(comparison, "count") or math.inf)
        remark, tone = f"mean over all k; {course[0][2]:.3f} at the first evaluation", ""
        if best - last > limit:
            remark, tone = f"mean over all k; fallen from {best:.3f} after iteration {best_at}", WARN
            fell = f" It was better after iteration {best_at}, whose teacher eval/best keeps."
        findings.append(Finding(f"k-NN {metric_words(metric)}", f"{last:.3f}", remark, tone))
        if comparison:
            by_labels.insert(0, comparison)
        elif not compared:
            findings.append(Finding("what k-NN has to beat", "-", "was not measured at the last evaluation"))
            return findings, [("", "what k-NN has to beat was not measured")], fell
    verdicts = []
    for one in by_labels:
        lines, tone, sentence = _compared(one)
        findings += lines
        verdicts += [(tone, sentence)] if sentence else []
    return findings, verdicts, fell


def _compared(comparison: Record) -> tuple[list[Finding], str, str]:
    """One line for every number that has to be beaten; tone and sentence on which were, or, without tone, why not."""
    score = finite_number(comparison, "score")
    evaluator = str(comparison.get("evaluator", "k-NN"))
    words = metric_words(str(comparison.get("metric", "")))
    few = comparison.get("too_few")
    why = f"too few parts to tell ({few})" if few else str(comparison.get("untold", ""))
    findings = []
    if score is not None:
        low, between, untold = _told(comparison, why, "")
        chance = finite_number(comparison, "chance")
        remark, tone = between, ""
        if chance is not None:
            is_above = low is not None and low > chance
            said = "chance is" if untold else "above chance," if is_above else "not distinguishable from chance,"
            remark = "; ".join(filter(None, (f"{said} {chance:.3f}", untold, between)))
            tone = "" if untold or is_above else BAD
        name = f"{evaluator} {words}, {str(comparison.get('variant', '')).replace('=', ' = ')}"
        findings.append(Finding(name, f"{score:.3f}", remark, tone))
    beaten, unbeaten, unknown = [], [], ""
    for name, described in BASELINE_NAMES.items():
        found = comparison.get(name)
        if not isinstance(found, Mapping):
            continue
        value, gain, high = (finite_number(found, key) for key in ("score", "gain", "high"))
        if value is None or gain is None:
            continue
        low, between, untold = _told(found, why, "+")
        if untold:
            unknown, remark, tone = untold, untold, ""
        elif low is not None and low > 0:
            beaten.append(described)
            remark, tone = "better", GOOD
        else:
            unbeaten.append(name)
            worse = high is not None and high < 0
            remark, tone = "worse" if worse else "no better", BAD if worse or name != STATISTICS else WARN
        said = ", ".join(filter(None, (f"{remark}: {gain:+.3f}", between)))
        findings.append(Finding(f"against {described}", f"{value:.3f}", said, tone))
    if unbeaten:
        sentence = f"{evaluator} is no better than {' and than '.join(BASELINE_NAMES[name] for name in unbeaten)}"
        return findings, WARN if unbeaten == [STATISTICS] else BAD, sentence
    if unknown:
        return findings, "", f"there {'are' if 'too few' in unknown else 'is'} {unknown}"
    return findings, GOOD if beaten else "", f"{evaluator} is better than {' and than '.join(beaten)}" if beaten else ""


def _told(values: Record, why: str, sign: str) -> tuple[float | None, str, str]:
    """Lower end of an interval, the interval in words, and why it decides nothing; empty where it does."""
    low, high = (finite_number(values, key) for key in ("low", "high"))
    between = "" if low is None or high is None else f"95 % interval {low:{sign}.3f} to {high:{sign}.3f}"
    return low, between, why or ("" if between else "no interval to tell by")
