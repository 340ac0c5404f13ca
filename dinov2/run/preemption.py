"""What a process of a submitit job does with the signal that announces its end: save first, queue again afterwards.

Shortly before the time limit, and on preemption, SLURM sends every process a signal (SIGUSR2), at which submitit queues
the job again and ends at once, in the middle of an iteration. `Preemption` puts the saving in between.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Self


class Preemption:
    """While entered, the signal is passed on as a SIGTERM to whoever listens to that in order to save and stop.

    Where nobody listens, so that there is nothing to save, submitit's own handler is called at once.

    Args:
        number: the signal, for which submitit has installed its handler.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        self.noted = False
        self._process = os.getpid()
        self._submitit = signal.getsignal(number)
        self._nobody = signal.getsignal(signal.SIGTERM)

    def __enter__(self) -> Self:
        signal.signal(self.number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(self.number, self._submitit)

    def requeue(self) -> None:
        """Queues the job again and ends this process, if it is the first of the job; returns in the others.

        Raises:
            SystemExit: in the first process.
            submitit.core.utils.UncompletedJobError: in the first process, when the job has timed out too many times.
        """
        assert callable(self._submitit), "submitit has installed its handler"
        self._submitit(self.number, None)

    def _note(self, _: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # forked from it, such as those that decode images; they end with it
        self.noted = True
        listener = signal.getsignal(signal.SIGTERM)
        if not callable(listener) or listener == self._nobody:
            self.requeue()
            return
        try:
            listener(signal.SIGTERM, frame)
        except KeyboardInterrupt:
            # To the listener a second signal is an impatient person; a scheduler just sends SIGTERM and this one.
            return
