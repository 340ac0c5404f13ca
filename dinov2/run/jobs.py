"""Commands as submitit jobs: submitted, waited for, run with a process group of all tasks, queued again in time."""

import contextlib
import io
import logging
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from submitit import Job as SubmittedJob
from submitit import JobEnvironment, LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from dinov2.run.slurm_options import Command, Run, SlurmOptions
from dinov2.utils.errors import RunError

logger = logging.getLogger("dinov2")

LOG_FOLDER = "slurm"
ARRAY_FOLDER = "slurm_arrays"
POLL_SECONDS = 1.0
SHARED_FOLDER_SECONDS = 5.0  # until what another machine wrote is seen on this one
SHOWN_LINES = 15
RESERVED_SIGNAL = "USR1"
# After saving on SIGTERM a process waits for the other signal, which queues the job again, or for the end. The others
# wait for the first one.
LINGER_SECONDS = 30.0
PORTS = range(12_000, 32_000)


def submit(command: Command, runs: Sequence[Run], options: SlurmOptions, *, name: str) -> int:
    """Submits one job for each run, several as one job array, says where they are, and waits for them if asked.

    Args:
        command: what the jobs run.
        runs: words and folders; a job's files go into ``slurm/`` below its folder. Those of an array have one place for
            all, ``slurm_arrays/`` beside the folder of the first run; ``slurm/`` then holds links to the messages.
        options: of all jobs.
        name: of the jobs, where the options give none.

    Returns:
        0.

    Raises:
        RunError: SLURM refuses a job, or a job that was waited for has failed.
        OSError: when a run's folder cannot be written.
    """
    if RESERVED_SIGNAL == JobEnvironment.USR_SIG:
        raise RunError(
            "SUBMITIT_PREEMPT_SIGNAL=USR1 cannot be used: SIGUSR1 lets a run save and stop for good; unset it (USR2)"
        )
    jobs: list[SubmittedJob[int]] = []
    for run, job in zip(runs, _submitted(command, runs, options, name), strict=True):
        jobs.append(job)
        lines = [
            f"{'started' if options.slurm_local else 'submitted'} job {job.job_id}: "
            f"{options.nodes} x {options.tasks_per_node} process(es), folder {run.folder}",
            f"  messages  {run.folder.absolute() / LOG_FOLDER / _tasks(job)[0].paths.stderr.name}",
            *([] if options.slurm_local else [f"  state     squeue -j {job.job_id}"]),
            f"  cancel    {'kill' if options.slurm_local else 'scancel'} {job.job_id}\n",
        ]
        sys.stdout.write("\n".join(lines))
        sys.stdout.flush()
    if len(jobs) > 1 and options.slurm:
        array = jobs[0].job_id.partition("_")[0]
        sys.stdout.write(f"all {len(jobs)} are the job array {array}: scancel {array} cancels them\n")
    if options.wait and (failures := [failure for job in jobs if (failure := _failure_of(job, options))]):
        raise RunError("\n".join(failures))
    return 0


def _submitted(command: Command, runs: Sequence[Run], options: SlurmOptions, name: str) -> Iterator[SubmittedJob[int]]:
    """Submits a job for each run, several to SLURM at once as an array."""

    def submit_to(folder: Path, *runs: Run) -> list[SubmittedJob[int]]:
        executor: LocalExecutor | SlurmExecutor
        if options.slurm_local:
            executor = LocalExecutor(folder, max_num_timeout=options.max_timeouts)
            executor.update_parameters(
                timeout_min=options.timeout,
                tasks_per_node=options.tasks_per_node,
                gpus_per_node=options.ngpus,
                signal_delay_s=options.signal_delay,
            )
        else:
            executor = SlurmExecutor(folder, max_num_timeout=options.max_timeouts)
            executor.update_parameters(**options.slurm_parameters(name))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit shows what the error below also says
                return executor.submit_array([Job(command, run.words) for run in runs])
        except (FailedJobError, FailedSubmissionError) as error:
            raise RunError(f"SLURM refused the job: {error}") from error

    folders = [run.folder / LOG_FOLDER for run in runs]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if len(runs) == 1 or options.slurm_local:
        for run, folder in zip(runs, folders, strict=True):
            yield from submit_to(folder, run)
        return
    shared = runs[0].folder.absolute().parent / ARRAY_FOLDER / f"{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
    shared.mkdir(parents=True)
    for job, folder in zip(submit_to(shared, *runs), folders, strict=True):
        # What the processes say appears in the folder of their run, as soon as they say it.
        for path in [path for task in _tasks(job) for path in (task.paths.stdout, task.paths.stderr)]:
            link = folder.resolve() / path.name
            try:
                link.symlink_to(os.path.relpath(path.parent.resolve() / path.name, link.parent))
            except OSError as error:  # the job is submitted, and does its work without
                logger.warning("%s cannot be linked to %s: %s", link, path, error)
        yield job


def _tasks(job: SubmittedJob[int]) -> list[SubmittedJob[int]]:
    return [job.task(number) for number in range(job.num_tasks)] if job.num_tasks > 1 else [job]


def _failure_of(job: SubmittedJob[int], options: SlurmOptions) -> str:
    """Waits for a job; returns what went wrong, empty for nothing."""
    tasks = _tasks(job)
    unfinished = list(tasks)
    ended_at = math.inf
    while unfinished and time.monotonic() < ended_at + SHARED_FOLDER_SECONDS:
        if ended_at == math.inf and not _is_alive(job, options):
            ended_at = time.monotonic()
        time.sleep(POLL_SECONDS)
        unfinished = [task for task in unfinished if not task.paths.result_pickle.exists()]
    for task in tasks:
        path = task.paths.result_pickle
        error = task.exception() if path.exists() else "it ended before its work was done"
        if error is not None:
            text = "\n".join(str(error).strip().splitlines()[-SHOWN_LINES:])
            return f"job {job.job_id} failed: {text}\n  messages  {task.paths.stderr}"
    return ""


def _is_alive(job: SubmittedJob[int], options: SlurmOptions) -> bool:
    """Whether a job is queued or running. Not by submitit's watcher, which needs a cluster with accounting."""
    if options.slurm_local:
        return not job.done()
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True, check=False)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return True  # the controller is away; it will be asked again
    return bool(asked.stdout.strip())


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
        # To the listener a second signal is an impatient person; a scheduler just sends SIGTERM and this one.
        with contextlib.suppress(KeyboardInterrupt):
            listener(signal.SIGTERM, frame)


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
            if environment.cluster != "local":  # late enough for the first process to queue the job again
                if environment.global_rank:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
                elif is_preempted(environment.job_id):
                    preemption.requeue()
                time.sleep(LINGER_SECONDS)
            sys.exit(code)


def join_process_group(environment: Any) -> None:
    """Sets the variables by which torch finds the job's other processes."""
    launched = TorchDistributedEnvironment()
    if environment.num_nodes == 1:
        launched.master_addr = "127.0.0.1"  # a machine need not be able to look up its own name
    # The same in all processes, another for each job, and below the ports that systems hand out themselves.
    number = zlib.crc32(f"{environment.paths.folder}/{environment.job_id}".encode())
    launched.master_port = PORTS[number % len(PORTS)]
    launched.export(set_cuda_visible_devices=False, overwrite=True)


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
