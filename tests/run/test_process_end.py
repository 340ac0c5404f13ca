"""How a command ends: its code, and what the person who started it reads."""

import subprocess
import sys

import pytest

from dinov2.run.launch import exit_with
from dinov2.utils.errors import RunError


def end(outcome: int | BaseException) -> int | str | None:
    """The exit code of a command that returns or raises ``outcome``."""

    def main() -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as failure:
        exit_with(main)
    return failure.value.code


@pytest.mark.parametrize("code", [0, 1, 130, 143])
def test_the_command_chooses_its_code(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(code) == code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [ValueError("a wrong option"), FileNotFoundError("a wrong option"), RunError("a wrong option")],
)
def test_errors_of_the_user_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(error) == 1
    assert capsys.readouterr().err == "error: a wrong option\n"


def test_ctrl_c_ends_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AssertionError, KeyError])
def test_defects_show_their_traceback(error: type[Exception]) -> None:
    def main() -> int:
        raise error("a defect")

    with pytest.raises(error, match="a defect"):
        exit_with(main)


def test_argparse_keeps_its_own_code() -> None:
    assert end(SystemExit(2)) == 2


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
