"""When a run saves, and how many steps it keeps."""

import logging
import time
from typing import Any

from fvcore.common.checkpoint import PeriodicCheckpointer

from dinov2.fsdp.checkpointer import FSDPCheckpointer

logger = logging.getLogger("dinov2")


class PeriodicFSDPCheckpointer(PeriodicCheckpointer):  # type: ignore[misc]
    """Saves every ``period`` iterations and at the end, and keeps the newest checkpoints only.

    Old steps are deleted when a newer one is complete in all processes. Steps after the one just saved, which a run
    that starts again from an earlier step finds, are left alone.

    Args:
        checkpointer: writes the files.
        period: iterations between checkpoints.
        max_iter: length of the run; its last iteration is saved too.
        keep_last: steps to keep; 0 keeps all. Those of an earlier start of the same run count.
        retry_seconds: pause before the last iteration is saved again, should that fail.
    """

    def __init__(
        self,
        checkpointer: FSDPCheckpointer,
        period: int,
        max_iter: int,
        keep_last: int,
        *,
        retry_seconds: float = 30.0,
    ) -> None:
        super().__init__(checkpointer, period, max_iter, keep_last or None)
        self.retry_seconds = retry_seconds
        checkpointer.keep_last = keep_last

    def step(self, iteration: int, **extras: Any) -> None:
        """To be called after every iteration by every process.

        Raises:
            RunError: see `FSDPCheckpointer.save`.
        """
        if (iteration + 1) % self.period == 0 or iteration == self.max_iter - 1:
            self.save_step(iteration, wait=False, **extras)
        else:
            self.checkpointer.poll()

    def save_step(self, iteration: int, *, wait: bool = True, **extras: Any) -> bool:
        """Saves now, whatever the period.

        The last iteration is always waited for, and tried again until it is saved or too many saves in a row failed.

        Returns:
            Whether it is saved; True when it is not waited for.

        Raises:
            RunError: see `FSDPCheckpointer.save`.
        """
        last = iteration == self.max_iter - 1
        name = f"{self.file_prefix}_{iteration:07d}"
        self.checkpointer.save(name, iteration=iteration, **extras)
        if not wait and not last:
            return True
        while not self.checkpointer.wait():
            if not last:
                return False
            logger.error("the last iteration is not saved: trying again in %g s", self.retry_seconds)
            time.sleep(self.retry_seconds)
            self.checkpointer.save(name, iteration=iteration, **extras)
        return True

    def wait(self) -> bool:
        """Waits for the save at work; see `FSDPCheckpointer.wait`."""
        return bool(self.checkpointer.wait())

    def close(self) -> None:
        """For the way out after an error; see `FSDPCheckpointer.close`."""
        self.checkpointer.close()
