"""The one command-line parser."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dinov2.config import command_line
from dinov2.config.command_line import describe_flags, option, parse, parse_known


@dataclass(frozen=True)
class Options:
    overrides: tuple[str, ...] = option((), help="pairs", positional=True)
    output_dir: Path = option(Path("out"), help="a folder")
    config: Path | None = option(None, help="a file", aliases=("--config-file",))
    nb_knn: tuple[int, ...] = option((10, 20), help="100 % of the numbers")
    whole: bool = option(False, help="a switch")
    rate: float = option(0.5, help="a number")
    mode: str = option("a", help="a word", choices=("a", "b"))
    beside: tuple[str, ...] | None = option(None, help="words", repeated=True)


@dataclass(frozen=True)
class Switches:
    dry_run: bool = option(False, help="a switch")


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
    assert read("--config", "c").config == read("--config-file", "c").config == read("--config_file=c").config
    assert read("--output_dir=a_b").output_dir == Path("a_b"), "values stay as they are"
    assert read("--no_whole", "a_b=c_d").overrides == ("a_b=c_d",)
    found, rest = parse_known(Switches, ["--dry_run", "--nb_knn", "5", "a_b=1"])
    assert found.dry_run
    assert rest[-2:] == ["5", "a_b=1"]


def test_a_misspelt_flag_of_the_first_parser_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_known(Switches, ["--whole", "--rate=1", "--dry-rate"])[1] == ["--whole", "--rate=1", "--dry-rate"]
    assert parse_known(Switches, ["--whole", "--rates=1"], beside=Options)[1] == ["--whole", "--rates=1"]
    with pytest.raises(SystemExit):
        parse_known(Switches, ["--whole", "--dry_rn"], beside=Options)
    assert "unrecognized arguments: --dry-rn; did you mean --dry-run?" in capsys.readouterr().err


def test_help_names_every_flag_once() -> None:
    text = describe_flags(Switches, "switches")
    assert "--dry-run, --no-dry-run" in text
    assert "_" not in text


def test_pairs_may_stand_anywhere() -> None:
    options = read("a=1", "--whole", "b=2", "--nb_knn", "5", "7")
    assert options == Options(overrides=("a=1", "b=2"), whole=True, nb_knn=(5, 7))


def test_a_repeated_flag_takes_one_word_each_time() -> None:
    found = read("--beside", "x", "a=1", "--beside", "y", "b=2")
    assert (found.beside, found.overrides) == (("x", "y"), ("a=1", "b=2"))


def test_a_switch_can_be_turned_off() -> None:
    assert read("--no-whole").whole is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "x"], "invalid float value"),
        (["--mode", "c"], "invalid choice"),
        (["--unknown"], "unrecognized arguments"),
        (["--out", "x"], "unrecognized arguments"),
        (["--nbknn", "3"], "unrecognized arguments: --nbknn; did you mean --nb-knn?"),
        (["--config-fle=x"], "did you mean --config-file"),
        (["a=1", "--epochs", "5", "b=2"], "config are written without dashes: optim.epochs=5\n"),
        (["--epochs=5"], "optim.epochs=5"),
        (["--epochs"], "optim.epochs=…"),
        (["--imgsz", "64", "128"], "crops.global_crops_size=[64,128]"),
        (["--batch_size", "8", "--whole"], "train.batch_size_per_gpu=8"),
        (["--project", "x"], "did you mean --output-dir?"),
    ],
)
def test_a_wrong_word_ends_with_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(*words)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 2, "not the whole usage"
    assert told.endswith(" --help shows all flags\n")


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


@pytest.mark.parametrize("program", [["/usr/bin/dinov2"], ["/somewhere/dinov2/__main__.py"]])
def test_under_the_program_dinov2_the_example_is_one_of_it(
    program: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line.sys, "argv", [*program, "thing", "--help"])
    for example in ("python tools/thing.py x", "torchrun --nproc_per_node=2 run/train/thing.py x"):
        with pytest.raises(SystemExit):
            parse(Options, ["--help"], description="d", example=example)
        text = capsys.readouterr().out
        assert text.startswith("usage: dinov2 thing [-h]")
        assert "\n  dinov2 thing x\n" in text
