"""``dinov2 train …``, ``dinov2 knn …``: the commands without a checkout; also ``python -m dinov2``."""

import difflib
import functools
import importlib
import sys
from dataclasses import dataclass
from typing import Any

from dinov2 import __version__


@dataclass(frozen=True, kw_only=True)
class Command:
    """Where a command is, and what it is for.

    Attributes:
        module: holds ``main``, which takes the words after the command's name.
        options: name of its options there, for commands that can be submitted as a job; empty for others.
        meaning: what it does, in a line.
    """

    module: str
    options: str = ""
    meaning: str


COMMANDS = {
    "train": Command(
        module="dinov2.train.command", options="TrainCommand", meaning="pretrain a backbone on unlabelled images"
    ),
    "knn": Command(module="dinov2.eval.knn", options="KnnOptions", meaning="score a backbone by nearest neighbours"),
    "linear": Command(
        module="dinov2.eval.linear",
        options="LinearOptions",
        meaning="score a backbone by linear classifiers",
    ),
    "log_regression": Command(
        module="dinov2.eval.log_regression",
        options="LogRegressionOptions",
        meaning="score a backbone by logistic regression",
    ),
    "retrieval": Command(
        module="dinov2.eval.retrieval.evaluation",
        options="RetrievalOptions",
        meaning="score a backbone by how it finds images of the same thing",
    ),
    "anomaly": Command(
        module="dinov2.eval.anomaly.evaluation",
        options="AnomalyOptions",
        meaning="find anomalies by the features of good parts alone, and score that",
    ),
    "finetune": Command(
        module="dinov2.tasks.engine",
        options="FinetuneCommand",
        meaning="train a head for classes, masks or depth",
    ),
    "infer_image": Command(
        module="dinov2.predict.images", meaning="predict classes, masks or depths for images with a trained model"
    ),
    "infer_video": Command(module="dinov2.predict.video", meaning="the same for the frames of a video"),
    "calibrate": Command(
        module="dinov2.predict.calibrate", meaning="set the thresholds of an anomaly model anew from good parts alone"
    ),
    "prepare_csv": Command(
        module="dinov2.data.prepare.from_csv", meaning="write images that a table lists as a set with splits by part"
    ),
    "visualize_features": Command(
        module="dinov2.eval.visualize", meaning="draw what a backbone makes of the images of a dataset"
    ),
    "export": Command(
        module="dinov2.deploy.export", meaning="write a model as a verified file for a runtime, or for another library"
    ),
    "prune": Command(
        module="dinov2.deploy.prune", meaning="take heads, hidden units or blocks out of a backbone to make it faster"
    ),
    "verify": Command(
        module="dinov2.deploy.verify",
        meaning="compare an exported file with its model, on the machine that will use it",
    ),
    "serve": Command(module="dinov2.deploy.serve", meaning="serve a trained model over HTTP"),
    "watch": Command(
        module="dinov2.deploy.watch", meaning="predict for the images that are dropped into a folder, each once"
    ),
    "report_run": Command(module="dinov2.eval.report.page", meaning="write what is known of a run into one HTML file"),
}


def main() -> None:
    """Runs the command that the first word names, with the words after it."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        sys.stdout.write(f"dinov2 {__version__}\n")
        sys.exit(0)
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_usage())
        sys.exit(0)
    if not words or words[0] not in COMMANDS:
        error = "no command was given"
        if words:
            near = difflib.get_close_matches(words[0], COMMANDS, n=2)
            error = f"unknown command {words[0]!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
        sys.stderr.write(f"{_usage()}error: {error}\n")
        sys.exit(2)
    # Imported only now: the list of commands should not wait for torch.
    process_end: Any = importlib.import_module("dinov2.run.launch")
    process_end.exit_with(functools.partial(_run, COMMANDS[words[0]], words[1:]))


def _run(command: Command, words: list[str]) -> int:
    run: Any = importlib.import_module(command.module)
    if not command.options:
        return int(run.main(words))
    launch: Any = importlib.import_module("dinov2.run.launch").launch
    return int(launch(run.main, getattr(run, command.options), words))


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{command.meaning}" for name, command in COMMANDS.items())
    return (
        f"usage: dinov2 COMMAND ...\n\ncommands:\n{commands}\n\ndinov2 COMMAND --help explains one and gives an "
        f"example.\n"
    )


if __name__ == "__main__":
    main()
