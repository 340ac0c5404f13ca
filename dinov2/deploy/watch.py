"""The command that predicts for the images that a line drops into a folder: ``dinov2 watch FOLDER --to PLACE``.

What happens to a file is told by where it lies, so that a process that is killed at any instant loses nothing and does
nothing twice:

1. ``FOLDER/part.png``: it came. When it has not changed for a while, it gets a key of its own and is renamed to
2. ``FOLDER/.dinov2_watch/KEY``: it is worked on, also after a restart. When its result has arrived, it is renamed to
3. ``FOLDER/done/KEY``, or to ``FOLDER/failed/KEY`` where it is no image, or the model fails on it.

In a folder of results the file ``KEY.json`` appears at once, so each image has one result there: what finds it
after a restart does not predict again. Elsewhere the same message may arrive twice, with the same key.
"""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.scan import is_image_name
from dinov2.data.reading import UnreadableImageError, read_image_bytes
from dinov2.deploy.delivery import RefusedError, Target, open_target
from dinov2.deploy.deployed import open_model
from dinov2.logging import logging_to
from dinov2.predict.images import DEVICES, open_image
from dinov2.predict.predictor import Predictor
from dinov2.tasks.predictions import Prediction
from dinov2.tasks.task import PreparedImage
from dinov2.utils.errors import RunError
from dinov2.utils.files import lock_file
from dinov2.utils.interruption import Interruption

logger = logging.getLogger("dinov2")

WORK, DONE, FAILED = ".dinov2_watch", "done", "failed"
_LOCK = "lock"
_MOST_BYTES = 120  # of a file's name in its key: file systems take 255, with what is put around the key
_POLL_S = 0.2
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0  # between attempts to deliver
_Loaded = tuple[Image.Image, PreparedImage] | str  # why it could not be loaded


class Watcher:
    """Predicts for files that appear in a folder; see the module. Entering it keeps other processes out.

    Args:
        folder: where images are dropped; those in folders inside are left alone.
        predictor: of the model.
        target: where results go.
        identity: of the model, for every result.
        settle_s: seconds for which a file must not have changed: it may still be written.
        stopped: asked whether to stop, between files and while the target does not answer.
    """

    def __init__(
        self,
        folder: Path,
        predictor: Predictor,
        target: Target,
        identity: Mapping[str, str],
        *,
        settle_s: float = 1.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder = folder
        self.predictor = predictor
        self.target = target
        self.identity = dict(identity)
        self.settle_s = settle_s
        self.stopped = stopped
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}  # size and time of change, and since when
        self._claimed: list[str] = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While entered, no other process watches the folder; files that one was working on come first.

        Raises:
            RunError: another process does.
        """
        for name in (WORK, DONE, FAILED):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / WORK / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                lock_file(handle)
            except OSError as error:
                raise RunError(f"another process watches {self.folder}, or it cannot be locked ({error})") from error
            self._claimed = sorted(entry.name for entry in os.scandir(self.folder / WORK) if entry.name != _LOCK)
            yield
        finally:
            os.close(handle)

    def step(self) -> tuple[int, int]:
        """Takes what is ready, at most a batch, and handles it.

        Returns:
            How many files are done with, and how many are left or may still be written.

        Raises:
            OSError: the folder cannot be read.
        """
        waiting = self._claim()
        batch = self._claimed[: self.predictor.batch_size]
        handled = self._handle(batch) if batch else 0
        return handled, waiting + len(self._claimed)

    def _claim(self) -> int:
        """Gives files that do not change any more their keys; returns how many files are left."""
        now, seen = time.monotonic(), self._seen
        self._seen = {}
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):  # it is gone again, or the one that writes it keeps others out
                if not is_image_name(entry.name) or not entry.is_file(follow_symlinks=False):
                    continue
                facts = entry.stat(follow_symlinks=False)
                state = facts.st_size, facts.st_mtime_ns
                before, since = seen.get(entry.name, (state, now))
                since = since if state == before else now
                if now - since < self.settle_s or len(self._claimed) >= self.predictor.batch_size:
                    self._seen[entry.name] = state, since
                    continue
                name = entry.name
                while len(os.fsencode(name)) > _MOST_BYTES:
                    name = name[1:]
                key = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(6)}-{name}"
                os.rename(entry.path, self.folder / WORK / key)
                self._claimed.append(key)
        return len(self._seen)

    def _handle(self, keys: Sequence[str]) -> int:
        handled = 0
        loaded: dict[str, _Loaded] = {}
        for key in keys:
            said = self.target.find(key)
            if said is not None:  # a process was killed between delivering it and saying so
                handled += self._finish(key, FAILED if "error" in said else DONE)
            else:
                loaded[key] = self._load(key)
        predictions = self._predict({key: one[1] for key, one in loaded.items() if not isinstance(one, str)})
        for key, one in loaded.items():
            result: dict[str, Any] = {"id": key, "image": _name_in(key), "model": self.identity}
            prediction = one if isinstance(one, str) else predictions[key]
            if isinstance(one, str) or isinstance(prediction, str):
                logger.warning("%s: %s", _name_in(key), prediction)
                handled += self._deliver(key, {**result, "error": prediction}, None, FAILED)
            else:
                result |= {"prediction": prediction.to_dict(), "certainty": prediction.certainty()}
                handled += self._deliver(key, result, (one[0], prediction), DONE)
        return handled

    def _predict(self, images: Mapping[str, PreparedImage]) -> dict[str, Prediction | str]:
        """Predictions by key; of an image on which the model fails, such as by NaN, why, and the others go on."""
        try:
            return dict(zip(images, self.predictor.predict_prepared(list(images.values())), strict=True))
        except RunError as error:
            if len(images) == 1:
                return dict.fromkeys(images, str(error))
        return {key: said for key, one in images.items() for key, said in self._predict({key: one}).items()}

    def _load(self, key: str) -> _Loaded:
        try:
            path = self.folder / WORK / key
            return open_image(self.predictor, read_image_bytes(path), str(path))
        except UnreadableImageError as error:
            return error.cause
        except ValueError as error:
            return str(error)

    def _deliver(self, key: str, said: Mapping[str, Any], drawn: Any, outcome: str) -> int:
        """Delivers until it has arrived; 0 where it was asked to stop before, 1 otherwise."""
        wait = _FIRST_WAIT_S
        while True:
            try:
                self.target.deliver(key, said, drawn)
            except RefusedError as error:
                logger.warning("%s is not taken: %s", _name_in(key), error)
                return self._finish(key, FAILED)
            except OSError as error:
                logger.warning("%s is not delivered yet; the next attempt is in %g s: %s", _name_in(key), wait, error)
            else:
                return self._finish(key, outcome)
            until = time.monotonic() + wait
            while time.monotonic() < until:
                if self.stopped():
                    return 0
                time.sleep(min(_POLL_S, max(until - time.monotonic(), 0)))
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def _finish(self, key: str, outcome: str) -> int:
        os.rename(self.folder / WORK / key, self.folder / outcome / key)
        self._claimed.remove(key)
        return 1


def _name_in(key: str) -> str:
    """What a file was called before it got its key."""
    return key.split("-", 3)[3]


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Options of the command."""

    folder: Path = option(help="where images are dropped", positional=True)
    weights: tuple[str, ...] = option(help="what dinov2.load opens; several are heads on the same frozen backbone")
    to: str = option(help="where results go: a folder, mqtt://host/topic, mqtts://…, https://… or http://…")
    secret_file: Path | None = option(None, help="file with the token of https, or the password of mqtt://user@host")
    device: str = option("auto", help="where to compute", choices=DEVICES)
    settle: float = option(1.0, help="seconds for which a file must not have changed before it is taken")
    overlay: bool = option(True, help="draw each prediction on its image, in a folder of results")
    model_version: str = option("", help="version in every result (usually the start of the fingerprint)")
    once: bool = option(False, help="stop when nothing is left")


def main(argv: Sequence[str] | None = None) -> int:
    """Watches until a signal comes; returns the exit code."""
    options = parse(
        WatchOptions,
        argv,
        description="Predicts for the images that are dropped into a folder, each once, and delivers the results.",
        example="python tools/watch.py inbox --weights outputs/cracks/best.pth --to results",
    )
    if options.settle < 0:
        raise ValueError(f"--settle must be at least 0, found {options.settle}")
    if not options.folder.is_dir():
        raise FileNotFoundError(f"no folder {options.folder}")
    secret = options.secret_file.read_text(encoding="utf-8").strip() if options.secret_file else ""
    if options.secret_file and not secret:
        raise ValueError(f"{options.secret_file} is empty; it should hold a token or a password")
    with logging_to(None), Interruption(announce=False) as interruption:
        target = open_target(options.to, secret=secret, overlay=options.overlay)
        model = open_model(options.weights if len(options.weights) > 1 else options.weights[0], device=options.device)
        model.predictor.check_reference(given=False)
        # A model that fails on everything ends here, and moves no file.
        model.predictor.predict_prepared([model.predictor.prepare_blank()])
        identity = {"version": options.model_version or model.fingerprint[:12], "fingerprint": model.fingerprint}
        watcher = Watcher(
            options.folder, model.predictor, target, identity,
            settle_s=options.settle, stopped=lambda: interruption.requested,
        )  # fmt: skip
        total = 0
        try:
            with watcher.alone():
                logger.info("watching %s with model %s; Ctrl-C ends it", options.folder, identity["version"])
                while not interruption.requested:
                    handled, waiting = watcher.step()
                    total += handled
                    if options.once and not waiting and not handled:
                        break
                    if not handled:
                        time.sleep(_POLL_S)
        finally:
            target.close()
        logger.info("%d files were handled", total)
    return 0


if __name__ == "__main__":
    run_as("watch")
