"""Log messages: to the terminal for rank 0, to one file per rank for all."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov2.utils.untrusted_text import printable

LOGGER_NAME = "dinov2"
_HANDLER_PREFIX = "dinov2."


_BEGINNING = re.compile(r"\n(?=\d{2}:\d{2}:\d{2} |\d{4}-\d{2}-\d{2} )")


def _harmless(text: str) -> str:
    """A line of the log that steers no terminal, with no name in it that looks like another line."""
    return _BEGINNING.sub("\n  ", printable(text))


class _ConsoleFormatter(logging.Formatter):
    """``12:04:31 message``, with the level named only when it matters."""

    def __init__(self, speaker: str = "") -> None:
        super().__init__(f"%(asctime)s {speaker}%(message)s", datefmt="%H:%M:%S")
        self._loud = logging.Formatter(f"%(asctime)s {speaker}%(levelname)s: %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return _harmless(self._loud.format(record) if record.levelno >= logging.WARNING else super().format(record))


class _FileFormatter(logging.Formatter):
    """``2026-11-20 12:04:31,123 INFO    train.py:87 message``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(filename)s:%(lineno)d %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return _harmless(super().format(record))


class _PatientFileHandler(logging.FileHandler):
    """A log file whose disk may be full or gone for a while, which costs one line on the terminal, and no traceback.

    The newest messages, a few thousand bytes, wait in the buffer of the file; further ones are lost.
    """

    _complained = False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        super().emit(record)
        self._complained = self._complained and self._failed

    def handleError(self, record: logging.LogRecord) -> None:
        self._failed = True
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._complain(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            with contextlib.suppress(OSError):
                sys.stderr.write(f"the log {self.baseFilename} cannot be written: {error}\n")


def setup_logging(output_dir: Path | None, rank: int = 0, *, level: int = logging.INFO) -> None:
    """Sends the messages of the "dinov2" logger to the terminal and to a file; the root logger is left alone.

    Rank 0 writes to standard error and to ``output_dir/log/log.txt``, rank r to ``log.rank_{r}.txt`` there only. A rank
    above 0 without a file still shows its warnings on the terminal, so that none is lost. Files are appended to, so a
    resumed run goes on in the same log. A second call replaces what the first one set up.

    Args:
        output_dir: the run's folder, created where needed; None for no file.
        rank: number of this process, from 0.
        level: lowest level that is written.
    """
    close_logging()
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(level)
    logger.propagate = False  # a root handler that some library installed would print every line twice
    if rank == 0 or output_dir is None:
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING if rank else logging.NOTSET)
        # Tracebacks are for the file: whoever catches the error tells the terminal.
        console.addFilter(lambda record: record.exc_info is None)
        _add(logger, console, "console", _ConsoleFormatter(f"[rank {rank}] " if rank else ""))
    if output_dir is not None:
        path = Path(output_dir) / "log" / ("log.txt" if rank == 0 else f"log.rank_{rank}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        _add(logger, _PatientFileHandler(path, encoding="utf-8"), "file", _FileFormatter())


def close_logging() -> None:
    """Closes what `setup_logging` opened and gives the logger its defaults back; handlers of others stay."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in [handler for handler in logger.handlers if (handler.name or "").startswith(_HANDLER_PREFIX)]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@contextmanager
def logging_to(output_dir: Path | None, rank: int = 0, *, level: int = logging.INFO) -> Iterator[logging.Logger]:
    """`setup_logging` for the length of a ``with`` block; yields the logger. A failure's traceback goes to the file."""
    setup_logging(output_dir, rank, level=level)
    logger = logging.getLogger(LOGGER_NAME)
    try:
        yield logger
    except Exception:
        logger.error("the command failed", exc_info=True)
        raise
    finally:
        close_logging()


def _add(logger: logging.Logger, handler: logging.Handler, name: str, formatter: logging.Formatter) -> None:
    handler.set_name(_HANDLER_PREFIX + name)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
