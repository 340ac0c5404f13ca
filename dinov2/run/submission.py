"""Handing jobs to submitit, and waiting for them."""

import contextlib
import importlib.util
import io
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2.run.slurm_options import SlurmOptions
from dinov2.utils.errors import RunError

if TYPE_CHECKING:
    from submitit import Executor, Job

    from dinov2.run.job import Command
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
    from dinov2.run.job import Job as Task

    jobs: list[Job[int]] = []
    tasks = [Task(command, run.words) for run in runs]
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


def _submitted(tasks: Sequence[Any], runs: Sequence["Run"], options: SlurmOptions, name: str) -> "Iterator[Job[int]]":
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


def _submit(executor: "Executor", tasks: Sequence[Any]) -> "list[Job[int]]":
    """Submits one task as a job, or several as an array."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit shows what the error below also says
            return executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"SLURM refused the job: {error}") from error


def _link_messages(job: "Job[int]", folder: Path) -> None:
    """Makes what the processes of an array's job say appear in the folder of its run, as soon as they say it."""
    for task in _tasks(job):
        for path in (task.paths.stdout, task.paths.stderr):
            link = folder.resolve() / path.name
            try:
                link.symlink_to(os.path.relpath(path.parent.resolve() / path.name, link.parent))
            except OSError as error:  # the job is submitted, and does its work without
                logger.warning("%s cannot be linked to %s: %s", link, path, error)


def _tasks(job: "Job[int]") -> "list[Job[int]]":
    return [job.task(number) for number in range(job.num_tasks)] if job.num_tasks > 1 else [job]


def _describe(job: "Job[int]", run: "Run", options: SlurmOptions) -> str:
    tasks = f"{options.nodes} x {options.tasks_per_node} process(es)"
    lines = [f"{'started' if options.slurm_local else 'submitted'} job {job.job_id}: {tasks}, folder {run.folder}"]
    lines.append(f"  messages  {run.folder.absolute() / LOG_FOLDER / _tasks(job)[0].paths.stderr.name}")
    if options.slurm_local:
        lines.append(f"  cancel    kill {job.job_id}")
    else:
        lines.append(f"  state     squeue -j {job.job_id}")
        lines.append(f"  cancel    scancel {job.job_id}")
    return "\n".join(lines) + "\n"


def _failure_of(job: "Job[int]", options: SlurmOptions) -> str:
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


def _is_alive(job: "Job[int]", options: SlurmOptions) -> bool:
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
    """``dinov2.eval.knn_command`` is called knn."""
    return command.__module__.removeprefix("dinov2.").removesuffix("_command").removesuffix(".command").split(".")[-1]
