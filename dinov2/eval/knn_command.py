"""The command ``knn``: from a config, weights and labelled datasets to a table, a JSON file and a CSV file."""

from collections.abc import Sequence
from dataclasses import dataclass

from dinov2.config.command_line import option, parse
from dinov2.eval.command import EvaluatorOptions, EvaluatorSetup, evaluator_session, flag_pairs
from dinov2.eval.knn import eval_knn
from dinov2.eval.results import EvaluationResults

CONFIG_OF_FLAG = {"nb_knn": "nb_knn", "temperature": "temperature"}


@dataclass(frozen=True)
class KnnOptions(EvaluatorOptions):
    """Options of the command."""

    nb_knn: tuple[int, ...] | None = option(None, help="numbers of neighbours (usually 10 20 100 200)")
    temperature: float | None = option(None, help="temperature of the neighbours' votes (usually 0.07)")
    gather_on_cpu: bool = option(False, help="keep the bank in host memory, for one larger than the GPU")
    n_per_class_list: tuple[int, ...] = option((-1,), help="images per class of few-shot banks; -1: the whole bank")
    n_tries: int = option(1, help="few-shot banks per number of images")
    leave_one_part_out: bool = option(
        False, help="photos of an image's own part do not vote; one dataset is then enough"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    options = parse(
        KnnOptions,
        argv,
        description="Scores a frozen backbone by weighted nearest-neighbour classification, per image and per part.",
        example=(
            "python eval/knn.py --config-file configs/eval/vitl14_pretrain.yaml --pretrained-weights W.pth "
            "--train-dataset GroupedJSON:split=TRAIN:root=/data/parts "
            "--val-dataset GroupedJSON:split=VAL:root=/data/parts --output-dir outputs/knn"
        ),
    )
    pairs = flag_pairs(options, CONFIG_OF_FLAG)
    with evaluator_session(options, extra_pairs=pairs, any_of_them=options.leave_one_part_out) as setup:
        run_knn(options, setup)
    return 0


def run_knn(options: KnnOptions, setup: EvaluatorSetup) -> EvaluationResults:
    """Evaluates what the options and the set-up describe, inside a session of processes."""
    evaluation = setup.config.evaluation
    only_one = len(setup.datasets) == 1
    return eval_knn(
        setup.backbone,
        next(iter(setup.datasets.values())) if only_one else setup.train_dataset,
        None if only_one else setup.val_dataset,
        nb_knn=evaluation.nb_knn,
        temperature=evaluation.temperature,
        leave_one_part_out=options.leave_one_part_out,
        n_per_class_list=options.n_per_class_list,
        n_tries=options.n_tries,
        batch_size=setup.batch_size,
        num_workers=setup.num_workers,
        device=setup.device,
        autocast_dtype=setup.autocast_dtype,
        gather_on_cpu=options.gather_on_cpu,
        features=evaluation.features,
        part_aggregation=options.part_aggregation,
        part_top_k=options.part_top_k,
        num_resamples=options.num_resamples,
        seed=options.seed,
        output_dir=setup.output_dir,
        weights=setup.weights,
        settings=setup.settings,
    )
