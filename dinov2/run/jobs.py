"""Commands as submitit jobs: submitted, and waited for."""

import contextlib
import io
import logging
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from submitit import Job as SubmittedJob
from submitit import JobEnvironment, LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths

from dinov2.run.job import Job, ask_slurm
from dinov2.run.slurm_options import Command, Run, SlurmOptions
from dinov2.utils.errors import RunError

logger = logging.getLogger("dinov2")

LOG_FOLDER = "slurm"
ARRAY_FOLDER = "slurm_arrays"
POLL_SECONDS = 1.0
SHARED_FOLDER_SECONDS = 5.0  # until what another machine wrote is seen on this one
SHOWN_LINES = 15
RESERVED_SIGNAL = "USR1"
# Until Python can listen, a signal that asks to save would end the process, and the job with it.
PYTHON = f'sh -c \'trap "" TERM {{signal}}; exec "$@"\' sh {shlex.quote(sys.executable)}'

_UNKNOWN_END = "it ended before its work was done"
_ENDS = {
    "CANCELLED": "it was cancelled",
    "TIMEOUT": "it reached its time limit and was not queued again",
    "OUT_OF_MEMORY": "it needed more memory than it was given (--mem)",
    "NODE_FAIL": "a machine failed",
    "DEADLINE": "it could not end before its deadline",
}


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
            f"{'started' if options.slurm_local else 'submitted'} job {job.job_id}: {options.nodes} x "
            f"{options.tasks_per_node} process(es), folder {str(run.folder).replace('%j', job.job_id)}",
            f"  messages  {_log_folder(run).absolute() / _tasks(job)[0].paths.stderr.name}",
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
            python = PYTHON.format(signal=JobEnvironment.USR_SIG)
            executor = SlurmExecutor(folder, max_num_timeout=options.max_timeouts, python=python)
            executor.update_parameters(**options.slurm_parameters(name))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit shows what the error below also says
                called = f"{command.__module__}:{command.__qualname__}"
                return executor.submit_array([Job(called, run.words) for run in runs])
        except (FailedJobError, FailedSubmissionError) as error:
            raise RunError(f"SLURM refused the job: {error}") from error

    folders = [_log_folder(run) for run in runs]
    if len(runs) == 1 or options.slurm_local:
        for run, folder in zip(runs, folders, strict=True):
            with _undone_if_refused(folder):
                yield from submit_to(folder, run)
        return
    shared = _log_folder(runs[0]).absolute().parents[1] / ARRAY_FOLDER
    shared /= f"{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
    with _undone_if_refused(shared, *folders):
        jobs = submit_to(shared, *runs)
    for job, folder in zip(jobs, folders, strict=True):
        # What the processes say appears in the folder of their run, as soon as they say it.
        for path in [path for task in _tasks(job) for path in (task.paths.stdout, task.paths.stderr)]:
            link = folder.resolve() / path.name
            try:
                link.symlink_to(os.path.relpath(path.parent.resolve() / path.name, link.parent))
            except OSError as error:  # the job is submitted, and does its work without
                logger.warning("%s cannot be linked to %s: %s", link, path, error)
        yield job


def _log_folder(run: Run) -> Path:
    """Where a job's messages go: below the run's folder, or beside it where that has the job's number in its name."""
    if "%j" not in str(run.folder):
        return run.folder / LOG_FOLDER
    return JobPaths.get_first_id_independent_folder(run.folder) / LOG_FOLDER


@contextlib.contextmanager
def _undone_if_refused(*folders: Path) -> Iterator[None]:
    """Makes folders; takes them, and what is written into them, back if SLURM refuses the job."""
    missing = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"the folder {folder} of the job's messages cannot be made: {error}") from error
    before = {path for folder in folders for path in folder.iterdir()}
    try:
        yield
    except RunError:
        for path in {path for folder in folders for path in folder.iterdir()} - before:
            if path.is_file():
                path.unlink()
        for path in sorted(missing, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # it is not empty, or another job has made it too
                path.rmdir()
        raise


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
        # The number of a job on this machine is that of its process, which SLURM may know as another job.
        state = "" if path.exists() or options.slurm_local else ask_slurm(job.job_id).get("JobState", "")
        error = task.exception() if path.exists() else _ENDS.get(state, _UNKNOWN_END)
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
