"""Commands as submitit jobs: submitted, waited for, run with a process group of all tasks, queued again in time."""

import contextlib
import importlib.util
import io
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from dinov2.run.slurm_options import SlurmOptions
from dinov2.utils.errors import RunError

if TYPE_CHECKING:
    from submitit import Executor, JobEnvironment
    from submitit import Job as SubmittedJob
    from submitit.helpers import DelayedSubmission

    from dinov2.run.launch import Run


logger = logging.getLogger("dinov2")

LOG_FOLDER = "slurm"
ARRAY_FOLDER = "slurm_arrays"
POLL_SECONDS = 1.0
SHARED_FOLDER_SECONDS = 5.0  # until what another machine wrote is seen on this one
SHOWN_LINES = 15
RESERVED_SIGNAL = "USR1"


def submit(command: "Command", runs: Sequence["Run"], options: SlurmOptions) -> int:
    """Submits one job for each run, several as one job array, says where they are, and waits for them if asked.

    Args:
        command: what the jobs run.
        runs: words and folders; a job's files go into ``slurm/`` below its folder. Those of an array have one place for
            all, ``slurm_arrays/`` beside the folder of the first run; ``slurm/`` then holds links to the messages.
        options: of all jobs.

    Returns:
        0.

    Raises:
        RunError: submitit or SLURM is missing, SLURM refuses a job, or a job that was waited for has failed.
        OSError: when a run's folder cannot be written.
    """
    check_installed(options)
    jobs: list[SubmittedJob[int]] = []
    tasks = [Job(command, run.words) for run in runs]
    for run, job in zip(runs, _submitted(tasks, runs, options, _name(command)), strict=True):
        jobs.append(job)
        sys.stdout.write(_describe(job, run, options))
        sys.stdout.flush()
    if len(jobs) > 1 and options.slurm:
        array = jobs[0].job_id.partition("_")[0]
        sys.stdout.write(f"all {len(jobs)} are the job array {array}: scancel {array} cancels them\n")
    if options.wait:
        failures = [failure for job in jobs if (failure := _failure_of(job, options))]
        if failures:
            raise RunError("\n".join(failures))
    return 0


def check_installed(options: SlurmOptions) -> None:
    """Checks that what submits jobs is there.

    Raises:
        RunError: naming what is missing and how to get it.
    """
    flag = "--slurm-local" if options.slurm_local else "--slurm"
    if importlib.util.find_spec("submitit") is None:
        raise RunError(f"{flag} needs submitit, which is not installed: pip install 'dinov2[slurm]'")
    for program in () if options.slurm_local else ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise RunError(
                f"--slurm needs SLURM, but {program} is not on this machine's path: log in to a machine of the "
                f"cluster, or use --slurm-local to run the job here"
            )
    from submitit import JobEnvironment

    if RESERVED_SIGNAL == JobEnvironment.USR_SIG:
        raise RunError(
            "SUBMITIT_PREEMPT_SIGNAL=USR1 cannot be used: SIGUSR1 lets a run save and stop for good; unset it (USR2)"
        )


def _submitted(
    tasks: Sequence[Any], runs: Sequence["Run"], options: SlurmOptions, name: str
) -> "Iterator[SubmittedJob[int]]":
    """Submits a job for each run, several to SLURM at once as an array."""
    folders = [run.folder / LOG_FOLDER for run in runs]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if len(runs) == 1 or options.slurm_local:
        for task, folder in zip(tasks, folders, strict=True):
            yield from _submit(_executor(folder, options, name), [task])
        return
    shared = runs[0].folder.absolute().parent / ARRAY_FOLDER / f"{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
    shared.mkdir(parents=True)
    for job, folder in zip(_submit(_executor(shared, options, name), tasks), folders, strict=True):
        _link_messages(job, folder)
        yield job


def _executor(folder: Path, options: SlurmOptions, name: str) -> "Executor":
    from submitit import LocalExecutor, SlurmExecutor

    if options.slurm_local:
        local = LocalExecutor(folder, max_num_timeout=options.max_timeouts)
        local.update_parameters(**options.local_parameters())
        return local
    slurm = SlurmExecutor(folder, max_num_timeout=options.max_timeouts)
    slurm.update_parameters(**options.slurm_parameters(name))
    return slurm


def _submit(executor: "Executor", tasks: Sequence[Any]) -> "list[SubmittedJob[int]]":
    """Submits one task as a job, or several as an array."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit shows what the error below also says
            return executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"SLURM refused the job: {error}") from error


def _link_messages(job: "SubmittedJob[int]", folder: Path) -> None:
    """Makes what the processes of an array's job say appear in the folder of its run, as soon as they say it."""
    for task in _tasks(job):
        for path in (task.paths.stdout, task.paths.stderr):
            link = folder.resolve() / path.name
            try:
                link.symlink_to(os.path.relpath(path.parent.resolve() / path.name, link.parent))
            except OSError as error:  # the job is submitted, and does its work without
                logger.warning("%s cannot be linked to %s: %s", link, path, error)


def _tasks(job: "SubmittedJob[int]") -> "list[SubmittedJob[int]]":
    return [job.task(number) for number in range(job.num_tasks)] if job.num_tasks > 1 else [job]


def _describe(job: "SubmittedJob[int]", run: "Run", options: SlurmOptions) -> str:
    tasks = f"{options.nodes} x {options.tasks_per_node} process(es)"
    lines = [f"{'started' if options.slurm_local else 'submitted'} job {job.job_id}: {tasks}, folder {run.folder}"]
    lines.append(f"  messages  {run.folder.absolute() / LOG_FOLDER / _tasks(job)[0].paths.stderr.name}")
    if options.slurm_local:
        lines.append(f"  cancel    kill {job.job_id}")
    else:
        lines.append(f"  state     squeue -j {job.job_id}")
        lines.append(f"  cancel    scancel {job.job_id}")
    return "\n".join(lines) + "\n"


def _failure_of(job: "SubmittedJob[int]", options: SlurmOptions) -> str:
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
            return f"job {job.job_id} failed: {_last_lines(str(error))}\n  messages  {task.paths.stderr}"
    return ""


def _is_alive(job: "SubmittedJob[int]", options: SlurmOptions) -> bool:
    """Whether a job is queued or running. Not by submitit's watcher, which needs a cluster with accounting."""
    if options.slurm_local:
        return not job.done()
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True, check=False)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return True  # the controller is away; it will be asked again
    return bool(asked.stdout.strip())


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-SHOWN_LINES:])


def _name(command: "Command") -> str:
    """``dinov2.eval.knn`` is called knn."""
    return command.__module__.removeprefix("dinov2.").removesuffix("_command").removesuffix(".command").split(".")[-1]


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

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit runs when the job comes back from the queue: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> int:
        """Runs the command in this task; returns 0 when its work is done.

        Raises:
            SystemExit: when it is not, with the command's exit code, or that of submitit after queueing again.
        """
        from submitit import JobEnvironment

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


def join_process_group(environment: "JobEnvironment") -> None:
    """Sets the variables by which torch finds the job's other processes."""
    from submitit.helpers import TorchDistributedEnvironment

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


def _leave(code: int, environment: "JobEnvironment", preemption: Preemption) -> int:
    """Ends a task that has saved, late enough for the first one to queue the job again."""
    if environment.cluster != LOCAL:
        if environment.global_rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
        elif is_preempted(environment.job_id):
            preemption.requeue()
        time.sleep(LINGER_SECONDS)
    sys.exit(code)
