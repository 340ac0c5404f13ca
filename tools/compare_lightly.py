"""Trains LightlyTrain's DINOv2 on the images of a run of ours, for as long and at its sizes, and scores both alike."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.config import Config, as_number, as_pair, load_config
from dinov2.config.command_line import option, parse
from dinov2.config.schema import Auto
from dinov2.data.loaders import make_dataset
from dinov2.eval import knn, log_regression
from dinov2.eval.results import RESULTS_FILE, read_results
from dinov2.models.build import build_backbone
from dinov2.run.launch import exit_with
from dinov2.train.setup import scaled_learning_rate
from dinov2.utils.errors import RunError
from dinov2.utils.files import write_text_atomically

PEERS = {"LightlyTrain, its defaults": False, "LightlyTrain, our schedule": True}
SCORERS = {"k-NN": (knn.main, ("--nb-knn", "20")), "logistic": (log_regression.main, ())}
CALIBRATION_MINUTES = 0.5  # a try that tells how many steps there is time for, as schedules need to know
REFERENCE_BATCH = 1024  # at which LightlyTrain states learning rates

# Runs in the other environment. The network is its own class at our sizes, so that nothing of ours is needed there.
PEER = """
import json, pathlib, sys
import lightly_train, torch
from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
torch.manual_seed(job["seed"])
lightly_train.pretrain(model=DinoVisionTransformer(**job["network"]), method="dinov2", overwrite=True,
    trainer_args={"max_time": {"seconds": job["seconds"]}}, **job["call"])
last = torch.load(pathlib.Path(job["call"]["out"], "checkpoints", "last.ckpt"), map_location="cpu", weights_only=False)
print("STEPS", last["global_step"])
"""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of the command."""

    run: Path = option(help="folder of our run: its images, network and pixels are compared")
    minutes: float = option(help="how long our run took, and LightlyTrain may take (each of its two runs)")
    train_dataset: str = option(help="labelled images to learn from, as a dataset string")
    val_dataset: str = option(help="labelled images to evaluate on, as a dataset string")
    output_dir: Path = option(Path("outputs/compare_lightly"), help="folder for runs, scores and tables")
    python: str = option("", help="Python of an environment with lightly-train; none: OUTPUT_DIR/venv, made if missing")
    seed: int = option(0, help="seed of LightlyTrain's runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is not trained yet, scores, and writes ``comparison.md`` and ``comparison.json``."""
    options = parse(
        CompareOptions,
        argv,
        description="Compares a pretraining run with LightlyTrain's DINOv2 on the same images, pixels and minutes.",
        example=(
            "python tools/compare_lightly.py --run outputs/cpu_10min --minutes 10 "
            "--train-dataset GroupedJSON:split=TRAIN:root=data/neu --val-dataset GroupedJSON:split=VAL:root=data/neu"
        ),
    )
    config, steps, weights = read_run(options.run)
    batch = config.train.batch_size_per_gpu
    rows = [{"what": "this project", "minutes": options.minutes, "steps": steps, "images": steps * batch}]
    rows[0] |= score(options, config, weights, options.output_dir / "ours")
    python = options.python or make_environment(options.output_dir / "venv")
    paths = make_dataset(dataset_str=config.train.dataset_path).get_image_paths()
    for name, ours in PEERS.items():
        folder = options.output_dir / ("our_schedule" if ours else "defaults")
        done = folder / "trained.json"
        if not done.is_file():
            tried = train_peer(python, job(config, paths, folder / "try", 10_000, CALIBRATION_MINUTES, ours, options))
            total = max(round(tried * options.minutes / CALIBRATION_MINUTES), 1)
            count = train_peer(python, job(config, paths, folder / "run", total, options.minutes, ours, options))
            write_text_atomically(done, json.dumps({"minutes": options.minutes, "steps": count}))
        trained = json.loads(done.read_text(encoding="utf-8"))
        row = {"what": name, **trained, "images": trained["steps"] * batch}
        rows.append(row | score(options, config, folder / "run/exported_models/exported_last.pt", folder))
    write_text_atomically(options.output_dir / "comparison.json", json.dumps(rows, indent=2))
    write_text_atomically(options.output_dir / "comparison.md", table(rows))
    print(table(rows))
    return 0


def read_run(folder: Path) -> tuple[Config, int, Path]:
    """Options of a run of ours, its steps, and its last teacher.

    Raises:
        FileNotFoundError: it has no teacher, or no options.
    """
    teachers = {
        int(found[1]): path
        for path in folder.glob("eval/training_*/teacher_checkpoint.pth")
        if (found := re.fullmatch(r"training_(\d+)", path.parent.name))
    }
    if not teachers:
        raise FileNotFoundError(f"{folder} holds no eval/training_*/teacher_checkpoint.pth: let the run finish first")
    last = max(teachers)
    return load_config(folder / "config.yaml"), last + 1, teachers[last]


def job(
    config: Config, paths: Sequence[str], out: Path, steps: int, minutes: float, ours: bool, options: CompareOptions
) -> dict[str, Any]:
    """What the other environment is asked to do, as plain values.

    Args:
        config: of our run.
        paths: of its images.
        out: folder of LightlyTrain's run.
        steps: that there is time for: its schedules end with them.
        minutes: after which it stops wherever it is.
        ours: whether it gets our schedule, heads and crops where it has them.
        options: of the command.
    """
    network = build_backbone(config.student, img_size=config.crops.global_crops_size)
    batch, crops = config.train.batch_size_per_gpu, config.crops
    global_size, local_size = list(as_pair(crops.global_crops_size)), list(as_pair(crops.local_crops_size))
    call: dict[str, Any] = {
        "out": str(out.absolute()),
        "data": list(paths),
        "epochs": max(round(steps * batch / len(paths)), 1),
        "batch_size": batch,
        "num_workers": config.train.num_workers,
        "accelerator": "auto",
        "seed": options.seed,
        "transform_args": {
            "image_size": global_size,
            "local_view": {"view_size": local_size},
        },
    }
    if ours:
        share = steps / (config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH)  # of a schedule of ours

        def scaled(epochs: float | Auto) -> int:
            return round(as_number(epochs) * config.train.OFFICIAL_EPOCH_LENGTH * share)

        call["optim_args"] = {
            "lr": scaled_learning_rate(config.optim, batch) / (batch / REFERENCE_BATCH) ** 0.5,
            "weight_decay": config.optim.weight_decay,
        }
        call["method_args"] = {
            "ibot_separate_head": config.ibot.separate_head,
            "hidden_dim": config.dino.head_hidden_dim,
            "dino_bottleneck_dim": config.dino.head_bottleneck_dim,
            "ibot_bottleneck_dim": config.ibot.head_bottleneck_dim,
            "output_dim": config.dino.head_n_prototypes,
            "student_freeze_last_layer_steps": scaled(config.optim.freeze_last_layer_epochs),
            "ibot_loss_weight": config.ibot.loss_weight,
            "koleo_loss_weight": config.dino.koleo_loss_weight,
            "center_method": "sinkhorn_knopp" if config.train.centering == "sinkhorn_knopp" else "softmax",
            "momentum_start": as_number(config.teacher.momentum_teacher),
            "momentum_end": as_number(config.teacher.final_momentum_teacher),
            "teacher_temp_start": config.teacher.warmup_teacher_temp,
            "teacher_temp_end": as_number(config.teacher.teacher_temp),
            "teacher_temp_warmup_steps": max(scaled(config.teacher.warmup_teacher_temp_epochs), 1),
            "warmup_steps": scaled(config.optim.warmup_epochs),
            "layerwise_decay": config.optim.layerwise_decay,
            "patch_embed_lr_multiplier": config.optim.patch_embed_lr_mult,
            "weight_decay_end": config.optim.weight_decay_end,
        }
        low, high = crops.global_crops_scale
        local_low, local_high = crops.local_crops_scale
        call["transform_args"] |= {
            "random_resize": {"min_scale": low, "max_scale": high},
            "random_flip": {
                "horizontal_prob": crops.horizontal_flip_probability,
                "vertical_prob": crops.vertical_flip_probability,
            },
            "color_jitter": None,
            "random_gray_scale": None,
            "gaussian_blur": None,
            "global_view_1": {"gaussian_blur": None, "solarize": None},
            "local_view": {
                "num_views": crops.local_crops_number,
                "view_size": local_size,
                "random_resize": {"min_scale": local_low, "max_scale": local_high},
                "gaussian_blur": None,
            },
        }
    return {
        "seed": options.seed,
        "seconds": round(60 * minutes),
        "network": {
            "img_size": global_size[0],
            "patch_size": network.patch_size[0],
            "embed_dim": network.embed_dim,
            "depth": network.n_blocks,
            "num_heads": network.num_heads,
            "init_values": config.student.layerscale if ours else 1e-5,  # the published one
            "block_chunks": 0,
        },
        "call": call,
    }


def make_environment(folder: Path) -> str:
    """The Python of an environment with LightlyTrain, made if it is missing."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.is_file():
        print(f"making an environment with lightly-train in {folder}, which takes some minutes", flush=True)
        run([sys.executable, "-m", "venv", str(folder)])
        run([str(python), "-m", "pip", "install", "--quiet", "lightly-train"])
    return str(python)


def train_peer(python: str, asked: Mapping[str, Any]) -> int:
    """Runs one training in the other environment; returns its steps."""
    out = Path(asked["call"]["out"])
    path = out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(asked))
    print(f"LightlyTrain trains for at most {asked['seconds'] / 60:.1f} minutes in {out}", flush=True)
    found = re.search(r"^STEPS (\d+)", run([python, "-c", PEER, str(path)]), re.MULTILINE)
    if found is None or int(found[1]) < 1:
        raise RunError(f"LightlyTrain made no step in {asked['seconds']} seconds; give it more --minutes")
    return int(found[1])


def run(command: Sequence[str]) -> str:
    """Runs a command and returns what it printed.

    Raises:
        RunError: with the end of what it said, where it failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunError(f"{command[0]} cannot be started: {error.strerror}; --python names another Python") from error
    if done.returncode:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-15:])
        raise RunError(f"{command[0]} failed ({done.returncode}):\n{said}")
    return done.stdout


def score(options: CompareOptions, config: Config, weights: Path, folder: Path) -> dict[str, float]:
    """Accuracy and balanced accuracy of each evaluator on the class token of whole images."""
    scores: dict[str, float] = {}
    for name, (evaluate, flags) in SCORERS.items():
        out = folder / name
        words = ["--config-file", str(options.run / "config.yaml"), "--pretrained-weights", str(weights)]
        words += ["--train-dataset", options.train_dataset, "--val-dataset", options.val_dataset, *flags]
        words += ["--output-dir", str(out), "--features", "cls", "--whole-image"]
        evaluate(words)
        results = read_results(out / RESULTS_FILE)
        for metric in ("accuracy", "balanced_accuracy"):
            value = results.scores[results.chosen].image.metrics[metric].value
            scores[f"{name} {metric.replace('_', ' ')}"] = value
    return scores


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    columns = list(rows[0])
    shown = [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [columns, ["---"] * len(columns), *shown])


if __name__ == "__main__":
    exit_with(main)
