"""Watchdog of a run on several processes: names the one that is lost or hangs, when the run does not go on."""

import datetime
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from dinov2.distributed.reduce import all_gather_objects
from dinov2.distributed.session import get_rank, get_world_size

logger = logging.getLogger("dinov2")

_LOOK_AFTER = 0.6  # share of the time-out without progress after which the others are looked at, and again and again;
_READ_AFTER = 0.3  # and after which their beats are read: until then nobody needs them
_BEATS_PER_TIMEOUT = 50
_MAX_INTERVAL = 1.0  # seconds between two beats: who is lost must be found before SLURM ends the others too (KillWait)
_SILENT_INTERVALS = 6  # in which a process that is alive must have sent a beat,
_MIN_PATIENCE = 3.0  # though not in fewer seconds: a busy machine takes its time
_COMMUNICATION = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|timed out waiting", re.IGNORECASE)
_PACKAGE = __name__.partition(".")[0] + "."
_COLLECTIVES = "torch.distributed."
_UNREACHED = "the processes do not reach one another"
_SILENT = "does not answer: it is stopped, lost, or out of reach"
_FAILURE = "failure"  # key on the board


@dataclass(frozen=True)
class Beat:
    """Heartbeat: what a process is doing.

    Attributes:
        number: counts its beats; a process that is alive sends more of them.
        phase: counts what it has begun, in the same order everywhere.
        what: name of that, such as ``iteration 7``.
        has_data: whether it has the data for it.
        where: the function that it is in.
        waits: whether that is in a collective, so that it waits for others.
        ended: whether this is its last beat.
    """

    number: int
    phase: int
    what: str
    has_data: bool = False
    where: str = ""
    waits: bool = False
    ended: bool = False


@dataclass(frozen=True)
class Finding:
    """Why a run does not go on.

    Attributes:
        text: the processes that keep it from going on, and what is known of them; empty where there are none.
        start_again: whether to start the run again may help; not after an error of a process's own.
    """

    text: str
    start_again: bool = True


class Board:
    """Store of the last `Beat` of every process. All processes make one together, with a first beat.

    Args:
        beat: the first of this process.
        patience: seconds after which the first process counts as out of reach.

    Attributes:
        fault: why it is of no use, such as a port that a firewall closes; the same in all processes, empty when it is.
    """

    def __init__(self, beat: Beat, patience: float) -> None:
        self._patience = datetime.timedelta(seconds=patience)
        self._host = os.environ.get("MASTER_ADDR", "127.0.0.1")  # where the first process is
        self._port = 0
        self._store: Any = None
        fault = ""
        try:
            if get_rank() == 0:
                self._store = self._open(is_master=True)
                self._port = self._store.port
                self._store.set(_FAILURE, "null")
        except RuntimeError as error:
            fault = str(error)
        self._port = all_gather_objects(self._port)[0]
        try:
            if self._port:
                self.put(beat)
        except RuntimeError as error:
            fault = str(error)
        self.fault = next(filter(None, all_gather_objects(fault)), "")  # and everybody has sent a beat

    def put(self, beat: Beat) -> None:
        """Replaces this process's beat.

        Raises:
            RuntimeError: the first process does not answer.
        """
        self._connected().set(str(get_rank()), json.dumps(asdict(beat)))

    def put_failure(self, failure: Finding) -> None:
        """Tells the others why this process ends; of several failures, the first counts.

        Raises:
            RuntimeError: the first process does not answer.
        """
        self._connected().compare_set(_FAILURE, "null", json.dumps(asdict(failure)))

    def read_failure(self) -> Finding | None:
        """Why a process has ended by itself, if one has.

        Raises:
            RuntimeError: the first process does not answer.
        """
        found = json.loads(self._get(_FAILURE))
        return None if found is None else Finding(**found)

    def read(self) -> list[Beat]:
        """The last beat of every process, by rank.

        Raises:
            RuntimeError: the first process does not answer.
        """
        return [Beat(**json.loads(self._get(str(rank)))) for rank in range(get_world_size())]

    def _get(self, key: str) -> bytes:
        try:
            value: bytes = self._connected().get(key)
        except RuntimeError:
            if get_rank() > 0:
                self._store = None  # an answer may come late, and would be taken for that to another question
            raise
        return value

    def _connected(self) -> Any:
        if self._store is None:
            self._store = self._open(is_master=False)
        return self._store

    def _open(self, *, is_master: bool) -> Any:
        return dist.TCPStore(  # type: ignore[attr-defined]
            self._host, self._port, is_master=is_master, wait_for_workers=False, timeout=self._patience
        )


class StallWatch:
    """Names the lost or hung process of a run, before the time-out of collectives ends the others.

    Every process writes what it does on a `Board`, every few seconds and from a thread of its own. One that makes no
    progress for long looks there, again and again, for processes that have ended, send no more beats, are behind, or
    let the others wait in a collective. Does nothing where there is one process.

    Args:
        timeout_minutes: of the collectives.

    Attributes:
        finding: the last one about what is being done now.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self.finding = Finding("")
        self._timeout = timeout_minutes * 60
        self._interval = min(self._timeout / _BEATS_PER_TIMEOUT, _MAX_INTERVAL)
        self._patience = max(_SILENT_INTERVALS * self._interval, _MIN_PATIENCE)
        self._doing = Beat(0, 0, "the preparation of the run")
        self._since: float | None = None
        self._number = 0
        self._main = threading.get_ident()
        self._board: Board | None = None
        self._talks: threading.Thread | None = None
        self._wake, self._done = threading.Event(), threading.Event()
        self._asked = False
        self._talked = 0.0  # when the board has answered last
        self._beats: dict[int, tuple[Beat, float]] = {}  # by rank, and since when
        self._failure: Finding | None = None  # of another process
        self._own_failure: Finding | None = None
        self._explained = False
        self._linger = 0.0

    def __enter__(self) -> Self:
        if get_world_size() == 1:
            return self
        self._board = Board(self._beat(), self._patience)
        if self._board.fault:
            logger.warning("a process that hangs will not be named: %s", self._board.fault)
            return self
        self._since = self._talked = time.monotonic()
        self._talks = threading.Thread(target=self._talk, name="tells the others what is done", daemon=True)
        self._talks.start()
        threading.Thread(target=self._watch, name="looks for lost processes", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            if not self._explained:
                text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": ")
                self._own_failure = Finding(
                    f"rank {get_rank()} has ended: {text}", start_again=getattr(error, "exit_code", 1) != 1
                )
            # The first process keeps the board, from which the others are to learn what has happened.
            self._linger = self._patience + 2 * self._interval if get_rank() == 0 else 0.0
        self._done.set()
        self._wake.set()
        if self._talks is not None:
            self._talks.join(self._linger + self._interval)

    def begin(self, what: str) -> None:
        """From now on this is expected to be done in time; all processes begin the same things in the same order."""
        self._doing = Beat(0, self._doing.phase + 1, what)
        self._since, self.finding = time.monotonic(), Finding("")

    def has_data(self) -> None:
        """This process has the data of what it has begun."""
        self._doing = replace(self._doing, has_data=True)

    def pause(self) -> None:
        """What comes now may take its time, until `begin` is called again."""
        self._since = None

    def explain(self, error: BaseException) -> Finding | None:
        """Who is to blame for an error of a collective; looks for some seconds if that has not been found out yet.

        Returns:
            None for an error that has nothing to do with the other processes.
        """
        about_others = isinstance(error, dist.DistError) or _COMMUNICATION.search(str(error)) is not None
        if self._board is None or not about_others:
            return None
        self._explained = self._asked = True
        if self._talks is None:
            return Finding(_UNREACHED)
        self._wake.set()
        deadline = time.monotonic() + self._patience + 2 * self._interval
        while not self.finding.text and self._failure is None and time.monotonic() < deadline:
            time.sleep(self._interval / 4)
        finding = self.finding if self.finding.text else self._look()
        finding = finding if finding.text else Finding(_UNREACHED)
        # At once: SLURM may end this process before it can end by itself.
        logger.error("THE PROCESSES HAVE LOST EACH OTHER in %s: %s", self._doing.what, finding.text)
        return finding

    def _look(self) -> Finding:
        now = time.monotonic()
        if self._failure is not None:
            return self._failure
        if now - self._talked > self._patience:
            return Finding(f"rank 0 {_SILENT}")
        return find_culprits({rank: (beat, now - since) for rank, (beat, since) in self._beats.items()}, self._patience)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(self._interval):
            since, phase = self._since, self._doing.phase
            if since is None or time.monotonic() - max(since, looked) < self._timeout * _LOOK_AFTER:
                continue
            looked = time.monotonic()
            finding = self._look()
            if phase != self._doing.phase:
                continue
            self.finding = finding
            seconds, what = looked - since, self._doing.what
            if finding.text:
                logger.error(
                    "NO PROGRESS for %.0f s in %s: %s. When a process has waited %.0f s for the others, the run ends",
                    *(seconds, what, finding.text, self._timeout),
                )
            else:
                logger.warning("%.0f s in %s: all %d processes work", seconds, what, get_world_size())

    def _talk(self) -> None:
        assert self._board is not None
        while not self._done.is_set():
            self._wake.wait(self._interval)
            self._wake.clear()
            since = self._since
            suspicious = since is not None and time.monotonic() - since > self._timeout * _READ_AFTER
            try:
                self._board.put(self._beat())
                self._failure = self._board.read_failure()
                if suspicious or self._asked:
                    for rank, beat in enumerate(self._board.read()):
                        if rank not in self._beats or self._beats[rank][0].number != beat.number:
                            self._beats[rank] = (beat, time.monotonic())
            except RuntimeError:
                continue  # the first process is stopped, slow or lost, which is seen by the time since it has answered
            self._talked = time.monotonic()
        # The last beat; after an error the first process waits until the others have sent theirs.
        limit = time.monotonic() + self._linger
        try:
            if self._own_failure is not None:
                self._board.put_failure(self._own_failure)
            self._board.put(self._beat(ended=True))
            while time.monotonic() < limit and not all(beat.ended for beat in self._board.read()):
                time.sleep(self._interval / 2)
        except RuntimeError:
            pass  # the first process has gone

    def _beat(self, *, ended: bool = False) -> Beat:
        self._number += 1
        where, waits = _position(sys._current_frames().get(self._main))
        # Whose collective has failed has waited in it.
        return replace(self._doing, number=self._number, where=where, waits=waits or self._asked, ended=ended)


def find_culprits(beats: Mapping[int, tuple[Beat, float]], patience: float) -> Finding:
    """Names the processes that keep a run from going on.

    Args:
        beats: by rank, the last beat and for how many seconds no other one has come.
        patience: seconds in which a process that is alive sends another beat.
    """

    def blame(ranks: list[int], reason: str, place: str = "in") -> Finding:
        found = ((rank, beats[rank][0]) for rank in ranks)
        return Finding("; ".join(f"rank {rank} {reason} ({place} {beat.what}, {beat.where})" for rank, beat in found))

    if silent := [rank for rank, (beat, age) in beats.items() if age > patience and not beat.ended]:
        return blame(silent, _SILENT, "last seen in")
    if ended := [rank for rank, (beat, _) in beats.items() if beat.ended]:
        return blame(ended, "has ended")
    last = min(((beat.phase, beat.has_data) for beat, _ in beats.values()), default=None)
    behind = [rank for rank, (beat, _) in beats.items() if (beat.phase, beat.has_data) == last]
    working = [rank for rank, (beat, _) in beats.items() if not beat.waits]
    for ranks in (behind, working):
        if 0 < len(ranks) < len(beats):
            return blame(ranks, "keeps the others waiting")
    return Finding("")


def _position(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost function of the library on a thread's stack, and whether it waits there in a collective."""
    waits = False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_PACKAGE) and not module.startswith(__package__):
            return f"{module}.{frame.f_code.co_name}, line {frame.f_lineno}", waits
        waits = waits or module.startswith(_COLLECTIVES)
        frame = frame.f_back
    return "no function of the library", waits
