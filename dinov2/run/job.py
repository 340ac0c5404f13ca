"""A command inside a job: its process group, signals, and the way back into the queue.

submitit unpickles what the job runs before it listens to signals. So this module, its package and what they import must
load in an instant, and the command, behind which torch stands, is imported only when everybody listens.
"""

import contextlib
import logging
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import NoReturn, Self

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from dinov2.utils.errors import RESUME_EXIT_CODE
from dinov2.utils.interruption import end_at_once

logger = logging.getLogger("dinov2")

# After saving on SIGTERM the first process waits for the other signal, which queues the job again, or for the end.
LINGER_SECONDS = 30.0


class Preemption:
    """While entered, the signal is passed on as a SIGTERM to whoever listens to that in order to save and stop.

    Where nobody listens, so that there is nothing to save, the job is queued again at once. So it is by a SIGTERM, if
    SLURM takes its machines away; another SIGTERM then ends the process.

    Args:
        number: the signal, for which submitit has installed its handler.
        environment: submitit's, of this task.
    """

    def __init__(self, number: signal.Signals, environment: JobEnvironment) -> None:
        self.number = number
        self.noted = False
        self._environment = environment
        self._process = os.getpid()
        self._submitit = signal.getsignal(number)
        self._before = signal.getsignal(signal.SIGTERM)

    def __enter__(self) -> Self:
        signal.signal(self.number, self._note)
        signal.signal(signal.SIGTERM, self._terminate)
        if self._is_first_of_slurm() and is_preempted(self._environment.job_id):
            self.requeue()  # the signal came before anybody listened
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(self.number, self._submitit)
        signal.signal(signal.SIGTERM, self._before)

    def requeue(self) -> None:
        """Queues the job again and ends this process, if it is the first of the job; returns in the others.

        Raises:
            SystemExit: in the first process.
            submitit.core.utils.UncompletedJobError: in the first process, when the job has timed out too many times.
        """
        assert callable(self._submitit), "submitit has installed its handler"
        self._submitit(self.number, None)

    def leave(self, code: int) -> NoReturn:
        """Ends this process, which has saved what it had; the first one of a job of SLURM queues it again or waits.

        The others end at once and as if all were well, because SLURM takes a failure as a reason to end the first one,
        and the job, before that is done. They would also miss the SIGTERM that follows, if it comes too soon.

        Args:
            code: exit code of the first process, and of all on this machine, if the job is not queued again.
        """
        if self.noted:
            self.requeue()
        if self._environment.cluster == "local":
            sys.exit(code)
        if not self._is_first_of_slurm():
            end_at_once(0 if self.noted or code == RESUME_EXIT_CODE else code)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has done what it asks for
        if is_preempted(self._environment.job_id):
            self.requeue()
        time.sleep(LINGER_SECONDS)
        sys.exit(code)

    def _is_first_of_slurm(self) -> bool:
        return self._environment.cluster != "local" and self._environment.global_rank == 0

    def _note(self, _: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # forked from it, such as those that decode images; they end with it
        self.noted = True
        listener = signal.getsignal(signal.SIGTERM)
        if not callable(listener) or listener == self._terminate:
            if self._environment.cluster == "local":
                self.requeue()
                return
            self.leave(RESUME_EXIT_CODE)
        # To the listener a second signal is an impatient person; a scheduler just sends SIGTERM and this one.
        with contextlib.suppress(KeyboardInterrupt):
            listener(signal.SIGTERM, frame)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self.leave(RESUME_EXIT_CODE)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)


class Job:
    """A command and its words; started anew, it goes on from what it has saved.

    Args:
        command: ``main`` of a command, or its name, such as ``dinov2.train.command:main``: what it names is imported in
            the job, when that can be told to stop.
        words: after the command's name; they must lead a second start on from where the first one stopped. ``%j`` in
            them stands for the job's number.
    """

    def __init__(self, command: Callable[[Sequence[str]], int] | str, words: Sequence[str]) -> None:
        self.command = command
        self.words = tuple(words)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs when the job comes back from the queue: the same."""
        return DelayedSubmission(self)

    def __call__(self) -> int:
        """Runs the command in this task; returns 0 when its work is done.

        Raises:
            SystemExit: when it is not, with the command's exit code, or that of submitit after queueing again.
        """
        environment = JobEnvironment()
        words = [word.replace("%j", environment.job_id) for word in self.words]
        with Preemption(getattr(signal, f"SIG{environment.USR_SIG}"), environment) as preemption:
            command = pkgutil.resolve_name(self.command) if isinstance(self.command, str) else self.command
            try:
                code: int = command(words)
            except KeyboardInterrupt:
                if not preemption.noted:
                    raise
                logger.warning("a second signal ended the command; what it had not saved yet is lost")
                code = 128 + signal.SIGTERM
            if code != 0:
                preemption.leave(code)
        return code


def is_preempted(job_id: str) -> bool:
    """Whether a job still runs, but SLURM takes its machines away for a more urgent one.

    Many clusters announce that by SIGTERM alone, like ``scancel``; a job that ends by itself then does not come back.
    """
    facts = ask_slurm(job_id)
    preempted, started = facts.get("PreemptTime", "None"), facts.get("StartTime", "")
    return facts.get("JobState") == "RUNNING" and preempted != "None" and preempted >= started


def ask_slurm(job_id: str) -> dict[str, str]:
    """What the controller knows about a job, by its own names; nothing where it cannot be asked or has forgotten."""
    try:
        asked = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(word.split("=", 1) for word in asked.stdout.split() if "=" in word)
