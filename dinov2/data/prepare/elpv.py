"""ELPV solar cells as a grouped set."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dinov2.data.datasets.base import DEFAULT_FRACTIONS, Split, check_fractions
from dinov2.data.datasets.elpv import CLASSES, read_cells
from dinov2.data.prepare.grouped_json_writer import GroupedItem, write_grouped_set


def prepare_elpv(
    output: str | Path,
    seed: int = 0,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    *,
    root: str | Path | None = None,
    link: bool = False,
) -> None:
    """Writes the ELPV set as ``output/{train,val,test}/cell0001.png`` with annotations.

    A cell is defective where its defect probability is at least one half; ``defect_probability`` and ``cell_type`` are
    kept in each row. Splits hold equal shares of each label and cell type; the group is a hash of the pixels, so that
    the same picture never lies in two splits. Doing it again changes nothing.

    Args:
        output: new or empty folder.
        seed: draws the splits.
        fractions: shares of train, val and test.
        root: folder with the set's ``labels.csv``; by default that of the installed package ``elpv-dataset``.
        link: link to the source images instead of copying them.

    Raises:
        FileNotFoundError: when the set is not installed.
        ValueError: for a broken set, bad fractions, or an ``output`` that holds anything else.
    """
    fractions = check_fractions(fractions)
    write_grouped_set(
        output,
        _items(root, seed, fractions),
        metainfo={"classes": list(CLASSES)},
        tool="prepare_elpv",
        settings={"seed": seed, "fractions": fractions},
        link=link,
    )


def _items(root: str | Path | None, seed: int, fractions: Sequence[float]) -> Iterator[tuple[Split, GroupedItem]]:
    cells = read_cells(root)
    labels = cells.labels.tolist()
    for row, number in enumerate(cells.split(seed, fractions).tolist()):
        split = list(Split)[number]
        target = f"{split}/{Path(cells.paths[row]).name}"
        annotation = {
            "img_path": target,
            "gt_label": labels[row],
            "group_id": cells.groups[row],
            "defect_probability": float(cells.probabilities[row]),
            "cell_type": cells.types[row],
        }
        yield split, GroupedItem(annotation, {target: cells.root / cells.paths[row]})
