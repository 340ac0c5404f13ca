"""What a submitit job runs: a command with a process group of all tasks, queued again when it has to stop early."""

import logging
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from dinov2.run.preemption import Preemption

logger = logging.getLogger("dinov2")

# After saving on SIGTERM a process waits for the other signal, which queues the job again, or for the end. The others
# wait for the first one.
LINGER_SECONDS = 30.0
LOCAL = "local"
PORTS = range(12_000, 32_000)

Command = Callable[[Sequence[str]], int]


class Job:
    """A command and its words; started anew, it goes on from what it has saved.

    Args:
        command: ``main`` of a command; a function of a module, which is imported in the job.
        words: after the command's name; they must lead a second start on from where the first one stopped.
    """

    def __init__(self, command: Command, words: Sequence[str]) -> None:
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
        join_process_group(environment)
        with Preemption(getattr(signal, f"SIG{environment.USR_SIG}")) as preemption:
            try:
                code = self.command(self.words)
            except KeyboardInterrupt:
                if not preemption.noted:
                    raise
                logger.warning("a second signal ended the command; what it had not saved yet is lost")
                code = 128 + signal.SIGTERM
            if code == 0:
                return 0
            if preemption.noted:
                preemption.requeue()
            return _leave(code, environment, preemption)


def join_process_group(environment: JobEnvironment) -> None:
    """Sets the variables by which torch finds the job's other processes."""
    launch = TorchDistributedEnvironment()
    if environment.num_nodes == 1:
        launch.master_addr = "127.0.0.1"  # a machine need not be able to look up its own name
    # The same in all processes, another for each job, and below the ports that systems hand out themselves.
    number = zlib.crc32(f"{environment.paths.folder}/{environment.job_id}".encode())
    launch.master_port = PORTS[number % len(PORTS)]
    launch.export(set_cuda_visible_devices=False, overwrite=True)


def is_preempted(job_id: str) -> bool:
    """Whether a job still runs, but SLURM takes its machines away for a more urgent one.

    Many clusters announce that by SIGTERM alone, like ``scancel``; a job that ends by itself then does not come back.
    """
    try:
        asked = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    facts = dict(word.split("=", 1) for word in asked.stdout.split() if "=" in word)
    preempted, started = facts.get("PreemptTime", "None"), facts.get("StartTime", "")
    return facts.get("JobState") == "RUNNING" and preempted != "None" and preempted >= started


def _leave(code: int, environment: JobEnvironment, preemption: Preemption) -> int:
    """Ends a task that has saved, late enough for the first one to queue the job again."""
    if environment.cluster != LOCAL:
        if environment.global_rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
        elif is_preempted(environment.job_id):
            preemption.requeue()
        time.sleep(LINGER_SECONDS)
    sys.exit(code)
