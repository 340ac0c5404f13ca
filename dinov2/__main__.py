"""``dinov2 train …``, ``dinov2 knn …``: the commands without a checkout; also ``python -m dinov2``."""

import functools
import importlib
import sys

from dinov2.utils.errors import exit_with

COMMANDS = {
    "train": ("dinov2.train.command", "pretrain a backbone on unlabelled images"),
    "knn": ("dinov2.eval.knn_command", "score a backbone by nearest neighbours"),
}


def main() -> None:
    """Runs the command that the first word names, with the words after it."""
    words = sys.argv[1:]
    if not words or words[0] not in COMMANDS:
        usage = "\n".join(f"  dinov2 {name:<8}{meaning}" for name, (_, meaning) in COMMANDS.items())
        asked_for_help = words[:1] in (["-h"], ["--help"])
        (sys.stdout if asked_for_help else sys.stderr).write(f"commands (each has --help):\n{usage}\n")
        sys.exit(0 if asked_for_help else 2)
    # Imported only now: `--help` should not wait for torch.
    command = importlib.import_module(COMMANDS[words[0]][0])
    exit_with(functools.partial(command.main, words[1:]))


if __name__ == "__main__":
    main()
