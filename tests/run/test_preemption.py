"""The order of things when a job must stop early: saving first, queueing again afterwards, and only on one signal."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import JobPaths
from submitit.helpers import TorchDistributedEnvironment

from dinov2.run import jobs as job
from dinov2.run.jobs import Job, Preemption
from dinov2.utils import interruption
from dinov2.utils.interruption import Interruption, StoppedAtOnce

PREEMPTED = signal.SIGUSR2


class Environment:
    """Stands in for what submitit knows about this task."""

    USR_SIG = "USR2"
    num_nodes = 1
    job_id = "12"
    paths = JobPaths("runs/a/slurm", "12")

    def __init__(self, cluster: str, rank: int) -> None:
        self.cluster = cluster
        self.global_rank = rank


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What submitit has been asked to do; its handlers are installed as in a job."""
    events: list[str] = []
    in_a_job(monkeypatch, "slurm", 0)
    monkeypatch.setattr(TorchDistributedEnvironment, "__init__", lambda self: None)
    monkeypatch.setattr(TorchDistributedEnvironment, "export", lambda self, **keywords: self)
    monkeypatch.setattr(job.time, "sleep", lambda seconds: events.append(f"waited {seconds:.0f}"))
    monkeypatch.setattr(job, "is_preempted", lambda job_id: False)

    def requeue(number: int, frame: Any) -> None:
        events.append("requeued")
        if job.JobEnvironment().global_rank == 0:
            sys.exit(-1)

    handlers = {PREEMPTED: requeue, signal.SIGTERM: lambda number, frame: events.append("bypassed")}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield events
    for number, handler in before.items():
        signal.signal(number, handler)


def in_a_job(monkeypatch: pytest.MonkeyPatch, cluster: str, rank: int) -> None:
    monkeypatch.setattr(job, "JobEnvironment", lambda: Environment(cluster, rank))


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def listening(events: list[str], *numbers: signal.Signals, code: int = 75) -> Callable[[Sequence[str]], int]:
    """A command that gets signals in the middle of an iteration and saves at its end."""

    def command(words: Sequence[str]) -> int:
        before = signal.signal(signal.SIGTERM, lambda number, frame: events.append("asked"))
        for number in numbers:
            send(number)
        events.append("saved")
        signal.signal(signal.SIGTERM, before)
        return code

    return command


def test_the_run_saves_before_the_job_is_queued_again(requeued: list[str]) -> None:
    with pytest.raises(SystemExit, match="-1"):
        Job(listening(requeued, PREEMPTED), [])()
    assert requeued == ["asked", "saved", "requeued"]


def test_sigterm_before_the_signal_changes_nothing(requeued: list[str]) -> None:
    with pytest.raises(SystemExit, match="-1"):
        Job(listening(requeued, signal.SIGTERM, PREEMPTED), [])()
    assert requeued == ["asked", "asked", "saved", "requeued"]


def test_sigterm_alone_saves_and_ends_with_the_commands_code(requeued: list[str]) -> None:
    with pytest.raises(SystemExit, match="75"):
        Job(listening(requeued, signal.SIGTERM), [])()
    assert requeued == ["asked", "saved", "waited 30"]


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_for_a_more_urgent_job_brings_the_job_back(
    requeued: list[str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    in_a_job(monkeypatch, "slurm", rank)
    monkeypatch.setattr(job, "is_preempted", lambda job_id: job_id == "12")
    with pytest.raises(SystemExit, match="75" if rank else "-1"):
        Job(listening(requeued, signal.SIGTERM), [])()
    assert requeued == ["asked", "saved", "waited 30" if rank else "requeued"], "the first one does it for all"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("JobState=RUNNING StartTime=2026-11-26T19:41:37 PreemptTime=2026-11-26T19:42:13", True),
        ("JobState=RUNNING StartTime=2026-11-26T19:41:37 PreemptTime=None", False),
        ("JobState=RUNNING StartTime=2026-11-26T19:41:37", False),  # a version that does not tell
        ("JobState=RUNNING StartTime=2026-11-26T19:45:16 PreemptTime=2026-11-26T19:42:13", False),  # an earlier start
        ("JobState=CANCELLED StartTime=2026-11-26T19:41:37 PreemptTime=2026-11-26T19:42:13", False),
        ("", False),
    ],
)
def test_the_controller_tells_who_is_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: bool
) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\n[ "$*" = "--oneliner show job 7_1" ] && echo "JobId=12 Name=a=b {said}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job.is_preempted("7_1") is expected
    program.unlink()
    assert not job.is_preempted("7_1"), "without the program nobody can tell"


def test_the_signal_may_come_while_a_saved_task_waits(requeued: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.time, "sleep", lambda seconds: send(PREEMPTED))
    with pytest.raises(SystemExit, match="-1"):
        Job(listening(requeued, signal.SIGTERM), [])()
    assert requeued == ["asked", "saved", "requeued"]


def test_other_tasks_leave_the_queueing_to_the_first(requeued: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, "slurm", 1)
    with pytest.raises(SystemExit, match="75"):
        Job(listening(requeued, PREEMPTED), [])()
    assert requeued == ["asked", "saved", "requeued", "waited 30"], "submitit's handler does nothing there"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the end of the job need not wait for it"


def test_on_one_machine_nothing_is_waited_for(requeued: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, "local", 1)
    with pytest.raises(SystemExit, match="75"):
        Job(listening(requeued, signal.SIGTERM), [])()
    assert requeued == ["asked", "saved"]


def test_with_nothing_to_save_the_job_is_queued_again_at_once(requeued: list[str]) -> None:
    def command(words: Sequence[str]) -> int:
        send(PREEMPTED)
        raise AssertionError("the process has ended")

    with pytest.raises(SystemExit, match="-1"):
        Job(command, [])()
    assert requeued == ["requeued"]


def test_an_impatient_listener_does_not_keep_the_job_from_coming_back(requeued: list[str]) -> None:
    def raise_interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def command(words: Sequence[str]) -> int:
        signal.signal(signal.SIGTERM, raise_interrupt)
        send(PREEMPTED)
        requeued.append("went on")
        send(signal.SIGTERM)
        return 0

    with pytest.raises(SystemExit, match="-1"):
        Job(command, [])()
    assert requeued == ["went on", "requeued"]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((signal.SIGTERM, signal.SIGTERM), []),
        ((PREEMPTED, signal.SIGTERM), ["requeued"]),
        ((signal.SIGTERM, PREEMPTED), ["saved", "requeued"]),
    ],
)
@pytest.mark.parametrize("pause", [0.5, 5.0])
def test_a_second_signal_in_a_save(
    requeued: list[str],
    monkeypatch: pytest.MonkeyPatch,
    numbers: tuple[signal.Signals, ...],
    expected: list[str],
    pause: float,
) -> None:
    """To what listens in a run: at once it is the same again; later SIGTERM ends the save, and SIGUSR2 never does."""
    now = 100.0
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now)

    def command(words: Sequence[str]) -> int:
        nonlocal now
        with Interruption(announce=False) as stop:
            send(numbers[0])
            assert stop.requested
            now += pause
            send(numbers[1])
            requeued.append("saved")
            return stop.exit_code

    if pause < interruption.REPEAT_SECONDS:
        expected = ["saved", "requeued" if PREEMPTED in numbers else "waited 30"]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        Job(command, [])()
    assert requeued == expected
    assert (end.type is KeyboardInterrupt) == (expected == [])


def test_what_is_saved_already_is_left_at_once_and_the_job_comes_back(requeued: list[str]) -> None:
    def command(words: Sequence[str]) -> int:
        with Interruption(announce=False) as stop:
            with contextlib.suppress(StoppedAtOnce), stop.at_once():
                send(PREEMPTED)
                requeued.append("went on")
            return stop.exit_code

    with pytest.raises(SystemExit, match="-1"):
        Job(command, [])()
    assert requeued == ["requeued"]


def test_ctrl_c_stays_ctrl_c(requeued: list[str]) -> None:
    def command(words: Sequence[str]) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Job(command, [])()
    assert not requeued


def test_a_command_that_is_done_is_not_queued_again(requeued: list[str]) -> None:
    assert Job(listening(requeued, PREEMPTED, code=0), ["a"])() == 0
    assert requeued == ["asked", "saved"]


def test_children_leave_the_signal_to_their_parent(requeued: list[str]) -> None:
    with Preemption(PREEMPTED) as preemption:
        child = os.fork()
        if child == 0:
            send(PREEMPTED)
            os._exit(7 if preemption.noted or requeued else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not preemption.noted


def test_a_job_comes_back_as_the_same_job() -> None:
    task = Job(listening([]), ["--config", "a.yaml"])
    delayed = task.checkpoint()
    assert delayed.function is task
    assert (delayed.args, delayed.kwargs) == ((), {})


def test_all_processes_of_a_job_meet_at_one_port_and_other_jobs_elsewhere(requeued: list[str]) -> None:
    def port(folder: str, job_id: str, rank: int) -> int:
        environment = Environment("slurm", rank)
        environment.job_id, environment.paths = job_id, JobPaths(folder, job_id, rank)
        launched: list[int] = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(
                TorchDistributedEnvironment, "export", lambda self, **keywords: launched.append(self.master_port)
            )
            job.join_process_group(environment)
        return launched[0]

    assert port("runs/a", "12", 0) == port("runs/a", "12", 7)
    others = {port(folder, job_id, 0) for folder in ("runs/a", "runs/b") for job_id in ("12", "13")}
    assert len(others) == 4
    assert all(other in job.PORTS for other in others)
