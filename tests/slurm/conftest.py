"""A real SLURM of one machine, for the length of the tests."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "start_slurm.sh"
CANNOT_INSTALL = 3


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """Folder of a running SLURM, which ``SLURM_CONF`` points at; skips where it cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("starting SLURM needs root")
    if not Path("/etc/debian_version").exists():
        pytest.skip("SLURM is installed from Debian's packages, and this is not Debian")
    if shutil.which("sbatch") is None and shutil.which("apt-get") is None:
        pytest.skip("SLURM is not installed, and there is no apt-get")
    folder = Path(tempfile.mkdtemp(prefix="slurm_")) / "slurm"
    folder.parent.chmod(0o755)  # munge runs as a user of its own
    started = run_script("start", folder)
    if started.returncode == CANNOT_INSTALL:
        folder.parent.rmdir()
        pytest.skip(started.stderr.strip())
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
            yield folder
    finally:
        run_script("stop", folder)
        shutil.rmtree(folder.parent)


def run_script(word: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    # Not through pipes: daemons would keep them open.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(["bash", SCRIPT, word, folder], stdout=output, stderr=output, timeout=600, check=False)
        output.seek(0)
        return subprocess.CompletedProcess(done.args, done.returncode, "", output.read())
