"""The command ``retrieval``: from a config, weights and images to a table, a JSON file and a CSV file."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.data.loaders import make_dataset
from dinov2.distributed import is_main_process
from dinov2.eval.command import TRAIN, VAL, EvaluatorOptions, EvaluatorSetup, evaluator_session
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval import GALLERIES, RetrievalSettings, eval_retrieval, eval_revisited
from dinov2.eval.retrieval.pooling import RETRIEVAL_FEATURES, patch_size_of
from dinov2.eval.retrieval.revisited import ResizeLongerSide
from dinov2.eval.retrieval.whitening import KINDS

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class RetrievalOptions(EvaluatorOptions):
    """Options of the command."""

    output_dir: str = option(".", help="folder for the log, results.json and predictions.csv")
    train_dataset: str | None = option(None, help="further images of the gallery train+val, as a dataset string")
    val_dataset: str | None = option(None, help="images that find the others of their part, as a dataset string")
    features: str | None = option(
        None, help="cls (usually), patch_mean, cls_patch_mean, or gem", choices=RETRIEVAL_FEATURES
    )
    gem_power: float = option(3.0, help="power of the generalised mean, for features gem; 1: the mean")
    scales: tuple[float, ...] = option((1.0,), help="sizes of an image whose features are summed (1 0.7071 1.4142)")
    whitening: str | None = option(None, help="images to fit a whitening on, as a dataset string")
    whitening_kind: str = option("pca", help="learned looks at the parts of that set", choices=KINDS)
    whitening_dim: int | None = option(None, help="width of whitened features (usually all that is possible)")
    ks: tuple[int, ...] = option((1, 5, 10), help="first ranks at which precision and recall are measured")
    gallery: str = option("val", help="what is ranked", choices=GALLERIES)
    revisited: Path | None = option(
        None, help="folder with gnd_roxford5k.pkl or gnd_rparis6k.pkl and jpg/: that benchmark instead of parts"
    )
    longer_side: int = option(1024, help="pixels to which the benchmark's images are scaled")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    options = parse(
        RetrievalOptions,
        argv,
        description=(
            "Scores a frozen backbone by whether a photo finds the other photos of its part, or on the revisited "
            "Oxford and Paris benchmarks."
        ),
        example=(
            "python eval/retrieval.py --config-file configs/eval/vitl14_pretrain.yaml --pretrained-weights W.pth "
            "--val-dataset GroupedJSON:split=VAL:root=/data/parts --output-dir outputs/retrieval"
        ),
    )
    # The config knows the features that all evaluators have.
    shared = dataclasses.replace(options, features=None) if options.features == "gem" else options
    needed = () if options.revisited else (TRAIN, VAL) if options.gallery == "train+val" else (VAL,)
    with evaluator_session(shared, needed=needed) as setup:
        run_retrieval(options, setup)
    return 0


def run_retrieval(options: RetrievalOptions, setup: EvaluatorSetup) -> EvaluationResults:
    """Evaluates what the options and the set-up describe, inside a session of processes."""
    transform = setup.transform
    if options.revisited is not None:
        transform = ResizeLongerSide(options.longer_side, patch_size_of(setup.backbone))
    settings = RetrievalSettings(
        features=options.features or setup.config.evaluation.features,
        gem_power=options.gem_power,
        scales=options.scales,
        whitening=None if not options.whitening else make_dataset(dataset_str=options.whitening, transform=transform),
        whitening_kind=options.whitening_kind,
        whitening_dim=options.whitening_dim,
        ks=options.ks,
        num_resamples=options.num_resamples,
        seed=options.seed,
        batch_size=setup.batch_size,
        num_workers=setup.num_workers,
        device=setup.device,
        autocast_dtype=setup.autocast_dtype,
    )
    _warn_of_idle_options(options, settings)
    described = {"whitening_dataset": options.whitening} if options.whitening else {}
    if options.revisited is not None:
        unused = ("image_size", "whole_image", "train_dataset", "val_dataset")
        described |= {name: value for name, value in setup.settings.items() if name not in unused}
        return eval_revisited(
            setup.backbone,
            options.revisited,
            longer_side=options.longer_side,
            settings=settings,
            output_dir=setup.output_dir,
            weights=setup.weights,
            more_settings=described,
        )
    with_train = options.gallery == "train+val"
    described |= {name: value for name, value in setup.settings.items() if with_train or name != "train_dataset"}
    return eval_retrieval(
        setup.backbone,
        setup.train_dataset if with_train else None,
        setup.val_dataset,
        gallery=options.gallery,
        settings=settings,
        output_dir=setup.output_dir,
        weights=setup.weights,
        more_settings=described,
    )


def _warn_of_idle_options(options: RetrievalOptions, settings: RetrievalSettings) -> None:
    """Says which options were given that do nothing here."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    idle = ["part_aggregation", "part_top_k"]
    idle += [] if settings.features == "gem" else ["gem_power"]
    idle += ["whitening_kind", "whitening_dim"] if settings.whitening is None else []
    if options.revisited is None:
        idle += ["longer_side"] + ([] if options.gallery == "train+val" else ["train_dataset"])
    else:
        idle += ["gallery", "train_dataset", "val_dataset", "image_size", "whole_image", "batch_size"]
    given = [name for name in idle if getattr(options, name) != defaults[name]]
    if given and is_main_process():
        logger.warning("without effect here: %s", ", ".join(f"--{name.replace('_', '-')}" for name in given))
