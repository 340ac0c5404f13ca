"""Jobs: arrays on a stand-in for SLURM, jobs on this machine, and stopping early: saved first, then queued again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from launch_stand_ins import StandInOptions, fail, meet, stop_once
from submitit.core.utils import DelayedSubmission, JobPaths

from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.run import job, jobs
from dinov2.run.job import Job, Preemption
from dinov2.run.launch import launch
from dinov2.utils import interruption
from dinov2.utils.errors import RunError
from dinov2.utils.interruption import Interruption, StoppedAtOnce
from tests.tiny_pretraining import TINY

NUMBER = 4321


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the batch scripts that a stand-in for SLURM has been given; it knows no job."""
    scripts, programs = tmp_path / "scripts", tmp_path / "bin"
    scripts.mkdir()
    programs.mkdir()
    sbatch = f'cp "$1" {scripts}/$(ls {scripts} | wc -l).sh\necho "Submitted batch job {NUMBER}"\n'
    for name, text in {"sbatch": sbatch, "srun": "", "squeue": "", "scancel": ""}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return scripts


def configs(folder: Path) -> list[str]:
    for name in ("a", "b", "c"):
        (folder / f"{name}.yaml").write_text(f"train: {{output_dir: {folder / 'runs' / name / 'out'}}}\n")
    return [str(folder / f"{name}.yaml") for name in ("a", "b", "c")]


def test_one_submission_with_a_job_for_each_config(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", *configs(tmp_path), "train.seed=5", "--slurm", "--ngpus", "0", "--ntasks-per-node", "2"]
    assert launch(meet, StandInOptions, words) == 0
    (script,) = cluster.iterdir()
    (shared,) = (tmp_path / "runs" / "a" / "slurm_arrays").iterdir()
    text = script.read_text()
    assert "#SBATCH --array=0-2%3" in text
    assert f"#SBATCH --error={shared}/%A_%a_0_log.err" in text
    assert f"--error {shared}/%A_%a_%t_log.err" in text
    printed = capsys.readouterr().out
    for number, name in enumerate("abc"):
        folder, job = tmp_path / "runs" / name / "out" / "slurm", f"{NUMBER}_{number}"
        task = DelayedSubmission.load(shared / f"{job}_submitted.pkl").function
        assert task.command == "launch_stand_ins:meet"
        assert task.words == ("--config", str(tmp_path / f"{name}.yaml"), "train.seed=5")
        links = [f"{job}_{rank}_log.{kind}" for rank in (0, 1) for kind in ("err", "out")]
        assert sorted(path.name for path in folder.iterdir()) == sorted(links)
        for link in links:
            assert not (folder / link).exists(), "not before the job says something"
            (shared / link).write_text(f"said by {link}")
            assert (folder / link).read_text() == f"said by {link}"
            assert not os.readlink(folder / link).startswith("/"), "all can be moved together"
        assert (
            f"submitted job {job}: 1 x 2 process(es), folder {folder.parent}\n  messages  {folder / links[0]}"
            in printed
        )
        assert f"  state     squeue -j {job}\n  cancel    scancel {job}\n" in printed
    assert f"all 3 are the job array {NUMBER}: scancel {NUMBER} cancels them" in printed


def test_one_config_is_a_job_with_all_files_in_its_folder(cluster: Path, tmp_path: Path) -> None:
    assert launch(meet, StandInOptions, ["--config", configs(tmp_path)[0], "--slurm", "--ngpus", "0"]) == 0
    (script,) = cluster.iterdir()
    assert "--array" not in script.read_text()
    assert (tmp_path / "runs" / "a" / "out" / "slurm" / f"{NUMBER}_submitted.pkl").is_file()
    assert not list(tmp_path.rglob("slurm_arrays"))


def test_where_links_cannot_be_made_the_jobs_run_all_the_same(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Path, target: str, *_: bool) -> None:
        if "_log." in self.name:
            raise PermissionError("no links here")
        os.symlink(target, self)

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with caplog.at_level("WARNING", logger="dinov2"):
        assert launch(meet, StandInOptions, ["--config", *configs(tmp_path), "--slurm", "--ngpus", "0"]) == 0
    assert len([text for text in caplog.messages if "cannot be linked" in text and "no links here" in text]) == 6


def test_every_job_of_an_array_is_waited_for(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2.run.jobs.POLL_SECONDS", 0.01)
    monkeypatch.setattr("dinov2.run.jobs.SHARED_FOLDER_SECONDS", 0.05)
    with pytest.raises(RunError) as failure:
        launch(meet, StandInOptions, ["--config", *configs(tmp_path), "--slurm", "--ngpus", "0", "--wait"])
    for number in range(3):
        assert f"job {NUMBER}_{number} failed: it ended before its work was done" in str(failure.value)
    scontrol = cluster.parent / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho JobId={NUMBER} JobState=CANCELLED Reason=None\n")
    scontrol.chmod(0o755)
    with pytest.raises(RunError, match=f"job {NUMBER} failed: it was cancelled"):
        launch(meet, StandInOptions, ["--config", configs(tmp_path)[0], "--slurm", "--ngpus", "0", "--wait"])


@pytest.mark.parametrize("number", [1, 3])
def test_what_is_refused_is_told_and_leaves_nothing(cluster: Path, tmp_path: Path, number: int) -> None:
    sbatch = cluster.parent / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: job arrays are not for you' >&2\nexit 1\n")
    words = ["--config", *configs(tmp_path)[:number], "--slurm", "--ngpus", "0"]
    with pytest.raises(RunError, match=r"SLURM refused the job: .*job arrays are not for you"):
        launch(meet, StandInOptions, words)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "a" / "out" / "slurm").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "out" / "slurm" / "11_0_log.err").write_text("of an earlier job")
    with pytest.raises(RunError, match="SLURM refused the job"):
        launch(meet, StandInOptions, words)
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["11_0_log.err"]


def test_a_folder_may_have_the_number_of_the_job(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--slurm", "--ngpus", "0", f"train.output_dir={tmp_path}/runs/%j/out"]
    assert launch(meet, StandInOptions, words) == 0
    assert f"folder {tmp_path}/runs/{NUMBER}/out\n  messages  {tmp_path}/runs/slurm/" in capsys.readouterr().out
    task = DelayedSubmission.load(tmp_path / "runs" / "slurm" / f"{NUMBER}_submitted.pkl").function
    assert task.words[-2:] == ("--output-dir", f"{tmp_path}/runs/%j/out")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["slurm"]
    with pytest.raises(ValueError, match=r"only %j, the job's number, can be in a folder, not .*%A"):
        launch(meet, StandInOptions, ["--slurm", "--output-dir", f"{tmp_path}/%A"])


@pytest.fixture(autouse=True)
def importable_in_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs import the commands of `launch_stand_ins` by name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def error_log(folder: Path, rank: int = 0) -> str:
    (path,) = (folder / "slurm").glob(f"*_{rank}_log.err")
    return path.read_text()


def test_the_processes_of_a_job_meet_in_one_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(meet, StandInOptions, ["--slurm.local", "--ngpus", "2", "--wait", "--output-dir", str(tmp_path)]) == 0
    met = json.loads((tmp_path / "met.json").read_text())
    assert [(rank, local_rank) for rank, local_rank, _ in met] == [(0, 0), (1, 1)]
    assert len({pid for _, _, pid in met} | {os.getpid()}) == 3
    printed = capsys.readouterr().out
    assert "1 x 2 process(es)" in printed
    assert str(tmp_path / "slurm") in printed


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)job \d+ failed: .*the data is wrong.*_0_log\.err"):
        launch(fail, StandInOptions, ["--slurm.local", "--wait", "--output-dir", str(tmp_path)])


@pytest.mark.slow
def test_a_preempted_job_saves_first_and_comes_back(tmp_path: Path) -> None:
    pids = [tmp_path / f"pid.{rank}" for rank in (0, 1)]

    def preempt() -> None:
        wait_until(lambda: all(path.exists() and path.read_text() for path in pids))
        for path in pids:
            os.kill(int(path.read_text()), signal.SIGUSR2)

    with ThreadPoolExecutor() as pool:
        preempted = pool.submit(preempt)
        words = ["--slurm.local", "--ngpus", "2", "--output-dir", str(tmp_path), "--wait"]
        assert launch(stop_once, StandInOptions, words) == 0
        preempted.result()
    out = next((tmp_path / "slurm").glob("*_0_log.out")).read_text()
    assert "Requeued job" in out
    assert out.count("Starting with JobEnvironment") == 2
    assert error_log(tmp_path).count("saved") == error_log(tmp_path, 1).count("saved") == 1


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_training_door_trains_in_two_processes(repository: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    make_demo_parts(parts, parts=12, photos=2, image_size=48)
    pairs = (
        f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}",
        f"train.output_dir={tmp_path / 'run'}",
        *TINY,
        "train.num_workers=0",
        "train.OFFICIAL_EPOCH_LENGTH=2",
    )
    finished = subprocess.run(
        [sys.executable, "run/train/train.py", *pairs, "--slurm-local", "--ngpus", "2", "--wait"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "done: 2 iterations" in error_log(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("model_*.pth")} == {
        f"model_0000001.rank_{rank}.pth" for rank in (0, 1)
    }


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
    monkeypatch.setattr(job, "end_at_once", sys.exit)
    monkeypatch.setattr(job.time, "sleep", lambda seconds: events.append("waited"))
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


TERM = signal.SIGTERM
ENDS: dict[str, tuple[str, int, bool, tuple[signal.Signals, ...], str, str]] = {
    "the run saves before the job is queued again": ("slurm", 0, False, (PREEMPTED,), "-1", "asked saved requeued"),
    "SIGTERM before the signal": ("slurm", 0, False, (TERM, PREEMPTED), "-1", "asked asked saved requeued"),
    "SIGTERM alone": ("slurm", 0, False, (TERM,), "75", "asked saved waited"),
    "SIGTERM for a more urgent job": ("slurm", 0, True, (TERM,), "-1", "asked saved requeued"),
    "the others leave it to the first one": ("slurm", 1, True, (TERM,), "0", "asked saved"),
    "submitit's handler does nothing elsewhere": ("slurm", 1, False, (PREEMPTED,), "0", "asked saved requeued"),
    "nothing is waited for on one machine": ("local", 1, False, (TERM,), "75", "asked saved"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_job_saves_and_then_is_queued_again_or_ends_with_the_commands_code(
    requeued: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cluster, rank, preempted, signals, code, events = ENDS[name]
    in_a_job(monkeypatch, cluster, rank)
    monkeypatch.setattr(job, "is_preempted", lambda job_id: preempted and job_id == "12" and "saved" in requeued)
    with pytest.raises(SystemExit, match=code):
        Job(listening(requeued, *signals), [])()
    assert " ".join(requeued) == events


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


@pytest.mark.parametrize("listens", [False, True])
def test_with_nothing_to_save_the_job_is_queued_again_at_once(requeued: list[str], listens: bool) -> None:
    def command(words: Sequence[str]) -> int:
        with Interruption(announce=False) if listens else contextlib.nullcontext() as stop:
            with contextlib.suppress(StoppedAtOnce), stop.at_once() if stop else contextlib.nullcontext():
                send(PREEMPTED)
                requeued.append("went on")
            return stop.exit_code if stop else 0

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
        expected = ["saved", "requeued" if PREEMPTED in numbers else "waited"]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        Job(command, [])()
    assert requeued == expected
    assert (end.type is KeyboardInterrupt) == (expected == [])


def test_ctrl_c_stays_ctrl_c_and_a_command_that_is_done_is_not_queued_again(requeued: list[str]) -> None:
    def command(words: Sequence[str]) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Job(command, [])()
    assert not requeued
    assert Job(listening(requeued, PREEMPTED, code=0), ["a"])() == 0
    assert requeued == ["asked", "saved"]


def test_children_leave_the_signal_to_their_parent(requeued: list[str]) -> None:
    with Preemption(PREEMPTED, job.JobEnvironment()) as preemption:
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


def test_a_job_is_loaded_in_an_instant_and_deaf_until_then() -> None:
    """What stands behind the command is imported only when signals are heard; until then they end nothing."""
    loaded = "import sys, dinov2.run.job; print([name for name in ('torch', 'omegaconf') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True) == "[]\n"
    python = jobs.PYTHON.format(signal="USR2")
    signals = "import os, signal; [os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGUSR2)]; print('alive')"
    assert subprocess.check_output(f'{python} -c "{signals}"', shell=True, text=True) == "alive\n"


@pytest.mark.parametrize(
    ("signals", "rank", "preempted", "code", "events"),
    [
        ("USR2", 0, False, "-1", "requeued"),
        ("USR2", 1, False, "0", "requeued"),  # which does nothing there
        ("TERM", 0, True, "-1", "requeued"),
        ("TERM", 0, False, "75", "waited"),
        ("TERM", 1, False, "0", ""),
        ("", 0, True, "-1", "requeued"),  # the signal had come before
    ],
)
def test_a_signal_while_the_command_is_imported(
    requeued: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    signals: str,
    rank: int,
    preempted: bool,
    code: str,
    events: str,
) -> None:
    kill = f"import os, signal; os.kill(os.getpid(), signal.SIG{signals})" if signals else ""
    (tmp_path / "slow_command.py").write_text(f"{kill}\nraise AssertionError('it went on')\n")
    monkeypatch.syspath_prepend(tmp_path)
    in_a_job(monkeypatch, "slurm", rank)
    asked = iter([preempted and not signals, preempted])
    monkeypatch.setattr(job, "is_preempted", lambda job_id: next(asked))
    if rank:
        monkeypatch.setattr(job, "is_preempted", lambda job_id: pytest.fail("only the first process asks"))
    with pytest.raises(SystemExit, match=f"^{code}$"):
        Job("slow_command:main", [])()
    assert " ".join(requeued) == events


def test_the_words_of_a_job_may_hold_its_number(requeued: list[str]) -> None:
    words: list[Sequence[str]] = []
    assert Job(lambda given: words.append(given) or 0, ["--output-dir", "runs/%j"])() == 0
    assert words == [["--output-dir", "runs/12"]]
