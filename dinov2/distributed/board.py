"""What every process of a run last said of itself, readable by all, also while some of them hang.

Collectives need everybody. This does not: a small server in the first process keeps one line for each process.
"""

import datetime
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from dinov2.distributed.facts import get_rank, get_world_size
from dinov2.distributed.reduce import all_gather_objects

_FAILURE = "failure"


@dataclass(frozen=True)
class Beat:
    """One line of a process about itself.

    Attributes:
        number: counts its lines; one that is alive writes more of them.
        phase: counts what it has begun, in the same order everywhere.
        what: name of that, such as ``iteration 7``.
        has_data: whether it has the data for it.
        where: the function that it is in.
        waits: whether that is in a collective, so that it waits for others.
        ended: whether this is its last line.
    """

    number: int
    phase: int
    what: str
    has_data: bool
    where: str
    waits: bool
    ended: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a process has ended by itself, and so has taken the others along.

    Attributes:
        rank: which one.
        text: its error, such as ``ValueError: ...``.
        start_again: whether the error may pass when the run is started again.
    """

    rank: int
    text: str
    start_again: bool


class Board:
    """Keeps the last `Beat` of every process. All processes make one together, with a first beat.

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
        self.fault = next(filter(None, all_gather_objects(fault)), "")  # and everybody has written a line

    def put(self, beat: Beat) -> None:
        """Replaces this process's line.

        Raises:
            RuntimeError: the first process does not answer.
        """
        self._connected().set(str(get_rank()), json.dumps(asdict(beat)))

    def put_failure(self, failure: Failure) -> None:
        """Says why this process ends; of several, the first counts.

        Raises:
            RuntimeError: the first process does not answer.
        """
        self._connected().compare_set(_FAILURE, "null", json.dumps(asdict(failure)))

    def read_failure(self) -> Failure | None:
        """Why another process has ended by itself, if one has.

        Raises:
            RuntimeError: the first process does not answer.
        """
        found = json.loads(self._get(_FAILURE))
        return None if found is None else Failure(**found)

    def read(self) -> list[Beat]:
        """The last line of every process, by rank.

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
