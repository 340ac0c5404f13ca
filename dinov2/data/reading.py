"""Reading image files: names in either form of Unicode, what cannot be read, a cache in memory, a limit of time."""

import functools
import itertools
import logging
import os
import queue
import threading
import unicodedata
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger("dinov2")

T = TypeVar("T")

_MOST_NAMES = 20_000  # of a folder, looked at for one like a missing file's


class UnreadableImageError(OSError):
    """An image that cannot be shown: missing, empty, truncated, no image, or too large.

    Attributes:
        path: the file, as it was named.
        cause: what is wrong with it.
    """

    def __init__(self, path: str | Path, cause: str) -> None:
        """Names the file and the cause."""
        super().__init__(f"cannot read image {path}: {cause}")
        self.path = str(path)
        self.cause = cause

    def __reduce__(self) -> tuple[type["UnreadableImageError"], tuple[str, str]]:
        """Lets the error travel from a worker process."""
        return type(self), (self.path, self.cause)


def read_image_bytes(path: str | Path) -> bytes:
    """Reads a whole file; of a name whose accents are stored in the other form of Unicode, the file that is there.

    Raises:
        UnreadableImageError: when it is missing, a folder, or cannot be read.
    """
    try:
        return find_file(Path(path)).read_bytes()
    except FileNotFoundError:
        raise UnreadableImageError(path, f"no such file{_near_name(Path(path))}") from None
    except IsADirectoryError:
        raise UnreadableImageError(path, "it is a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UnreadableImageError(path, str(error)) from error


def find_file(path: Path) -> Path:
    """The path as it is on disk: macOS stores ``ö`` as ``o`` and an accent, lists mostly name it as one character.

    A path that is there, or in neither form, is given back as it is.
    """
    text = str(path)
    if text.isascii() or path.exists():
        return path
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        inner = next((found / form for form in forms if (found / form).exists()), None)
        if inner is None:
            return path
        found = inner
    _say_form(str(path.parent))
    return found


@functools.cache  # said once per folder and process
def _say_form(folder: str) -> None:
    logger.info("%s: names are stored in another form of Unicode (accents composed or decomposed) than listed", folder)


def _near_name(path: Path) -> str:
    """Names a file beside a missing one that differs in capitals, form of Unicode or ending only; empty without one."""

    def fold(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    try:
        with os.scandir(path.parent) as entries:
            listed = itertools.islice(entries, _MOST_NAMES)
            names = [entry.name for entry in listed if entry.name != path.name]  # itself: a link to nothing
    except (OSError, ValueError):
        return ""
    near = next((name for name in names if fold(name) == fold(path.name)), None)
    if near is None:
        alike = sorted(name for name in names if fold(Path(name).stem) == fold(path.stem))
        return f"; the folder has {' and '.join(map(repr, alike[:2]))}: is the ending wrong?" if alike else ""
    composed = [unicodedata.normalize("NFC", name) for name in (near, path.name)]
    reason = "Unicode normalisation, composed or decomposed accents," if composed[0] == composed[1] else "capitals"
    return f"; the folder has {near!r}, which differs in {reason} only"


class ByteCache:
    """Keeps encoded files in memory until a budget is used up; what came later is read from disk each time.

    Each process fills its own copy. A cache filled before workers are forked is shared with them. Threads may read it
    at once: at worst a file is read twice.
    """

    def __init__(self, budget_bytes: int) -> None:
        """Starts empty.

        Args:
            budget_bytes: largest sum of the sizes of kept files.
        """
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes must not be negative, got {budget_bytes}")
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._files: dict[str, bytes] = {}
        self._full = False

    def __len__(self) -> int:
        """Number of kept files."""
        return len(self._files)

    def read(self, path: str | Path, read: Callable[[str | Path], bytes] = read_image_bytes) -> bytes:
        """Content of a file, from memory when it is kept there.

        Args:
            path: key of the file.
            read: fetches the content of a file that is not kept.

        Raises:
            UnreadableImageError: when the file cannot be read.
        """
        key = str(path)
        data = self._files.get(key)
        if data is not None:
            return data
        data = read(path)
        if not self._full:
            if self.used_bytes + len(data) > self.budget_bytes:
                self._full = True
            elif self._files.setdefault(key, data) is data:
                self.used_bytes += len(data)
        return data


class Deadline:
    """Runs one call after another in a thread of its own; a call that takes too long is left behind with its thread.

    Works in any thread and process (a fork makes a thread of its own), and needs no signals. A thread that hangs in the
    system cannot be ended, but keeps no process from ending.

    Args:
        seconds: longest time of a call; 0 for no limit, and no thread.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process = 0
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, call: Callable[..., T], *arguments: Any) -> T:
        """Returns or raises what ``call(*arguments)`` does.

        Raises:
            TimeoutError: it has not ended in time.
        """
        if self.seconds <= 0:
            return call(*arguments)
        if self._process != os.getpid():
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name="reads images", daemon=True).start()
            weakref.finalize(self, self._calls.put, None)  # the thread ends with this object
            self._process = os.getpid()
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._calls.put((call, arguments, answer))
        try:
            value, error = answer.get(timeout=self.seconds)
        except queue.Empty:
            self._process = 0  # the next call gets a new thread
            self._calls.put(None)  # should this one ever come back, it ends
            raise TimeoutError(f"given up after {self.seconds:g} s (data.read_timeout_seconds)") from None
        if error is not None:
            raise error
        result: T = value
        return result

    def __reduce__(self) -> tuple[type["Deadline"], tuple[float]]:
        """Threads do not travel to other processes: what is unpickled begins without one."""
        return Deadline, (self.seconds,)


def _serve(calls: "queue.SimpleQueue[Any]") -> None:
    while (task := calls.get()) is not None:
        call, arguments, answer = task
        try:
            answer.put((call(*arguments), None))
        except BaseException as error:
            answer.put((None, error))
        del call, arguments, answer, task  # an image is not kept until the next one
