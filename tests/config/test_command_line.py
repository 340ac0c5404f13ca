"""The one command-line parser."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dinov2.config.command_line import option, parse


@dataclass(frozen=True)
class Options:
    overrides: tuple[str, ...] = option((), help="pairs", positional=True)
    output_dir: Path = option(Path("out"), help="a folder")
    config: Path | None = option(None, help="a file", aliases=("--config-file",))
    nb_knn: tuple[int, ...] = option((10, 20), help="100 % of the numbers")
    whole: bool = option(False, help="a switch")
    rate: float = option(0.5, help="a number")
    mode: str = option("a", help="a word", choices=("a", "b"))


@dataclass(frozen=True)
class Required:
    name: str = option(help="must be there")
    values: tuple[int, ...] = option(help="one at least")


def read(*words: str) -> Options:
    return parse(Options, list(words), description="does a thing", example="python thing.py x")


def test_defaults_hold_without_words() -> None:
    assert read() == Options()


def test_dashes_underscores_and_aliases_mean_the_same() -> None:
    assert read("--output-dir", "x").output_dir == read("--output_dir", "x").output_dir == Path("x")
    assert read("--config", "c").config == read("--config-file", "c").config == Path("c")


def test_pairs_may_stand_anywhere() -> None:
    options = read("a=1", "--whole", "b=2", "--nb_knn", "5", "7")
    assert options == Options(overrides=("a=1", "b=2"), whole=True, nb_knn=(5, 7))


def test_a_switch_can_be_turned_off() -> None:
    assert read("--no-whole").whole is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "x"], "invalid float value"),
        (["--mode", "c"], "invalid choice"),
        (["--unknown"], "unrecognized arguments"),
        (["--out", "x"], "unrecognized arguments"),
    ],
)
def test_a_wrong_word_ends_with_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_required_options_are_demanded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Required, ["--name", "x"], description="d", example="e")
    assert "--values" in capsys.readouterr().err
    assert parse(Required, ["--name", "x", "--values", "1"], description="d", example="e").values == (1,)


def test_help_shows_the_example_and_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "python thing.py x" in text
    assert "100 % of the numbers (default: 10 20)" in text
