"""Pictures of what a backbone finds alike: query photos, each beside its nearest neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.features import Features
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.eval.pictures.photo_batches import resize_photos
from dinov2.eval.pictures.picture_grid import Panel, write_panels

RIGHT, WRONG = "#2a7f3e", "#c0392b"
_PANEL_PIXELS = 192
_LONGEST_NAME = 24


@dataclass(frozen=True)
class Neighbour:
    """A photo of the bank: its place there, and its cosine similarity to the query in [-1, 1]."""

    position: int
    similarity: float


def find_neighbours(
    queries: Features, bank: Features, num_neighbours: int, *, other_parts: bool = True
) -> list[list[Neighbour]]:
    """Finds the nearest photos of every query, never the query's own photo (the same path).

    Args:
        queries: embeddings ``[M, D]`` of unit length.
        bank: embeddings ``[N, D]`` of unit length; may hold the queries.
        num_neighbours: at least 1.
        other_parts: whether photos of the query's own part are passed over; they are alike without any knowledge of
            defects.

    Returns:
        For every query at most ``num_neighbours`` photos, the nearest first; of equally near ones, the bank's first.
    """
    places: dict[str, set[int]] = {}
    for names in (bank.paths, bank.group_ids) if other_parts else (bank.paths,):
        for position, name in enumerate(names):
            places.setdefault(name, set()).add(position)
    nothing: set[int] = set()
    passed_over = [
        places.get(path, nothing) | (places.get(part, nothing) if other_parts else nothing)
        for path, part in zip(queries.paths, queries.group_ids, strict=True)
    ]
    asked = min(len(bank), num_neighbours + max(map(len, passed_over)))
    similarities, positions = nearest_neighbours(queries.embeddings, bank.embeddings, asked)
    found = []
    for row, own in enumerate(passed_over):
        pairs = zip(positions[row].tolist(), similarities[row].tolist(), strict=True)
        found.append([Neighbour(*pair) for pair in pairs if pair[0] not in own][:num_neighbours])
    return found


def draw_neighbours(
    queries: Features,
    bank: Features,
    query_photos: ImageDataset,
    bank_photos: ImageDataset,
    *,
    path: str | Path,
    num_neighbours: int = 6,
    other_parts: bool = True,
) -> None:
    """Draws one row per query: the query, then its nearest photos with class, part and similarity above them.

    A frame is green where the neighbour has the query's class, red where it has another, and absent where one of the
    two has no label.

    Args:
        queries: features of ``query_photos``, of unit length.
        bank: features of ``bank_photos``, of unit length.
        query_photos: gives the photos and names the classes.
        bank_photos: the same for the bank; its classes must be those of the queries.
        path: PNG file to write; its folder is created where needed.
        num_neighbours: photos beside each query.
        other_parts: see `find_neighbours`.

    Raises:
        ValueError: when features and photos differ in number, classes differ, there is no query, or
            ``num_neighbours`` is below 1.
    """
    if len(queries) != len(query_photos) or len(bank) != len(bank_photos):
        raise ValueError(
            f"features and photos must belong together: {len(queries)} and {len(query_photos)} queries, "
            f"{len(bank)} and {len(bank_photos)} in the bank"
        )
    if query_photos.classes != bank_photos.classes:
        raise ValueError(f"the classes differ: queries {list(query_photos.classes)}, bank {list(bank_photos.classes)}")
    if len(queries) == 0 or num_neighbours < 1:
        raise ValueError(f"cannot draw {num_neighbours} neighbours of {len(queries)} queries")
    rows: list[Sequence[Panel | None]] = []
    for row, neighbours in enumerate(find_neighbours(queries, bank, num_neighbours, other_parts=other_parts)):
        own = int(queries.labels[row])
        panels: list[Panel | None] = [_panel(query_photos, row, "query", _describe(queries, query_photos, row), None)]
        for neighbour in neighbours:
            label = int(bank.labels[neighbour.position])
            frame = None if min(own, label) < 0 else RIGHT if own == label else WRONG
            title = _describe(bank, bank_photos, neighbour.position)
            panels.append(_panel(bank_photos, neighbour.position, f"{neighbour.similarity:.3f}", title, frame))
        rows.append([*panels, *[None] * (1 + num_neighbours - len(panels))])
    heading = "photos nearest to each query" + (", of other parts" if other_parts else "")
    write_panels(path, rows, heading=f"{heading} (green frame: same class, red: another; number: cosine similarity)")


def _panel(photos: ImageDataset, position: int, first_line: str, title: str, frame: str | None) -> Panel:
    picture = resize_photos([photos.get_image(position)], _PANEL_PIXELS)[0]
    return Panel(picture=picture, title=f"{first_line}\n{title}", frame=frame)


def _describe(features: Features, photos: ImageDataset, position: int) -> str:
    """Class and part of a photo; its file's name where it is a part of its own."""
    label, part = int(features.labels[position]), features.group_ids[position]
    name = Path(part).name if part == features.paths[position] else f"part {part}"
    if label < 0:
        kind = "no label"
    else:
        kind = photos.classes[label] if photos.classes else f"class {label}"
    return f"{_shorten(kind)}\n{_shorten(name)}"


def _shorten(name: str) -> str:
    """The name, or its end where it is long: ends of file names differ, beginnings often do not."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
