"""Several configs are one SLURM array: one submission, and what each job says is found in the folder of its run."""

import os
from pathlib import Path

import pytest
from launch_stand_ins import StandInOptions, meet
from submitit.core.utils import DelayedSubmission

from dinov2.run import launch
from dinov2.utils.errors import RunError

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
        assert task.command is meet
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


def test_what_is_refused_is_told_and_leaves_no_links(cluster: Path, tmp_path: Path) -> None:
    sbatch = cluster.parent / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: job arrays are not for you' >&2\nexit 1\n")
    with pytest.raises(RunError, match=r"SLURM refused the job: .*job arrays are not for you"):
        launch(meet, StandInOptions, ["--config", *configs(tmp_path), "--slurm", "--ngpus", "0"])
    assert not list(tmp_path.glob("runs/*/out/slurm/*"))
