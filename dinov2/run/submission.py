"""Handing jobs to submitit, and waiting for them."""

import contextlib
import importlib.util
import io
import logging
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dinov2.run.slurm_options import SlurmOptions
from dinov2.utils.errors import RunError

if TYPE_CHECKING:
    from submitit import Executor, Job

    from dinov2.run.job import Command
    from dinov2.run.launch import Run

logger = logging.getLogger("dinov2")

LOG_FOLDER = "slurm"
POLL_SECONDS = 1.0
SHARED_FOLDER_SECONDS = 5.0  # until what another machine wrote is seen on this one
SHOWN_LINES = 15
RESERVED_SIGNAL = "USR1"


def submit(command: "Command", runs: Sequence["Run"], options: SlurmOptions) -> int:
    """Submits one job for each run, says where they are, and waits for them if asked.

    Args:
        command: what the jobs run.
        runs: words and folders; a job's files go into ``slurm/`` below its folder.
        options: of all jobs.

    Returns:
        0.

    Raises:
        RunError: submitit or SLURM is missing, SLURM refuses a job, or a job that was waited for has failed.
        OSError: when a run's folder cannot be written.
    """
    check_installed(options)
    from dinov2.run.job import Job as Task

    jobs = []
    for run in runs:
        executor = _executor(run, options, _name(command))
        jobs.append(_submit_one(executor, Task(command, run.words)))
        sys.stdout.write(_describe(jobs[-1], run, options))
        sys.stdout.flush()
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


def _executor(run: "Run", options: SlurmOptions, name: str) -> "Executor":
    from submitit import LocalExecutor, SlurmExecutor

    folder = run.folder / LOG_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if options.slurm_local:
        local = LocalExecutor(folder, max_num_timeout=options.max_timeouts)
        local.update_parameters(**options.local_parameters())
        return local
    slurm = SlurmExecutor(folder, max_num_timeout=options.max_timeouts)
    slurm.update_parameters(**options.slurm_parameters(name))
    return slurm


def _submit_one(executor: "Executor", task: Any) -> "Job[int]":
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit shows what the error below also says
            return executor.submit(task)
    except (FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"SLURM refused the job: {error}") from error


def _describe(job: "Job[int]", run: "Run", options: SlurmOptions) -> str:
    tasks = f"{options.nodes} x {options.tasks_per_node} process(es)"
    first = job.task(0).paths if job.num_tasks > 1 else job.paths
    lines = [f"{'started' if options.slurm_local else 'submitted'} job {job.job_id}: {tasks}, folder {run.folder}"]
    lines.append(f"  messages  {first.stderr}")
    if options.slurm_local:
        lines.append(f"  cancel    kill {job.job_id}")
    else:
        lines.append(f"  state     squeue -j {job.job_id}")
        lines.append(f"  cancel    scancel {job.job_id}")
    return "\n".join(lines) + "\n"


def _failure_of(job: "Job[int]", options: SlurmOptions) -> str:
    """Waits for a job; returns what went wrong, empty for nothing."""
    tasks = [job.task(number) for number in range(job.num_tasks)] if job.num_tasks > 1 else [job]
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
