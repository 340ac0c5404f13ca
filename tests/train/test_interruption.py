"""Ctrl-C and termination signals: the run saves after the current iteration, and the same command goes on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from train_stand_ins import (
    DOOR,
    EVERY_TWO,
    LAST,
    OPTIONS,
    TORCHRUN,
    Train,
    assert_identical,
    assert_same_run,
    checkpoint,
    evaluation_pairs,
    files,
    free_port,
    iterations,
    make_small,
    shared_run,
    steps,
)

from dinov2.checkpoint import checkpointer
from dinov2.checkpoint.integrity import check_run
from dinov2.run.launch import exit_with
from dinov2.train import command, monitors
from dinov2.train import train as loop
from dinov2.utils import interruption as interruption_module
from dinov2.utils.errors import INTERRUPTED, RESUME_EXIT_CODE
from dinov2.utils.interruption import REPEAT_SECONDS, Interruption
from tests.processes import forking_context
from tools.stress_resume import run_differences

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
START_AGAIN = [(number, RESUME_EXIT_CODE) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), *START_AGAIN])
def test_a_signal_is_noted_and_handlers_come_back(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(other) for other in HANDLED]
    with Interruption() as interruption:
        assert not interruption.requested
        send(number)
        assert interruption.requested
        assert interruption.exit_code == code
    with pytest.raises(ZeroDivisionError), Interruption():
        _ = 1 / 0
    assert [signal.getsignal(other) for other in HANDLED] == before
    assert "asked to stop: this iteration is completed and saved first" in capfd.readouterr().err


def test_a_signal_is_noted_although_nobody_hears_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the terminal or the reader of a pipe has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(interruption_module, "_STDERR", writing)
    with Interruption() as interruption:
        send(signal.SIGTERM)
        assert interruption.requested
    os.close(writing)


def test_what_nohup_ignores_stays_ignored(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was started with ``nohup`` does not even notice that its terminal was closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, 1, signal.SIGHUP)
        assert train(tmp_path) == 0
        assert steps(tmp_path)[-1] == LAST
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_process_does_not_end_what_its_owner_needs(capfd: pytest.CaptureFixture[str]) -> None:
    with Interruption() as interruption, interruption.at_once():
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)  # would raise in the owner
            os._exit(7 if interruption.requested else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert not interruption.requested
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("last", HANDLED)
def test_what_a_launcher_repeats_is_ignored_and_what_a_person_repeats_is_not(
    monkeypatch: pytest.MonkeyPatch, last: signal.Signals
) -> None:
    now = 100.0
    monkeypatch.setattr(interruption_module.time, "monotonic", lambda: now)
    with Interruption() as interruption:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            send(number)
            now += 0.5
        assert interruption.exit_code == 130, "the first signal counts"
        now += 5
        with pytest.raises(KeyboardInterrupt):
            send(last)


def signal_at(monkeypatch: pytest.MonkeyPatch, iteration: int, number: signal.Signals = signal.SIGINT) -> None:
    """Sends a signal to this process while an iteration of the run is computed."""
    real, calls = loop.agree, iter(range(1000))

    def agree(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == iteration:
            send(number)
        return real(*arguments, **keywords)

    monkeypatch.setattr(loop, "agree", agree)


EVERYTHING = (
    *(EVERY_TWO, "evaluation.nb_knn=[1]", "train.log_period=2"),
    *("data.part_positives=0.7", "train.num_workers=2"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """A run that nobody stops, with pairs of images of a part, stochastic depth, augmentation and evaluation."""
    return shared_run(tmp_path_factory, parts, *evaluation_pairs(parts), *EVERYTHING, "train.num_workers=0")


@pytest.mark.parametrize("at", range(LAST))
def test_wherever_it_is_stopped_it_goes_on_as_if_nothing_had_happened(
    train: Train, tmp_path: Path, parts: Path, whole: Path, at: int
) -> None:
    number, code = [(signal.SIGINT, 130), *START_AGAIN][at % 4]
    pairs = (*evaluation_pairs(parts), *EVERYTHING)
    with pytest.MonkeyPatch.context() as monkeypatch:
        signal_at(monkeypatch, at, number)
        assert train(tmp_path, *pairs) == code
    evaluated = (at + 1) % 2 == 0  # which comes before the next iteration, and is left out
    stopped_after = at if evaluated else at + 1  # the signal came after the wish to stop was asked for
    assert steps(tmp_path)[-1] == stopped_after
    log = (tmp_path / "log" / "log.txt").read_text()
    place = "outside of training, with everything saved" if evaluated else f"after iteration {stopped_after}"
    assert f"stopped {place}; the same command goes on" in log
    # What a crash leaves behind: lines of iterations to come, whole and torn.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 77, "total_loss": 1}\n{"iteration": 0, "total_loss": 2}\n{"itera')
    assert train(tmp_path, *pairs) == 0
    assert_same_run(tmp_path, whole)
    evaluations = [{name for name in files(folder) if name.startswith("eval/")} for folder in (tmp_path, whole)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize(
    ("call", "number", "code"), [(0, signal.SIGTERM, 75), (1, signal.SIGINT, 130), (3, signal.SIGTERM, 75)]
)
def test_an_evaluation_is_not_waited_for(
    train: Train, tmp_path: Path, parts: Path, whole: Path, call: int, number: signal.Signals, code: int
) -> None:
    """Calls are the first look at the features, and the evaluations after iterations 1, 3 and 5."""
    pairs = (*evaluation_pairs(parts), *EVERYTHING, "train.num_workers=0")
    real, calls = monitors.probe_features, iter(range(99))

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            send(number)
            raise AssertionError("the evaluation went on")
        return real(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitors, "probe_features", interrupted)
        assert train(tmp_path, *pairs) == code
    assert steps(tmp_path)[-1:] == [[], [1], [3], [5]][call]
    assert train(tmp_path, *pairs) == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), *START_AGAIN])
@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (command, "build_model", "stopped with nothing to save; the same command starts again"),
        (loop, "prepare", "stopped outside of training, with everything saved; the same command goes on"),
    ],
)
def test_what_comes_before_training_is_not_waited_for(
    train: Train, tmp_path: Path, module: Any, name: str, message: str, number: signal.Signals, code: int
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        send(number)
        raise AssertionError("the preparation went on")

    before = [signal.getsignal(other) for other in HANDLED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, interrupted)
        assert train(tmp_path) == code
    assert message in (tmp_path / "log" / "log.txt").read_text()
    assert [signal.getsignal(other) for other in HANDLED] == before
    assert steps(tmp_path) == []


def test_a_run_without_resuming_says_how_to_go_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, 1)
    assert train(tmp_path, "--no-resume") == 130
    assert "the same command without --no-resume goes on" in (tmp_path / "log" / "log.txt").read_text()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(repository: Path, parts: Path) -> Iterator[Start]:
    """Starts a program with the options of a run, in a session of its own, as a terminal would."""
    started: list[subprocess.Popen[str]] = []

    def launch(program: Sequence[str], output: Path, *pairs: str) -> "subprocess.Popen[str]":
        dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"
        process = subprocess.Popen(
            [sys.executable, *program, *OPTIONS, dataset, f"train.output_dir={output}", *pairs],
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_iteration(output: Path, number: int) -> None:
    wait_until(lambda: (output / "metrics.jsonl").exists() and len(iterations(output)) > number)


def ended(process: "subprocess.Popen[str]", seconds: float = 60) -> tuple[int, str]:
    _, text = process.communicate(timeout=seconds)
    return process.returncode, text


@pytest.mark.slow
def test_ctrl_c_at_a_terminal(start: Start, tmp_path: Path) -> None:
    process = start([DOOR], tmp_path, "optim.epochs=200", "train.num_workers=1")
    wait_for_iteration(tmp_path, 1)
    os.killpg(process.pid, signal.SIGINT)  # to the loader's workers as well
    code, text = ended(process)
    assert code == 130, text
    assert "Traceback" not in text
    (*_, last) = steps(tmp_path)
    assert f"stopped after iteration {last}; the same command goes on from there" in text
    assert iterations(tmp_path) == list(range(last + 1))
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    pairs = ("train.num_workers=1", "train.batch_size_per_gpu=2", "train.keep_last=0")
    process = start(TORCHRUN, tmp_path, "optim.epochs=200", *pairs)
    wait_for_iteration(tmp_path, 1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)  # as a scheduler does
    code, text = ended(process)
    assert code != 0
    (*_, last) = steps(tmp_path)
    assert f"stopped after iteration {last}; the same command goes on from there" in text
    assert "DataLoader worker" not in text
    states = [checkpoint(tmp_path, last, rank) for rank in (0, 1)]
    assert [state["iteration"] for state in states] == [last, last]
    assert {path.read_text() for path in tmp_path.glob("last_checkpoint.rank_*")} == {
        f"model_{last:07d}.rank_{rank}.pth\n" for rank in (0, 1)
    }
    assert_identical(states[0]["unreadable"], states[1]["unreadable"])


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(start: Start, tmp_path: Path) -> None:
    # The first is noted in an iteration that never ends: its only image takes an hour to read.
    os.mkfifo(tmp_path / "endless.jpeg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(
        '{"metainfo": {}, "data_list": [{"img_path": "endless.jpeg", "group_id": "a"}]}'
    )
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={tmp_path}"
    words = (dataset, "train.batch_size_per_gpu=1", "data.read_timeout_seconds=15")  # waited for once at the start, too
    process = start([DOOR], tmp_path / "run", *words)
    wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(interruption_module.REPEAT_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, text = ended(process)
    assert code == 130
    assert "asked to stop: this iteration is completed and saved first" in text
    assert text.rstrip().endswith("interrupted")
    assert not steps(tmp_path / "run")


def save_slowly(
    folder: Path, rank: int, seconds: float, signals: int, words: Sequence[str], group: dict[str, str]
) -> None:
    """A run whose saves, from the second on, have half a file on the disk for so long; signals come in iteration 4."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} | group if group else {}
    os.dup2(os.open(f"{folder}.said.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    make_small(pytest.MonkeyPatch())
    write_with_checksum, agree = checkpointer.write_with_checksum, loop.agree
    saves, calls = iter(range(1000)), iter(range(1000))

    def slow(path: Path, write: Callable[[Any], None]) -> Any:
        def half(file: Any) -> None:
            write(file)
            Path(f"{folder}.half.{rank}").touch()
            time.sleep(seconds)

        return write_with_checksum(path, half if next(saves) else write)

    def asked(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 4:
            for _ in range(signals):
                send(signal.SIGTERM)
                time.sleep(0.1)
        return agree(*arguments, **keywords)

    checkpointer.write_with_checksum, loop.agree = slow, asked
    exit_with(lambda: command.main(words))


def start_slow_saving(
    parts: Path, folder: Path, processes: int, seconds: float = 0, signals: int = 0
) -> list[multiprocessing.Process]:
    pairs = [f"train.batch_size_per_gpu={4 // processes}", "optim.epochs=3", "evaluation.probe_images=0"]
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"
    words = [*OPTIONS, dataset, f"train.output_dir={folder}", *pairs, "train.process_group_timeout_minutes=2"]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = [
        forking_context().Process(
            target=save_slowly,
            args=(folder, rank, seconds, signals, words, group if processes > 1 else {}),
            daemon=True,  # ends with the tests at the latest
        )
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    return running


def assert_ended(running: list[multiprocessing.Process], code: int, folder: Path) -> list[str]:
    """Waits for the processes; returns what each has said."""
    said = []
    for rank, process in enumerate(running):
        process.join(120)
        said.append(Path(f"{folder}.said.{rank}").read_text())
        assert process.exitcode == code, said[-1]
    return said


@pytest.mark.slow
def test_a_second_signal_in_a_save_tears_nothing(parts: Path, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    running = start_slow_saving(parts, stopped, 2, seconds=600, signals=1)
    wait_until(lambda: all(Path(f"{stopped}.half.{rank}").exists() for rank in (0, 1)))
    time.sleep(REPEAT_SECONDS + 1)
    assert all(process.is_alive() for process in running), "they wait for the save"
    began = time.monotonic()
    for process in running:
        process.terminate()
    assert not any("Traceback" in text for text in assert_ended(running, INTERRUPTED, stopped))
    assert time.monotonic() - began < 20

    unfinished = list(stopped.glob(".model_*.tmp"))
    assert len(unfinished) == 2, "the save was cut off"
    assert all(path.stat().st_size > 0 for path in unfinished)
    found = check_run(stopped)
    assert found.good
    assert (found.tagged, found.resumed) == ("model_0000002", "model_0000002")
    assert [step.name for step in found.steps] == ["model_0000002"]

    again = {folder: start_slow_saving(parts, folder, 2) for folder in (stopped, whole)}
    for folder, running in again.items():
        assert_ended(running, 0, folder)
    assert run_differences(stopped, whole) == []
    assert not list(stopped.glob(".model_*.tmp")), "and the remains are gone"


@pytest.mark.slow
def test_a_signal_that_comes_at_once_again_is_the_same(parts: Path, tmp_path: Path) -> None:
    """As from a launcher that passes on what a terminal or a scheduler has sent to all."""
    folder = tmp_path / "run"
    (text,) = assert_ended(start_slow_saving(parts, folder, 1, seconds=1, signals=3), RESUME_EXIT_CODE, folder)
    assert "stopped after iteration 5; the same command goes on from there" in text
    assert check_run(folder).resumed == "model_0000005"
