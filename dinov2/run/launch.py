"""Launching: a command line runs its command in this process, or submits jobs that run it."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from dinov2.config import load_config
from dinov2.config.command_line import describe_flags, parse, parse_known
from dinov2.config.loader import leaf_values
from dinov2.distributed import may_abort_at_exit
from dinov2.run.slurm_options import Command, Run, SlurmOptions
from dinov2.utils.errors import INTERRUPTED, RunError
from dinov2.utils.interruption import end_at_once
from dinov2.utils.untrusted_text import printable

_JOBS = "SLURM jobs, with --slurm or --slurm-local; without them the command runs here"
CONFIG_FLAGS = ("--config", "--config-file", "--config_file")
CONFIG_ENDINGS = (".yaml", ".yml")
# Last parts of the names of options that say what is read.
_DATASETS = (
    *("dataset_path", "train_dataset_path", "val_dataset_path", "test_dataset_path", "probe_dataset_path"),
    *("train_dataset", "val_dataset", "test_datasets", "whitening"),
)
_WEIGHTS = ("pretrained_weights", "config_file", "resume_path", "WEIGHTS")


def launch(command: Command, options: type, argv: Sequence[str] | None = None) -> int:
    """Runs a command here, or submits it when ``--slurm`` or ``--slurm-local`` is among its words.

    Args:
        command: ``main`` of the command.
        options: its options, with ``overrides``, ``output_dir``, and ``config`` or ``config_file``;
            ``load_options`` reads configs of another kind than those of pretraining.
        argv: words after the program's name; by default those of this process.

    Returns:
        The command's exit code; 0 for jobs that were submitted, or with ``--wait`` 0 when all have done their work.

    Raises:
        ValueError, OSError, RunError: with a message for the person who started it.
        SystemExit: on a bad command line (code 2), or after ``--help`` (code 0).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not {"-h", "--help"}.isdisjoint(given):
        try:
            return command(["--help"])
        finally:
            sys.stdout.write("\n" + describe_flags(SlurmOptions, _JOBS))
    slurm, words = parse_known(SlurmOptions, given, beside=options)
    slurm.check()
    configs, words = _take_configs(words)
    configs += [word for word in slurm.slurm_array if "=" not in word]
    words += [word for word in slurm.slurm_array if "=" in word]  # pairs that follow the flag
    if not slurm.submits:
        if len(configs) > 1:
            raise ValueError(f"{len(configs)} configs are {len(configs)} runs, which needs --slurm or --slurm-local")
        return command([*(word for config in configs for word in ("--config", config)), *words])
    if dist.is_torchelastic_launched():
        raise ValueError("--slurm starts the processes itself: call it with python, not with torchrun")
    runs = plan_runs(options, configs, words, check_paths=slurm.check_paths)
    if any(word == "--dry-run" for word in words):
        sys.stdout.write(
            f"nothing is submitted; what follows is the dry run of one process on this machine, and the job would have "
            f"{slurm.nodes} x {slurm.tasks_per_node}\n"
        )
        return max(command(run.words) for run in runs)
    slurm.check_installed()

    from dinov2.run.jobs import submit  # only now: submitit is needed for jobs alone

    words_of_name = re.findall("[A-Z][a-z]*", options.__name__.removesuffix("Options").removesuffix("Command"))
    return submit(command, runs, slurm, name="_".join(words_of_name).lower())  # LogRegressionOptions: log_regression


def plan_runs(options: type, configs: Sequence[str], words: Sequence[str], *, check_paths: bool = False) -> list[Run]:
    """Checks the words of every job as far as that can be done without starting it.

    Args:
        options: of the command.
        configs: one job for each; none for a single job without a config.
        words: those that all jobs share.
        check_paths: whether data and weights must be there too.

    Raises:
        ValueError: wrong options of the config, or two jobs with the same folder.
        FileNotFoundError: a config, data or weights that do not exist.
    """
    runs = []
    for config_words in [["--config", config] for config in configs] or [[]]:
        command: Any = parse(options, [*config_words, *words], description="", example="")
        if getattr(command, "resume", True) is False:
            raise ValueError(
                "--no-resume in a job would begin anew whenever it is queued again: use a fresh folder instead"
            )
        path = getattr(command, "config", None) or getattr(command, "config_file", None)
        load = getattr(options, "load_options", load_config)  # supervised runs have another schema
        config = load(path, command.overrides)
        if check_paths:
            check_inputs(command, config)
        folder = command.output_dir or config.train.output_dir
        if tags := set(re.findall("%.", folder)) - {"%j"}:
            raise ValueError(f"{folder}: of SLURM's patterns only %j, the job's number, can be in a folder, not {tags}")
        numbered = ("--output-dir", folder) if "%j" in folder else ()  # which a config cannot replace in the job
        runs.append(Run((*config_words, *words, *numbered), Path(folder)))
    if len(runs) == 1:
        return runs
    by_folder = {run.folder: run for run in runs}
    if len(by_folder) == 1 and any(word.split("=")[0] in ("--output-dir", "--output_dir") for word in words):
        runs = [
            Run((*run.words, "--output-dir", str(run.folder / Path(config).stem)), run.folder / Path(config).stem)
            for run, config in zip(runs, configs, strict=True)
        ]
        by_folder = {run.folder: run for run in runs}
    if len(by_folder) < len(runs):
        raise ValueError(
            f"{len(runs)} jobs would write to {len(by_folder)} folder(s) ({', '.join(map(str, by_folder))}): each "
            f"config needs its own train.output_dir, or give --output-dir for a folder of one folder per config"
        )
    return runs


def check_inputs(command: Any, config: Any) -> None:
    """Checks that what a job reads is there, before it waits in the queue for hours.

    Args:
        command: options of the command; an evaluator names its data and weights there.
        config: options of the run, where the others do.

    Raises:
        ValueError: a dataset string is wrong.
        FileNotFoundError: naming the option, and what it names that does not exist.
    """
    from dinov2.data.datasets.registry import parse_dataset_string  # only now: tools that end here do without datasets
    from dinov2.models.released import RELEASED_BACKBONES, split_prefix

    own = {field.name: getattr(command, field.name) for field in fields(command)}
    values = own if "train_dataset" in own else dict(leaf_values(config))
    for name, value in values.items():
        last = name.rpartition(".")[2]
        for text in filter(None, value if isinstance(value, tuple) else (value,)):
            if last in _DATASETS:
                root = parse_dataset_string(text)[1].get("root")
                missing = root if root and not Path(root).expanduser().exists() else ""
            elif last in _WEIGHTS and text not in RELEASED_BACKBONES and "://" not in text:
                path = str(split_prefix(text)[0]).replace("{rank}", "0")
                missing = "" if Path(path).expanduser().exists() else text
            else:
                continue
            if missing:
                raise FileNotFoundError(
                    f"{name}={text}: {missing} does not exist on this machine; --no-check-paths submits all the same, "
                    f"where only the job sees it"
                )


def _take_configs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes ``--config`` and all configs behind it off the words, and returns both."""
    configs: list[str] = []
    rest: list[str] = []
    before = ""  # the flag, or a config behind it
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in CONFIG_FLAGS and equals:
            configs.append(value)
        elif before in CONFIG_FLAGS and not word.startswith("-"):
            rest.pop()
            configs.append(word)
        elif before.endswith(CONFIG_ENDINGS) and word.endswith(CONFIG_ENDINGS) and not equals:
            configs.append(word)
        else:
            rest.append(word)
            before = flag if flag in CONFIG_FLAGS else ""
            continue
        before = configs[-1]
    return configs, rest


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process: code 0 when the job was done.

    Wrong options and data (`ValueError`, `OSError`, `RunError`) end it with code 1 and their message alone; where the
    command keeps a log, the traceback stands there. `StartAgainError` ends it with code 75, Ctrl-C with code 130.
    Anything else is a defect and shows its traceback.
    """
    try:
        code = main()
    except (ValueError, OSError, RunError) as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        code = error.exit_code if isinstance(error, RunError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = INTERRUPTED
    if may_abort_at_exit():
        end_at_once(code)
    sys.exit(code)
