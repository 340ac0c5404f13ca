"""Flags of jobs: taken off the command line, checked, and told to submitit; and how a command ends."""

import importlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import submitit
import torch.distributed as dist
from launch_stand_ins import StandInOptions

from dinov2.__main__ import COMMANDS
from dinov2.config.command_line import parse_known
from dinov2.run import jobs as submission
from dinov2.run.launch import exit_with, launch, plan_runs
from dinov2.run.slurm_options import SlurmOptions
from dinov2.utils.errors import RunError, StartAgainError


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, str]]:
    """What would have been handed to submitit: runs, options and the name of the jobs, for each call."""
    calls: list[tuple[Any, Any, str]] = []

    def submit(command: Any, runs: Any, options: Any, *, name: str) -> int:
        calls.append((runs, options, name))
        return 0

    monkeypatch.setattr(submission, "submit", submit)
    monkeypatch.setattr(SlurmOptions, "check_installed", lambda self: None)
    return calls


@pytest.fixture
def seen() -> list[list[str]]:
    """Words with which `here` was called."""
    return []


@pytest.fixture
def here(seen: list[list[str]]) -> Any:
    """A command that runs in this process, and ends with code 7."""
    return lambda words=None: seen.append(list(words or ())) or 7


def configs(folder: Path, *names: str, output_dir: str = "") -> list[str]:
    """Config files, by default each with its own folder."""
    for name in names:
        (folder / f"{name}.yaml").write_text(f"train: {{output_dir: {output_dir or folder / name}}}\n")
    return [str(folder / f"{name}.yaml") for name in names]


def test_without_a_job_the_command_runs_here_with_its_words_and_code(here: Any, seen: list[list[str]]) -> None:
    # A flag without a config is left to the command.
    words = ["--config", "a.yaml", "--temperature", "0.1", "train.seed=1", "--no-x"]
    for given in (words, ["--config"], ["--config", "--resume"], ["--config", "a.yaml", "--config-file"]):
        assert launch(here, StandInOptions, given) == 7
        assert seen[-1] == given
    launch(here, StandInOptions, ["--config-file=odd name", "b.c=d.yaml"])
    assert seen[-1] == ["--config", "odd name", "b.c=d.yaml"]


@pytest.mark.parametrize("flag", ["--slurm.local", "--slurm-local", "--slurm_local"])
def test_all_spellings_of_the_local_flag_are_known(flag: str) -> None:
    options, rest = parse_known(SlurmOptions, [flag, "--ngpus=2", "a=b"])
    assert options.slurm_local
    assert not options.slurm
    assert (options.ngpus, rest) == (2, ["a=b"])


def test_flags_of_the_job_are_taken_off_wherever_they_stand(
    submitted: list[Any], tmp_path: Path, here: Any, seen: list[list[str]]
) -> None:
    (config,) = configs(tmp_path, "a")
    words = ["--nodes", "2", "train.seed=3", "--slurm", "--config", config, "--partition", "P", "--no-x"]
    with pytest.raises(SystemExit, match="2"):
        launch(here, StandInOptions, words)  # the command does not know --no-x, which is found before submitting
    assert launch(here, StandInOptions, words[:-1]) == 0
    ((runs, options, _),) = submitted
    assert [(run.words, run.folder) for run in runs] == [(("--config", config, "train.seed=3"), tmp_path / "a")]
    assert (options.nodes, options.partition, options.given()) == (2, "P", ["--slurm", "--nodes", "--partition"])
    assert not seen


@pytest.mark.parametrize("flags", [("--config", "*"), ("--slurm-array", "*"), ("--config", "1", "--slurm-array", "2")])
def test_an_array_has_a_job_and_a_folder_for_each_config(
    submitted: list[Any], tmp_path: Path, here: Any, flags: tuple[str, ...]
) -> None:
    paths = configs(tmp_path, "a", "b")
    given = {"*": paths, "1": paths[:1], "2": paths[1:]}
    words = [word for flag in flags for word in given.get(flag, [flag])]
    launch(here, StandInOptions, ["--slurm", *words, "train.seed=3"])
    ((runs, _, _),) = submitted
    assert [run.words for run in runs] == [("--config", path, "train.seed=3") for path in paths]
    assert [run.folder for run in runs] == [tmp_path / "a", tmp_path / "b"]


def test_several_configs_have_folders_of_their_own_or_are_refused(tmp_path: Path) -> None:
    paths = configs(tmp_path, "a", "b")
    runs = plan_runs(StandInOptions, paths, ["--output-dir", str(tmp_path / "out")])
    assert [run.folder for run in runs] == [tmp_path / "out" / "a", tmp_path / "out" / "b"]
    assert [run.words[-1] for run in runs] == [str(run.folder) for run in runs]
    paths = configs(tmp_path, "a", "b", output_dir="same")
    with pytest.raises(ValueError, match=r"2 jobs would write to 1 folder\(s\) \(same\).*its own train\.output_dir"):
        plan_runs(StandInOptions, paths, [])


WRONG_FLAGS = {
    "no job": ("--nodes 2 --mem 3G", r"--nodes, --mem: only with --slurm, or --slurm-local"),
    "wait": ("--wait", r"--wait: only with --slurm"),
    "several configs": ("--config a.yaml b.yaml", r"2 configs are 2 runs, which needs --slurm"),
    "no nodes": ("--slurm --nodes 0", r"--nodes must be at least 1, found 0"),
    "tasks": ("--slurm --ngpus 8 --ntasks-per-node 4", r"--ntasks-per-node 4 contradicts --ngpus 8"),
    "two machines": ("--slurm-local --nodes 2", r"this machine alone, found --nodes 2"),
    "delay": ("--slurm --timeout 2 --signal-delay 120", r"--signal-delay 120 \(seconds\) must be shorter.*--timeout 2"),
    "no resume": ("--slurm --no-resume", r"--no-resume in a job would begin anew.*fresh folder"),
    "option": ("--slurm train.sede=1", r"unknown option train\.sede.*did you mean train\.seed"),
    "no config": ("--slurm --config /nowhere.yaml", r"no config file at /nowhere\.yaml"),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    name: str, submitted: list[Any], here: Any, seen: list[list[str]]
) -> None:
    words, message = WRONG_FLAGS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        launch(here, StandInOptions, words.split())
    assert not submitted
    assert not seen


def test_data_and_weights_are_looked_for_before_anything_is_submitted(submitted: list[Any], tmp_path: Path) -> None:
    train = importlib.import_module("dinov2.train.command")
    knn = importlib.import_module("dinov2.eval.knn")
    there = f"ImageFolder:root={tmp_path}:labels=none"
    words = ["--slurm", "--output-dir", str(tmp_path / "run")]
    for command, options, pairs, message in (
        (train, "TrainCommand", ["train.dataset_path=ImageFolder:root=/nowhere"], r"train\.dataset_path=.*: /nowhere"),
        (
            train,
            "TrainCommand",
            [f"train.dataset_path={there}", "student.pretrained_weights=a.pth"],
            r"s=a\.pth: a\.pth",
        ),
        (train, "TrainCommand", [f"train.dataset_path={there}", "MODEL.WEIGHTS=m.rank_{rank}.pth"], "MODEL.WEIGHTS=m"),
        (knn, "KnnOptions", ["--train-dataset", "ImageFolder:root=/nowhere"], "train_dataset=.*: /nowhere"),
        (knn, "KnnOptions", ["--train-dataset", there, "--pretrained-weights", "a.pth"], "pretrained_weights=a"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{message}.* does not exist.*--no-check-paths"):
            launch(command.main, getattr(command, options), [*words, *pairs])
        assert not submitted
        assert launch(command.main, getattr(command, options), [*words, *pairs, "--no-check-paths"]) == 0
        submitted.clear()
    pairs = ["student.pretrained_weights=dinov2_vits14", f"train.dataset_path={there}"]
    assert launch(train.main, train.TrainCommand, [*words, *pairs]) == 0, "released weights can be fetched"
    (tmp_path / "w.pth").touch()
    pairs = [f"student.pretrained_weights={tmp_path}/w.pth:prefix=model", f"train.dataset_path={there}"]
    assert launch(train.main, train.TrainCommand, [*words, *pairs]) == 0, "a prefix is no part of the path"


def test_a_dry_run_is_not_submitted(
    submitted: list[Any], here: Any, seen: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(here, StandInOptions, ["--slurm", "--nodes", "2", "--ngpus", "8", "--dry-run", "train.seed=1"]) == 7
    assert seen == [["--dry-run", "train.seed=1"]]
    assert not submitted
    assert "nothing is submitted; what follows is the dry run of one process" in capsys.readouterr().out


def test_doors_that_do_not_submit_name_those_that_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["eval/knn.py"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("dinov2.eval.knn").main(["--slurm", "--nodes", "2"])
    assert "run/eval/knn.py" in capsys.readouterr().err


def test_torchrun_and_a_job_exclude_each_other(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(ValueError, match="with python, not with torchrun"):
        launch(here, StandInOptions, ["--slurm"])


def test_submitit_and_slurm_are_asked_for_by_name(here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--slurm", "--output-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RunError, match=r"--slurm needs submitit.*pip install 'dinov2\[slurm\]'"):
            launch(here, StandInOptions, words)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(RunError, match=r"needs SLURM, but sbatch is not on this machine's path.*--slurm-local"):
            launch(here, StandInOptions, words)
    monkeypatch.setattr(submitit.JobEnvironment, "USR_SIG", "USR1")
    with pytest.raises(RunError, match=r"SUBMITIT_PREEMPT_SIGNAL=USR1 cannot be used.*\(USR2\)"):
        launch(here, StandInOptions, ["--slurm-local", *words[1:]])
    assert not (tmp_path / "run").exists()


def test_the_batch_script_says_what_the_flags_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    words = (
        "--slurm --nodes 2 --ngpus 8 --cpus-per-task 10 --mem 240G --timeout 2800 --partition P --account A --qos Q "
        "--constraint C --exclude node[07-09] --comment why --job-name J --signal-delay 90"
    )
    options, rest = parse_known(SlurmOptions, words.split())
    assert not rest
    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(**options.slurm_parameters("train"))
    script = executor._make_submission_file_text("COMMAND", "")
    expected = (
        "nodes=2 ntasks-per-node=8 gpus-per-node=8 cpus-per-task=10 mem=240G time=2800 partition=P account=A qos=Q "
        "constraint=C exclude='node[07-09]' comment=why job-name=J signal=USR2@90 requeue open-mode=append"
    )
    assert set(expected.split()) <= {line.removeprefix("#SBATCH --") for line in script.splitlines()}
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert "--kill-on-bad-exit=1 --export=ALL --wait=0 --cpus-per-task=10" in srun
    assert srun.endswith("COMMAND")
    parameters = SlurmOptions(slurm=True, ngpus=0, ntasks_per_node=4).slurm_parameters("knn")
    assert (parameters["ntasks_per_node"], parameters["job_name"]) == (4, "knn")
    assert "gpus_per_node" not in parameters


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.options])
def test_every_long_command_can_be_submitted(name: str, submitted: list[Any], tmp_path: Path) -> None:
    command = importlib.import_module(COMMANDS[name].module)
    kind = getattr(command, COMMANDS[name].options)
    assert not {one.name for one in fields(SlurmOptions)} & {one.name for one in fields(kind)}, "flags are ambiguous"
    pair = "head.kind=mlp" if name == "finetune" else "student.arch=vit_small"  # options of its own schema
    assert launch(command.main, kind, ["--slurm", "--no-check-paths", "--output-dir", str(tmp_path), pair]) == 0
    ((runs, _, job_name),) = submitted
    assert runs[0].folder == tmp_path
    assert job_name == name


def test_help_shows_the_commands_flags_and_those_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    command = importlib.import_module("dinov2.train.command")
    with pytest.raises(SystemExit, match="0"):
        launch(command.main, command.TrainCommand, ["--help"])
    printed = capsys.readouterr().out
    assert printed.index("--dry-run") < printed.index("SLURM jobs, with --slurm") < printed.index("--signal-delay")


def test_doors_submit_the_evaluators_of_the_same_name(repository: Path) -> None:
    doors = sorted((repository / "run" / "eval").glob("*.py"))
    assert {door.stem for door in doors} == {path.stem for path in (repository / "eval").glob("*.py")}
    for door in doors:
        names = runpy.run_path(str(door))  # not as __main__: nothing is started
        command = COMMANDS[door.stem]
        assert names["main"] is importlib.import_module(command.module).main
        assert command.options in names


def end(outcome: int | BaseException) -> int | str | None:
    """The exit code of a command that returns or raises ``outcome``."""

    def main() -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as failure:
        exit_with(main)
    return failure.value.code


@pytest.mark.parametrize(
    ("outcome", "code", "printed"),
    [
        *((code, code, "") for code in (0, 1, 130, 143)),
        *((kind("a wrong option"), 1, "error: a wrong option\n") for kind in (ValueError, FileNotFoundError, RunError)),
        (StartAgainError("a process is lost"), 75, "error: a process is lost\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(2), 2, ""),  # of argparse
    ],
)
def test_how_a_command_ends(
    outcome: int | BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(outcome) == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AssertionError, KeyError])
def test_defects_show_their_traceback(error: type[Exception]) -> None:
    def main() -> int:
        raise error("a defect")

    with pytest.raises(error, match="a defect"):
        exit_with(main)


def run_python(lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60, check=False)


AFTER_GLOO = """
import atexit, sys, threading, time
from dinov2.distributed import session
from dinov2.run.launch import exit_with

class Late:
    def __del__(self):
        print("taken apart", flush=True)

late = Late()
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.3), print("saved"))).start()
if {without_teardown}:
    session._threads_left.set()
exit_with(lambda: {code})
"""


@pytest.mark.parametrize("code", [0, 75])
def test_the_teardown_can_be_left_out_and_nothing_else(code: int) -> None:
    ended = run_python(AFTER_GLOO.format(without_teardown=True, code=code))
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "saved\nat exit\n", "")
    ended = run_python(AFTER_GLOO.format(without_teardown=False, code=code))
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "saved\nat exit\ntaken apart\n", "")


def test_words_that_cannot_be_printed_are_no_success() -> None:
    ended = run_python(
        "import sys; from dinov2.run.launch import end_at_once\n"
        "sys.stdout = open('/dev/full', 'w'); print('figures'); end_at_once(0)"
    )
    assert ended.returncode == 1
