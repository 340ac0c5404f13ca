"""The command ``dinov2``."""

import sys

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
