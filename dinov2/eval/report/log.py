"""Warnings and errors in the logs of a run, alike ones together."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (?P<level>[A-Z]+)\s+(?P<source>\S+:\d+) (?P<text>.*)")
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?", re.IGNORECASE)
_NAMED = re.compile(r"[A-Z]{6,}: ")
_LOUD = ("WARNING", "ERROR", "CRITICAL")
_LONGEST = 4000  # characters of one message
MOST_MESSAGES = 60


@dataclass(frozen=True)
class LogMessage:
    """Messages of one level, place in the code and wording, whatever numbers they hold.

    Attributes:
        level: ``WARNING``, ``ERROR`` or ``CRITICAL``; ``ALARM`` for a warning with a name, such as ``COLLAPSE: …``.
        file: the log, relative to the folder that was searched.
        count: how often it was said.
        first: when it was said first.
        last: when it was said last.
        text: the first one.
        latest: the last one, empty where it reads the same.
    """

    level: str
    file: str
    count: int
    first: str
    last: str
    text: str
    latest: str


@dataclass
class _Entry:
    level: str
    time: str
    text: str


def read_warnings(folders: Sequence[Path]) -> list[LogMessage]:
    """Finds what is above INFO in the ``log/*.txt`` files at any depth of some folders; plain warnings come last."""
    found: list[LogMessage] = []
    seen: set[Path] = set()
    for folder in folders:
        for path in sorted(folder.rglob("log/*.txt")):
            if path.resolve() in seen or not path.is_file():
                continue
            seen.add(path.resolve())
            found += _messages_of(path, str(path.relative_to(folder)))
    return sorted(found, key=lambda message: (message.level == "WARNING", message.first))


def count_warnings(messages: Sequence[LogMessage]) -> int:
    """How many messages there are in all."""
    return sum(message.count for message in messages)


def log_span(run_dir: Path) -> tuple[str, str] | None:
    """When the first and the last line of ``log/log.txt`` were written; None without such lines."""
    path = run_dir / "log" / "log.txt"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        times = [match["time"] for line in file if (match := _LINE.match(line))]
    return (times[0], times[-1]) if times else None


def _messages_of(path: Path, name: str) -> list[LogMessage]:
    groups: dict[tuple[str, str], list[_Entry]] = {}
    counts: dict[tuple[str, str], int] = {}
    for entry in _entries(path):
        key = entry.level, _NUMBER.sub("#", entry.text.split("\n", 1)[0])
        counts[key] = counts.get(key, 0) + 1
        groups.setdefault(key, [entry, entry])[1] = entry
    messages = []
    for key, (first, last) in groups.items():
        latest = "" if first.text == last.text else last.text
        alarm = first.level == "WARNING" and _NAMED.match(first.text) is not None
        messages.append(
            LogMessage("ALARM" if alarm else first.level, name, counts[key], first.time, last.time, first.text, latest)
        )
    return messages


def _entries(path: Path) -> Iterator[_Entry]:
    """The loud messages of one file, each with the lines that follow it up to the next message."""
    entry: _Entry | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            match = _LINE.match(line)
            if match is None:
                if entry is not None and len(entry.text) < _LONGEST:
                    entry.text = f"{entry.text}\n{line.rstrip()}"[:_LONGEST]
                continue
            if entry is not None:
                yield entry
            loud = match["level"] in _LOUD
            entry = _Entry(match["level"], match["time"], match["text"].rstrip()[:_LONGEST]) if loud else None
    if entry is not None:
        yield entry
