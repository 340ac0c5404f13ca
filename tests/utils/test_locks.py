"""Locks, and that prediction and deployment do without what Windows lacks."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dinov2.utils.files import lock_file

AS_ON_WINDOWS = """
import signal, sys
sys.modules["fcntl"] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    delattr(signal, name)
import importlib, pathlib
for package in ("predict", "deploy"):
    for path in sorted(pathlib.Path("dinov2", package).glob("*.py")):
        try:
            importlib.import_module(f"dinov2.{package}.{path.stem}")
        except ModuleNotFoundError as error:  # an extra that is not installed
            assert error.name in ("av",), error
import dinov2.run.launch
from dinov2.utils.files import write_atomically
sys.modules["msvcrt"] = type(sys)("msvcrt")
sys.modules["msvcrt"].LK_NBLCK, sys.modules["msvcrt"].locking = 2, lambda *_: None
write_atomically("OUT", lambda file: file.write(b"content"))
from dinov2.utils.interruption import Interruption
with Interruption():
    pass
print("imported")
"""


def test_prediction_and_deployment_import_without_what_windows_lacks(repository: Path, tmp_path: Path) -> None:
    code = AS_ON_WINDOWS.replace("OUT", str(tmp_path / "file"))
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert result.stdout == "imported\n", result.stderr
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("on_windows", [False, True])
def test_a_lock_keeps_other_processes_out_until_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_windows: bool
) -> None:
    if on_windows:
        import fcntl

        def locking(handle: int, mode: int, count: int) -> None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, count, os.lseek(handle, 0, os.SEEK_CUR))

        stand_in = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
        monkeypatch.setitem(sys.modules, "msvcrt", stand_in)
        monkeypatch.setitem(sys.modules, "fcntl", None)
    path = tmp_path / "lock"
    path.write_bytes(b"12345678")
    attempt = f"import fcntl; fcntl.lockf(open({str(path)!r}, 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def is_free() -> bool:
        return subprocess.run([sys.executable, "-S", "-c", attempt], capture_output=True, check=False).returncode == 0

    handle = os.open(path, os.O_RDWR)
    os.lseek(handle, 3, os.SEEK_SET)
    lock_file(handle)
    assert os.read(handle, 2) == b"45", "the position stays"
    assert not is_free()
    os.close(handle)
    assert is_free()
