"""The command ``dinov2``."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

import dinov2
from dinov2.__main__ import COMMANDS, main


def test_every_command_shows_its_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        monkeypatch.setattr(sys, "argv", ["dinov2", name, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: dinov2 {name} ")
        assert f"example:\n  dinov2 {name} " in text


@pytest.mark.parametrize(("words", "code"), [([], 2), (["nonsense"], 2), (["--help"], 0)])
def test_commands_are_listed(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dinov2", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert "usage: dinov2 COMMAND" in (printed.err if code else printed.out)
    assert all(f"  {name} " in printed.out + printed.err for name in COMMANDS)


FILES = {name: importlib.import_module(command.module).__file__ for name, command in COMMANDS.items()}
PACKAGES = ("retrieval", "anomaly", "report")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("dinov2/train/train.py", "train"),
        *((path, name) for name, path in FILES.items()),
        *((f"dinov2/eval/{name}/__main__.py", name.replace("report", "report_run")) for name in PACKAGES),
    ],
)
def test_the_modules_of_commands_do_their_job_when_they_are_started(
    path: str, name: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``python dinov2/train/train.py`` and ``python -m dinov2.train.train``, which once did nothing, with code 0."""
    monkeypatch.setattr(sys, "argv", [path, "--no-such-flag"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(repository / path), run_name="__main__")
    assert ended.value.code == 2
    assert f"dinov2 {name}: error: " in capsys.readouterr().err


def test_a_near_command_is_suggested(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dinov2", "trian"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.endswith("error: unknown command 'trian'; did you mean train?\n")


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dinov2", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dinov2 {dinov2.__version__}\n"


def test_a_wrong_option_ends_with_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dinov2", "train", "train.sede=1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: unknown option train.sede (in 'train.sede=1'); did you mean train.seed?\n"
