"""What the figures of evaluators mean, in words for people who inspect parts."""

import re

_ESCAPES = "share of defects that are missed when {} good ones may be rejected; small is good"
MEANINGS = {
    "accuracy": ("accuracy", "share of all that is classified rightly; says little where defects are rare"),
    "balanced_accuracy": ("balanced accuracy", "mean over the classes of the share that is classified rightly"),
    "precision": ("precision", "share of alarms that are justified (several classes: mean over them)"),
    "recall": ("recall", "share of defects that are found (several classes: mean over them)"),
    "f1": ("F1", "harmonic mean of precision and recall"),
    "auroc": ("AUROC", "chance that a defective one scores higher than a good one; guessing gives 0.5"),
    "average_precision": ("average precision", "mean precision over thresholds; guessing gives the share of defects"),
    "escape_rate_at_0.1": ("escapes at 0.1 % false alarms", _ESCAPES.format("1 in 1000")),
    "escape_rate_at_1": ("escapes at 1 % false alarms", _ESCAPES.format("1 in 100")),
    "escape_rate_at_5": ("escapes at 5 % false alarms", _ESCAPES.format("1 in 20")),
    "top5": ("top 5", "share whose class is among the five most probable"),
    "map": ("mAP", "how far in front the photos that belong together stand when all are ranked"),
}
# What stands side by side in the table of all results: figures of classifications, and those of rankings.
FIGURE_GROUPS = (
    ("balanced_accuracy", "auroc", "average_precision", "escape_rate_at_1", "top5"),
    ("map", "mp@1", "mp@5", "mp@10", "recall@10"),
)
KEY_FIGURES = tuple(name for group in FIGURE_GROUPS for name in group)
MOST_FIGURES = 7  # of results that have none of these
_AT_RANK = re.compile(r"(mp|recall)@(\d+)")
_MEANINGS_AT_RANK = {
    "mp": "share of the nearest photos that belong to the query",
    "recall": "share of the photos which belong to the query that are among the nearest",
}
EVALUATORS = {
    "knn": "k-NN",
    "linear": "linear classifier",
    "log_regression": "logistic regression",
    "retrieval": "retrieval",
}


def name_of(figure: str) -> str:
    """What people call a figure."""
    if figure in MEANINGS:
        return MEANINGS[figure][0]
    if match := _AT_RANK.fullmatch(figure):
        what = "precision" if match[1] == "mp" else "recall"
        return f"{what} of the nearest" + ("" if match[2] == "1" else f" {match[2]}")
    return figure.replace("_", " ")


def meaning_of(figure: str) -> str:
    """One line on what a figure says; empty for an unknown one."""
    if figure in MEANINGS:
        return MEANINGS[figure][1]
    if match := _AT_RANK.fullmatch(figure):
        return _MEANINGS_AT_RANK[match[1]]
    return ""
