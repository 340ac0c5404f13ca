"""Jobs of a real SLURM: preempted training ends with the weights of an undisturbed one; evaluators; refusals."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.data.prepare.demo_parts import make_demo_parts
from tests.tiny_pretraining import TINY

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.usefixtures("slurm")]

ITERATIONS = 60  # long enough that none of two jobs is done before the other has begun
JOB = ("--slurm", "--ngpus", "0", "--timeout", "30")
VIT = ("student.arch=vit_tiny", "student.patch_size=16", "crops.global_crops_size=32", "train.device=cpu")
LONG = (*TINY, "student.drop_path_rate=0.2", f"train.OFFICIAL_EPOCH_LENGTH={ITERATIONS}", "train.num_workers=1")
SETS = (("train", "TRAIN"), ("val", "VAL"))

Door = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_demo_parts(folder, parts=12, photos=2, image_size=48)
    return folder


@pytest.fixture
def door(repository: Path) -> Door:
    """Runs a real door: ``door("run/train/train.py", *words)``."""

    def run(path: str, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, path, *words], cwd=repository, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def submit_training(door: Door, parts: Path, output: Path) -> str:
    """Submits a pretraining of two processes; returns the number of the job."""
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"
    submitted = door("run/train/train.py", *LONG, dataset, f"train.output_dir={output}", *JOB, "--ntasks-per-node", "2")
    assert submitted.returncode == 0, submitted.stderr
    assert f"{output}/slurm/" in submitted.stdout
    return submitted.stdout.split()[2].rstrip(":")


def wait_until(condition: Callable[[], bool], output: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path}:\n{path.read_text()}" for path in sorted((output / "slurm").glob("*_log.*")))
            pytest.fail(f"it takes longer than {seconds:.0f} s\n{logs}")
        time.sleep(0.2)


def lines(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def show(job: str) -> dict[str, str]:
    """What the controller knows about a job."""
    text = subprocess.check_output(["scontrol", "show", "job", job], text=True)
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def ended(job: str) -> Callable[[], bool]:
    return lambda: show(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def assert_identical(ours: Any, expected: Any, where: str = "") -> None:
    """Bit for bit equal, however nested; but for times, and for the length of lines that hold times."""
    assert type(ours) is type(expected), where
    if isinstance(expected, Mapping):
        assert ours.keys() == expected.keys(), where
        for key in expected:
            if key not in ("seconds", "metrics_bytes"):
                assert_identical(ours[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, Tensor):
        assert torch.equal(ours, expected), where
    else:
        assert ours == expected, where


def records(output: Path) -> list[dict[str, Any]]:
    loaded = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "timing"} for record in loaded]


def test_a_preempted_training_is_saved_queued_again_and_goes_on(door: Door, parts: Path, tmp_path: Path) -> None:
    """In two processes. That it ends with the weights of an undisturbed one is shown by the array below."""
    stopped = tmp_path / "stopped"
    job = submit_training(door, parts, stopped)
    wait_until(lambda: lines(stopped) >= 3 or ended(job)(), stopped)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)  # what SLURM sends on preemption and time-out

    wait_until(lambda: int(show(job)["Restarts"]) > 0 or ended(job)(), stopped)
    saved = [path.read_text() for path in sorted(stopped.glob("last_checkpoint.rank_*"))]
    at = int(saved[0][6:13])
    assert saved == [f"model_{at:07d}.rank_{rank}.pth\n" for rank in (0, 1)], "saved before it was queued again"
    assert 3 <= at + 1 < ITERATIONS
    wait_until(ended(job), stopped)
    assert show(job)["JobState"] == "COMPLETED"

    log = (stopped / "slurm" / f"{job}_0_log.err").read_text()
    assert f"stopped after iteration {at}; the same command goes on from there" in log
    assert f"(iteration {at})" in log, "and it did"
    assert [record["iteration"] for record in records(stopped) if "total_loss" in record] == list(range(ITERATIONS))
    assert all((stopped / f"model_{ITERATIONS - 1:07d}.rank_{rank}.pth").exists() for rank in (0, 1))


def test_a_preempted_fine_tuning_ends_with_the_weights_of_an_undisturbed_one(
    door: Door, parts: Path, tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone.yaml"
    backbone.write_text("student: {arch: vit_tiny, patch_size: 16}\ncrops: {global_crops_size: 32}\n")
    sets = [f"data.{name}_dataset_path=GroupedJSON:split={split}:root={parts}" for name, split in SETS]
    words = [
        *("task=classification", f"backbone.config_file={backbone}", *sets, "data.image_size=32", "data.num_workers=0"),
        *("optim.epochs=16", "train.device=cpu", "train.batch_size_per_gpu=4", "train.log_period=1"),
        *("backbone.mode=full", "evaluation.num_pictures=0"),
    ]
    folders = tmp_path / "stopped", tmp_path / "whole"
    jobs = []
    for folder in folders:
        submitted = door("run/train/finetune.py", *words, f"train.output_dir={folder}", *JOB, "--ntasks-per-node", "2")
        assert submitted.returncode == 0, submitted.stderr
        jobs.append(submitted.stdout.split()[2].rstrip(":"))
    wait_until(lambda: lines(folders[0]) >= 3 or ended(jobs[0])(), folders[0])
    subprocess.run(["scancel", "--signal=USR2", jobs[0]], check=True)
    for job, folder in zip(jobs, folders, strict=True):
        wait_until(ended(job), folder)
    assert [(show(job)["JobState"], show(job)["Restarts"]) for job in jobs] == [("COMPLETED", "1"), ("COMPLETED", "0")]
    assert "the same command goes on from there" in (folders[0] / "slurm" / f"{jobs[0]}_0_log.err").read_text()
    assert_identical(*(torch.load(folder / "best.pth", weights_only=True)["model"] for folder in folders))
    assert records(folders[0]) == records(folders[1])
    assert_identical(*(json.loads((folder / "val" / "results.json").read_text())["scores"] for folder in folders))


def test_one_job_of_an_array_yields_to_an_urgent_one_and_all_end_alike(door: Door, parts: Path, tmp_path: Path) -> None:
    """SLURM itself takes the cores of one of them away, which it announces by SIGTERM alone."""
    configs = [tmp_path / f"{name}.yaml" for name in ("a", "b")]
    for config in configs:
        config.write_text(f"train: {{output_dir: {tmp_path / config.stem}}}\n")
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"
    submitted = door("run/train/train.py", "--config", *map(str, configs), *LONG, dataset, *JOB)
    assert submitted.returncode == 0, submitted.stderr
    jobs = [line.split()[2].rstrip(":") for line in submitted.stdout.splitlines() if line.startswith("submitted job ")]
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_0", f"{array}_1"]
    assert f"all 2 are the job array {array}" in submitted.stdout

    folders = dict(zip(jobs, (tmp_path / config.stem for config in configs), strict=True))
    for job, folder in folders.items():
        wait_until(lambda job=job, folder=folder: lines(folder) >= 3 or ended(job)(), folder)
    cores = int(subprocess.check_output(["sinfo", "--noheader", "--format=%c"], text=True).split()[0])
    words = ["--partition=urgent", f"--ntasks={cores - 1}", "--output=/dev/null", "--wrap=true"]
    urgent = subprocess.check_output(["sbatch", "--parsable", *words], text=True).strip()
    wait_until(ended(urgent), tmp_path / "a")
    for job, folder in folders.items():
        wait_until(ended(job), folder)
    assert {show(job)["JobState"] for job in (*jobs, urgent)} == {"COMPLETED"}
    stopped, whole = sorted(jobs, key=lambda job: -int(show(job)["Restarts"]))
    assert (show(stopped)["Restarts"], show(whole)["Restarts"]) == ("1", "0")
    log = (folders[stopped] / "slurm" / f"{stopped}_0_log.err").read_text()
    assert "the same command goes on from there" in log
    assert "resumed from" in log
    assert f"done: {ITERATIONS} iterations" in log
    assert f"done: {ITERATIONS} iterations" in (folders[whole] / "slurm" / f"{whole}_0_log.err").read_text()
    name = f"model_{ITERATIONS - 1:07d}.rank_0.pth"
    assert_identical(*(torch.load(folders[job] / name, weights_only=True) for job in (stopped, whole)))
    assert records(folders[stopped]) == records(folders[whole])


def test_a_cancelled_training_is_not_queued_again(door: Door, parts: Path, tmp_path: Path) -> None:
    job = submit_training(door, parts, tmp_path)
    wait_until(lambda: lines(tmp_path) >= 1 or ended(job)(), tmp_path)
    subprocess.run(["scancel", job], check=True)
    wait_until(ended(job), tmp_path)
    assert (show(job)["JobState"], show(job)["Restarts"]) == ("CANCELLED", "0")


def processes_of(output: Path) -> list[int]:
    """Those that run a job's command, by rank; as soon as Python runs in both."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            environment = dict(pair.partition("=")[::2] for pair in (folder / "environ").read_text().split("\0"))
            status = (folder / "status").read_text()
        except OSError:  # it has just ended
            continue
        if words[-2:-1] == [str(output / "slurm")] and words[0].endswith("python"):
            parent = int(status.partition("PPid:")[2].split()[0])
            found[int(folder.name)] = (int(environment["SLURM_PROCID"]), parent)
    return [pid for pid, _ in sorted(found.items(), key=lambda item: item[1]) if found[pid][1] not in found]


@pytest.mark.parametrize("how", ["a more urgent job", "the signal"])
def test_a_job_is_queued_again_also_in_its_first_second(door: Door, parts: Path, tmp_path: Path, how: str) -> None:
    job = submit_training(door, parts, tmp_path)
    wait_until(lambda: len(processes_of(tmp_path)) == 2 or ended(job)(), tmp_path)  # torch is not imported yet
    if how == "the signal":
        out = tmp_path / "slurm" / f"{job}_0_log.out"
        wait_until(lambda: out.exists() and "Loading pickle" in out.read_text(), tmp_path)
        time.sleep(0.3)
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
    else:
        cores = int(subprocess.check_output(["sinfo", "--noheader", "--format=%c"], text=True).split()[0])
        words = ["--partition=urgent", f"--ntasks={cores}", "--output=/dev/null", "--wrap=true"]
        subprocess.run(["sbatch", *words], check=True, capture_output=True)
    wait_until(lambda: int(show(job)["Restarts"]) > 0 or ended(job)(), tmp_path)
    wait_until(ended(job), tmp_path)
    assert (show(job)["JobState"], show(job)["Restarts"]) == ("COMPLETED", "1")
    assert f"done: {ITERATIONS} iterations" in (tmp_path / "slurm" / f"{job}_0_log.err").read_text()


def test_a_killed_process_is_named_and_the_job_ends_soon(door: Door, parts: Path, tmp_path: Path) -> None:
    job = submit_training(door, parts, tmp_path)
    wait_until(lambda: lines(tmp_path) >= 1 or ended(job)(), tmp_path)
    os.kill(processes_of(tmp_path)[1], signal.SIGKILL)
    wait_until(ended(job), tmp_path)
    assert show(job)["JobState"] == "FAILED"
    log = (tmp_path / "slurm" / f"{job}_0_log.err").read_text()
    assert "THE PROCESSES HAVE LOST EACH OTHER in iteration" in log
    assert "rank 1 does not answer" in log
    assert "with everything saved" not in log


def test_srun_in_a_batch_script_of_ones_own_is_one_run(repository: Path, parts: Path, tmp_path: Path) -> None:
    words = [*TINY, "train.OFFICIAL_EPOCH_LENGTH=2", f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"]
    command = shlex.join([sys.executable, "run/train/train.py", *words, f"train.output_dir={tmp_path / 'run'}"])
    batch = ["sbatch", "--parsable", "--ntasks=2", f"--output={tmp_path / 'log'}", f"--wrap=srun {command}"]
    job = subprocess.check_output(batch, cwd=repository, text=True).strip()
    wait_until(ended(job), tmp_path)
    log = (tmp_path / "log").read_text()
    assert (show(job)["JobState"], show(job)["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "2 process(es) on cpu" in log
    assert log.count("done: 2 iterations") == 1


def test_an_evaluator_is_waited_for(door: Door, parts: Path, tmp_path: Path) -> None:
    sets = [f"--{name}-dataset=GroupedJSON:split={split}:root={parts}" for name, split in SETS]
    words = (*VIT, *sets, "--nb-knn", "1", "--num-workers", "0", "--output-dir", str(tmp_path), *JOB, "--wait")
    finished = door("run/eval/knn.py", *words)
    assert finished.returncode == 0, finished.stderr
    assert list(tmp_path.glob("results*.json"))

    nowhere = ("--train-dataset", "GroupedJSON:split=TRAIN:root=/nowhere")
    failed = door("run/eval/knn.py", *words, *nowhere, "--no-check-paths")
    assert failed.returncode == 1
    assert "'/nowhere' is not a folder" in failed.stderr
    assert "_0_log.err" in failed.stderr


def test_what_slurm_refuses_is_told(door: Door, tmp_path: Path) -> None:
    words = (*LONG, f"train.output_dir={tmp_path}", *JOB, "--partition", "nowhere", "--no-check-paths")
    refused = door("run/train/train.py", *words)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: SLURM refused the job: ")
    assert "invalid partition specified: nowhere" in refused.stderr
