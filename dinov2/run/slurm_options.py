"""Jobs as they are asked for: the flags of every command that can be submitted, and what one job runs."""

import importlib.util
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dinov2.config.command_line import option
from dinov2.utils.errors import RunError

CHECKOUT = Path(__file__).parents[2]  # a job runs the code that has submitted it

Command = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Run:
    """One job to submit: the command's words, and the folder that they name."""

    words: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class SlurmOptions:
    """Options of a job; all but the first two need one of the first two."""

    slurm: bool = option(False, help="submit the command as a SLURM job instead of running it here")
    slurm_local: bool = option(
        False, help="run the same job with its processes on this machine, without SLURM", aliases=("--slurm.local",)
    )
    slurm_array: tuple[str, ...] = option((), help="configs: an array with a job for each; also --config with several")
    nodes: int = option(1, help="machines of the job")
    ngpus: int = option(1, help="GPUs of each machine, with a process for each; 0: no GPUs")
    ntasks_per_node: int | None = option(None, help="processes on each machine, with --ngpus 0 (usually 1)")
    cpus_per_task: int | None = option(None, help="cores of each process (usually what the cluster gives)")
    mem: str | None = option(None, help="memory of each machine as SLURM writes it, such as 240G; 0: all")
    timeout: int = option(2800, help="minutes after which the job is stopped, and queued again where it left off")
    partition: str | None = option(None, help="partition to submit to")
    account: str | None = option(None, help="account to charge")
    qos: str | None = option(None, help="quality of service")
    constraint: str | None = option(None, help="features that the machines must have, such as volta32gb")
    exclude: str | None = option(None, help="machines not to use, such as node[07-09]")
    comment: str | None = option(None, help="note for the scheduler")
    job_name: str | None = option(None, help="name of the job (usually that of the command)")
    signal_delay: int = option(120, help="seconds before the time limit in which the run saves and is queued again")
    max_timeouts: int = option(100, help="time limits after which the job is not queued again")
    check_paths: bool = option(
        True, help="refuse data and weights that this machine does not see; --no-check-paths where only the job does"
    )
    wait: bool = option(False, help="come back only when the job has ended, with its exit code")

    @property
    def submits(self) -> bool:
        """Whether there is a job at all."""
        return self.slurm or self.slurm_local

    @property
    def tasks_per_node(self) -> int:
        """Processes on each machine."""
        return self.ngpus or self.ntasks_per_node or 1

    def given(self) -> list[str]:
        """Flags whose values are not their defaults."""
        return ["--" + one.name.replace("_", "-") for one in fields(self) if getattr(self, one.name) != one.default]

    def check(self) -> None:
        """Checks what can be wrong before any machine is asked.

        Raises:
            ValueError: flags without a job, contradictions, or numbers out of range.
        """
        if not self.submits:
            if self.given():
                raise ValueError(f"{', '.join(self.given())}: only with --slurm, or --slurm-local on this machine")
            return
        minima = {"nodes": 1, "ngpus": 0, "timeout": 1, "signal_delay": 1, "max_timeouts": 0}
        for name, minimum in (minima | {"ntasks_per_node": 1, "cpus_per_task": 1}).items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {minimum}, found {value}")
        if self.ngpus and self.ntasks_per_node not in (None, self.ngpus):
            raise ValueError(
                f"--ntasks-per-node {self.ntasks_per_node} contradicts --ngpus {self.ngpus}: every GPU has one "
                f"process; --ntasks-per-node is for machines without GPUs (--ngpus 0)"
            )
        if self.slurm_local and self.nodes > 1:
            raise ValueError(f"--slurm-local runs on this machine alone, found --nodes {self.nodes}")
        if self.signal_delay >= self.timeout * 60:
            raise ValueError(
                f"--signal-delay {self.signal_delay} (seconds) must be shorter than --timeout {self.timeout} (minutes)"
            )

    def check_installed(self) -> None:
        """Checks that what submits jobs is there.

        Raises:
            RunError: naming what is missing and how to get it.
        """
        flag = "--slurm-local" if self.slurm_local else "--slurm"
        if importlib.util.find_spec("submitit") is None:
            raise RunError(f"{flag} needs submitit, which is not installed: pip install 'dinov2[slurm]'")
        for program in () if self.slurm_local else ("sbatch", "srun", "squeue"):
            if shutil.which(program) is None:
                raise RunError(
                    f"--slurm needs SLURM, but {program} is not on this machine's path: log in to a machine of the "
                    f"cluster, or use --slurm-local to run the job here"
                )

    def slurm_parameters(self, name: str) -> dict[str, Any]:
        """What a submitit ``SlurmExecutor`` is told.

        Args:
            name: of the job, where the options give none.
        """
        # A process that dies takes the others along, instead of letting them wait for it in a collective.
        # The variables are those of the batch script, also where sbatch passes none on (SBATCH_EXPORT=NONE). The first
        # process may save for longer than the others, whatever the cluster's WaitTime.
        srun = ["--kill-on-bad-exit=1", "--export=ALL", "--wait=0"]
        if self.cpus_per_task is not None:
            srun.append(f"--cpus-per-task={self.cpus_per_task}")  # srun does not take it over from sbatch since 22.05
        parameters = {
            "job_name": self.job_name or name,
            "time": self.timeout,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "gpus_per_node": self.ngpus or None,
            "cpus_per_task": self.cpus_per_task,
            "mem": self.mem,
            "signal_delay_s": self.signal_delay,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "comment": self.comment,
            "srun_args": srun,
            "setup": [f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
            "additional_parameters": {"requeue": True},  # whatever the cluster's default is
        }
        return {key: value for key, value in parameters.items() if value is not None}
