"""The project's only use of argparse: a door declares a frozen dataclass of options and gets an instance back."""

import argparse
import dataclasses
import difflib
import importlib
import itertools
import re
import shutil
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dinov2.config.loader import leaf_names
from dinov2.config.schema import Config

T = TypeVar("T")

_NO_DEFAULT = dataclasses.MISSING
_SUGGESTIONS = 3
# What other programs of the field call these options.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "imgsz": ("image_size", "global_crops_size"),
    "img_size": ("image_size", "global_crops_size"),
    "crop_size": ("image_size", "global_crops_size"),
    "batch": ("batch_size", "batch_size_per_gpu"),
    "batch_size": ("batch_size_per_gpu",),
    "bs": ("batch_size", "batch_size_per_gpu"),
    "data": ("dataset_path", "train_dataset_path", "train_dataset"),
    "data_path": ("dataset_path", "train_dataset_path", "train_dataset"),
    "dataset": ("dataset_path", "train_dataset_path", "train_dataset"),
    "learning_rate": ("lr", "base_lr"),
    "lr0": ("lr", "base_lr"),
    "model": ("arch", "pretrained_weights"),
    "pretrained": ("pretrained_weights",),
    "weights": ("pretrained_weights",),
    "workers": ("num_workers",),
    "project": ("output_dir",),
    "out": ("output_dir",),
    "output": ("output_dir",),
    "wd": ("weight_decay",),
}
_DOOR = re.compile(r"^(?:torchrun (?:-\S+ )*|python )\S+\.py")  # how examples call a script of the checkout


def option(
    default: Any = _NO_DEFAULT,
    *,
    help: str,
    positional: bool = False,
    repeated: bool = False,
    choices: Sequence[Any] | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """Declares one command-line option as a dataclass field.

    Args:
        default: value when the option is not given; without one the option is required.
        help: one line for ``--help``.
        positional: whether the value stands without a flag (a tuple then takes all that remain).
        repeated: whether each value of a tuple has the flag before it; such an option is None where it is not given.
        choices: the values allowed.
        aliases: further flags with the same meaning, with dashes, such as ``("--config-file",)``.
    """
    metadata = {
        "help": help, "positional": positional, "repeated": repeated, "choices": choices, "aliases": tuple(aliases),
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def parse(options: type[T], argv: Sequence[str] | None = None, *, description: str, example: str) -> T:
    """Reads a command line into an instance of ``options``.

    Field ``num_workers`` becomes ``--num-workers`` (``_`` and ``-`` mean the same in flags), a bool becomes ``--flag``
    and ``--no-flag``, a tuple takes several values. Flags and positional values may come in any order.

    Args:
        options: dataclass whose fields were made with `option`; where it has ``overrides``, these are options of its
            ``config_class``, by default of pretraining.
        argv: words after the program's name; by default those of this process.
        description: what the command does, in a sentence.
        example: a command that works, shown at the end of ``--help``; under the program ``dinov2`` with that name in
            place of the script's.

    Raises:
        SystemExit: with a message on a bad command line (code 2), or after ``--help`` (code 0).
    """
    path = Path(sys.argv[0])
    program = path.name
    is_main_module = path.name == "__main__.py" and path.parent.name == "dinov2"
    if (is_main_module or program == "dinov2") and len(sys.argv) > 1:
        program = f"dinov2 {sys.argv[1]}"
        example = _DOOR.sub(program, example)
    parser = _Parser(
        prog=program,
        description=description,
        epilog=f"_ and - mean the same in flags.\n\nexample:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_all(parser, options)
    words = list(_with_dashes(sys.argv[1:] if argv is None else argv))
    values, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        following = words[words.index(unknown[0]) + 1 :] if unknown[0] in words else []
        hint = _near(unknown[0], following, options)
        if unknown[0].startswith("--slurm"):
            hint = f"; jobs are submitted by run/eval/{path.name}, or by dinov2 {path.stem}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return _instance(options, values)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in a line: the usage of an evaluator alone has twenty."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help shows all flags\n")


def door(command: str, script: str) -> list[str]:
    """How a command is started here: by the script of a checkout, the installed program, or the package."""
    if Path(script).is_file():
        return ["python", script]
    return ["dinov2", command] if shutil.which("dinov2") else ["python", "-m", "dinov2", command]


def run_as(command: str) -> NoReturn:
    """What a module of a command does when Python is started with it: the same as ``dinov2 COMMAND``."""
    program: Any = importlib.import_module("dinov2.__main__")  # by name: it stands above all that it starts
    sys.argv[:1] = [program.__file__, command]
    program.main()
    raise AssertionError("a command ends its process")


def parse_known(options: type[T], argv: Sequence[str], *, beside: type | None = None) -> tuple[T, list[str]]:
    """Reads the flags that ``options`` declares off a command line, and leaves the rest for another parser.

    Args:
        options: dataclass whose fields were made with `option`; none of them positional.
        argv: words after the program's name.
        beside: options that the rest is for; a flag of neither that looks like one of ``options`` is wrong.

    Returns:
        The options, and the words that belong to none of them, in order.

    Raises:
        SystemExit: code 2 with a message, when one of the flags has no value or a wrong one, or is misspelt.
    """
    parser = _Parser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    _add_all(parser, options)
    values, rest = parser.parse_known_args(list(_with_dashes(argv)))
    if beside is not None:
        ours, theirs = _all_flags(options), _all_flags(beside)
        for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
            near = difflib.get_close_matches(flag, [*ours, *theirs], n=1, cutoff=0.75)
            if flag not in theirs and near and near[0] in ours:
                parser.error(f"unrecognized arguments: {flag}; did you mean {near[0]}?")
    return _instance(options, values), rest


def describe_flags(options: type, title: str) -> str:
    """Text for ``--help`` about the flags that `parse_known` reads."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    _add_all(parser.add_argument_group(title), options)
    return parser.format_help()


def _with_dashes(words: Sequence[str]) -> Iterator[str]:
    """Words with ``-`` for every ``_`` in the names of flags; their values stay."""
    for word in words:
        flag, equals, value = word.partition("=")
        yield flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def _near(word: str, following: Sequence[str], options: type) -> str:
    """Suggests flags like an unknown one, or options of the config that are written ``key=value``."""
    flag, _, value = word.partition("=")
    numbers = list(itertools.takewhile(lambda text: not text.startswith("-") and "=" not in text, following[:2]))
    value = value or (f"[{','.join(numbers)}]" if len(numbers) > 1 else "".join(numbers))
    known = _all_flags(options)
    name = flag.lstrip("-").replace("-", "_").lower()
    words = {name, *_SYNONYMS.get(name, ())}
    near = [f"--{word.replace('_', '-')}" for word in words if f"--{word.replace('_', '-')}" in known]
    near = near or difflib.get_close_matches(flag, known, n=2, cutoff=0.75)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    if not any(field.name == "overrides" for field in dataclasses.fields(options)):
        return ""
    names = [option for option in leaf_names(getattr(options, "config_class", Config)) if _last(option) in words]
    names.sort(key=lambda option: (option.startswith("evaluation."), _last(option) != name))
    pairs = [f"{option}={value or '…'}" for option in names[:_SUGGESTIONS]]
    return f"; options of the config are written without dashes: {' or '.join(pairs)}" if pairs else ""


def _all_flags(options: type) -> list[str]:
    return [flag for field in dataclasses.fields(options) if not field.metadata["positional"] for flag in _flags(field)]


def _last(option: str) -> str:
    return option.rpartition(".")[2]


def _instance(options: type[T], values: argparse.Namespace) -> T:
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()})


def _add_all(parser: "argparse._ActionsContainer", options: type) -> None:
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        _add(parser, field, hints[field.name])


def _add(parser: "argparse._ActionsContainer", field: "dataclasses.Field[Any]", hint: Any) -> None:
    kind, several = _value_kind(hint)
    required = field.default is _NO_DEFAULT
    shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
    shown = "" if required or field.default in (None, "", ()) else f" (default: {shown})"
    settings: dict[str, Any] = {"help": (field.metadata["help"] + shown).replace("%", "%%")}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["type"] = kind
        settings["choices"] = field.metadata["choices"]
    if field.metadata["repeated"]:
        settings["action"] = "append"
    elif several:
        settings["nargs"] = "*" if not required else "+"
    if field.metadata["positional"]:
        if not required and not several:
            settings["nargs"] = "?"
        if not required:
            settings["default"] = field.default
        parser.add_argument(field.name, **settings)
        return
    default = None if required else field.default
    parser.add_argument(*_flags(field), dest=field.name, required=required, default=default, **settings)


def _flags(field: "dataclasses.Field[Any]") -> list[str]:
    return ["--" + field.name.replace("_", "-"), *field.metadata["aliases"]]


def _value_kind(hint: Any) -> tuple[Any, bool]:
    """Returns the converter of one value, and whether the option takes several."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        assert len(inner) == 1, f"an option has one type, or one type and None, not {hint}"
        return _value_kind(inner[0])
    if typing.get_origin(hint) is tuple:
        return _value_kind(typing.get_args(hint)[0])[0], True
    assert hint in (str, int, float, bool, Path), f"options of type {hint} are not supported"
    return hint, False
