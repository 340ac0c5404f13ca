"""Launching: a command line runs its command in this process, or submits jobs that run it."""

import atexit
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from dinov2.config import load_config
from dinov2.config.command_line import describe_flags, parse, parse_known
from dinov2.distributed import may_abort_at_exit
from dinov2.run.slurm_options import Command, Run, SlurmOptions
from dinov2.utils.errors import INTERRUPTED, RunError
from dinov2.utils.untrusted_text import printable

CONFIG_FLAGS = ("--config", "--config-file", "--config_file")
CONFIG_ENDINGS = (".yaml", ".yml")


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
            sys.stdout.write("\n" + describe_flags(SlurmOptions, "jobs"))
    slurm, words = parse_known(SlurmOptions, given)
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
    runs = plan_runs(options, configs, words)
    slurm.check_installed()

    from dinov2.run.jobs import submit  # only now: submitit is needed for jobs alone

    words_of_name = re.findall("[A-Z][a-z]*", options.__name__.removesuffix("Options").removesuffix("Command"))
    return submit(command, runs, slurm, name="_".join(words_of_name).lower())  # LogRegressionOptions: log_regression


def plan_runs(options: type, configs: Sequence[str], words: Sequence[str]) -> list[Run]:
    """Checks the words of every job as far as that can be done without starting it.

    Args:
        options: of the command.
        configs: one job for each; none for a single job without a config.
        words: those that all jobs share.

    Raises:
        ValueError: wrong options of the config, or two jobs with the same folder.
        FileNotFoundError: a config that does not exist.
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
        runs.append(Run((*config_words, *words), Path(command.output_dir or config.train.output_dir)))
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


def end_at_once(code: int) -> NoReturn:
    """Ends the process after everything that an ordinary end waits for, but without the interpreter's teardown."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1  # what was printed is lost, as on a full disk
    os._exit(code)
