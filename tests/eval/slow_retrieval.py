"""The measures of retrieval as their definition reads, one query and one image at a time."""

from collections.abc import Sequence

from dinov2.eval.retrieval.ranking import IGNORED, RELEVANT, WRONG


def slowly(
    similarities: Sequence[float], kinds: Sequence[int], ks: Sequence[int]
) -> tuple[float, list[float], list[float], int, int]:
    """The published definition for one query, word by word.

    Sort the gallery by similarity, of equals the earlier one first. Take junk out. Go down the list: at every relevant
    image, recall rises by one over their number; the precision before it (1 at the very top) and the precision with it
    are averaged, and the area of this step is added. Precision at k is taken at the last relevant image if that comes
    before k.
    """
    order = sorted(range(len(similarities)), key=lambda index: (-similarities[index], index))
    without_junk = [index for index in order if kinds[index] != IGNORED]
    number = sum(kind == RELEVANT for kind in kinds)
    wrong = next((index for index in without_junk if kinds[index] == WRONG), -1)
    if number == 0:
        return float("nan"), [float("nan")] * len(ks), [float("nan")] * len(ks), 0, wrong
    area = 0.0
    found = 0
    ranks = []
    for rank, index in enumerate(without_junk, start=1):
        if kinds[index] == RELEVANT:
            precision_before = found / (rank - 1) if rank > 1 else 1.0
            found += 1
            precision_with = found / rank
            area += (precision_before + precision_with) / 2 * (1 / number)
            ranks.append(rank)
    precisions, recalls = [], []
    for k in ks:
        stop = min(k, max(ranks))
        precisions.append(sum(rank <= stop for rank in ranks) / stop)
        recalls.append(sum(rank <= k for rank in ranks) / number)
    return area, precisions, recalls, ranks[0], wrong
