"""``dinov2 train …``, ``dinov2 knn …``: the commands without a checkout; also ``python -m dinov2``."""

import functools
import importlib
import sys

from dinov2.utils.errors import exit_with

COMMANDS = {
    "train": ("dinov2.train.command", "TrainCommand", "pretrain a backbone on unlabelled images"),
    "finetune": ("dinov2.tasks.finetune_command", "FinetuneCommand", "train a head for classes, masks or depth"),
    "knn": ("dinov2.eval.knn_command", "KnnOptions", "score a backbone by nearest neighbours"),
    "linear": ("dinov2.eval.linear.command", "LinearOptions", "score a backbone by linear classifiers"),
    "log_regression": (
        "dinov2.eval.log_regression.command",
        "LogRegressionOptions",
        "score a backbone by logistic regression",
    ),
    "retrieval": (
        "dinov2.eval.retrieval.command",
        "RetrievalOptions",
        "score a backbone by how it finds images of the same thing",
    ),
}


def main() -> None:
    """Runs the command that the first word names, with the words after it."""
    words = sys.argv[1:]
    if not words or words[0] not in COMMANDS:
        usage = "\n".join(f"  dinov2 {name:<16}{meaning}" for name, (_, _, meaning) in COMMANDS.items())
        asked_for_help = words[:1] in (["-h"], ["--help"])
        (sys.stdout if asked_for_help else sys.stderr).write(f"commands (each has --help):\n{usage}\n")
        sys.exit(0 if asked_for_help else 2)
    # Imported only now: `--help` should not wait for torch.
    launch = importlib.import_module("dinov2.run").launch
    module, options, _ = COMMANDS[words[0]]
    command = importlib.import_module(module)
    exit_with(functools.partial(launch, command.main, getattr(command, options), words[1:]))


if __name__ == "__main__":
    main()
