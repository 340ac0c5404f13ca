"""Measures training speed, and what share of it saving costs: blocks with and without a save take turns."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2.checkpoint.checkpointer import FSDPCheckpointer
from dinov2.config import Config, load_config
from dinov2.config.command_line import option, parse
from dinov2.data.collate import PretrainingBatch
from dinov2.distributed import barrier, distributed_session, get_world_size, is_main_process
from dinov2.loop.optimization import agree
from dinov2.run.launch import exit_with
from dinov2.train.command import build_model
from dinov2.train.data import build_pretraining_dataset, build_pretraining_loader
from dinov2.train.setup import build_optimization, build_schedules, settle
from dinov2.train.ssl_meta_arch import update_teacher
from dinov2.utils.seeds import RandomState

NOT_SAVING = "no saving"
SYNCHRONOUS = "saving, training waits"
ASYNCHRONOUS = "saving beside training"
MODES = (NOT_SAVING, SYNCHRONOUS, ASYNCHRONOUS)


@dataclass(frozen=True)
class TrainSpeed:
    """Seconds of blocks of iterations, by what was saved in them; the n-th blocks of all modes ran one after another.

    Attributes:
        images: of one block, over all processes.
        save_every: iterations of a block, each with one save or none.
        seconds: of every block, by mode.
        checkpoint_bytes: size of this process's file.
    """

    images: int
    save_every: int
    seconds: dict[str, list[float]]
    checkpoint_bytes: int

    def images_per_second(self, mode: str) -> float:
        """Median over blocks."""
        return self.images / statistics.median(self.seconds[mode])

    def shares_lost(self, mode: str) -> list[float]:
        """Share of throughput lost in each block against the block without saving of the same round; may be below 0."""
        pairs = zip(self.seconds[NOT_SAVING], self.seconds[mode], strict=True)
        return [1 - without / with_saving for without, with_saving in pairs]

    def __str__(self) -> str:
        lines = [
            f"one save per {self.save_every} iterations, {self.checkpoint_bytes / 2**20:.1f} MiB per process, "
            f"{len(self.seconds[NOT_SAVING])} rounds",
            f"{NOT_SAVING:<24}{self.images_per_second(NOT_SAVING):8.1f} images/s",
        ]
        for mode in MODES[1:]:
            shares = sorted(100 * share for share in self.shares_lost(mode))
            lines.append(
                f"{mode:<24}{self.images_per_second(mode):8.1f} images/s   lost {statistics.median(shares):.2f} % "
                f"(median; rounds from {shares[0]:.2f} to {shares[-1]:.2f} %)"
            )
        return "\n".join(lines)


def benchmark_train(
    config: Config, device: torch.device, folder: Path, *, save_every: int = 50, rounds: int = 3
) -> TrainSpeed:
    """Trains in blocks of ``save_every`` iterations: without a save, with one that waits, with one beside training.

    The order turns from round to round, so that a machine that grows slower or faster favours none. A block ends when
    its save is complete on disk.

    Args:
        config: options of a run.
        device: where this process computes.
        folder: for checkpoints; they are deleted.
        save_every: iterations of a block.
        rounds: blocks of each mode.

    Raises:
        ValueError: for numbers below 1.
    """
    if save_every < 1 or rounds < 1:
        raise ValueError(f"save_every and rounds must be at least 1, got {save_every} and {rounds}")
    trainer = _Trainer(settle(config, device, resume=False)[0], device, folder)
    trainer.warm_up()
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds):
        turn = number % len(MODES)
        for mode in MODES[turn:] + MODES[:turn]:
            seconds[mode].append(trainer.block(mode, save_every))
    images = save_every * config.train.batch_size_per_gpu * get_world_size()
    return TrainSpeed(images, save_every, seconds, trainer.forget_checkpoints())


class _Trainer:
    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        self.config = config
        self.device = device
        self.model = build_model(config, device)
        self.model.train()
        self.optimization = build_optimization(config, self.model.student, device)
        self.schedules = build_schedules(config, get_world_size())
        self.checkpointer = FSDPCheckpointer(
            self.model,
            folder,
            optimizer=self.optimization.optimizer,
            scaler=self.optimization.scaler,
            random=RandomState(),
        )
        self.checkpointer.keep_last = 1
        self.total_iterations = config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH
        self.iteration = 0
        loader = build_pretraining_loader(config, build_pretraining_dataset(config))
        self.batches: Iterator[PretrainingBatch] = iter(loader)

    def warm_up(self) -> None:
        """The first iterations allocate, and so does the first save."""
        self._save(ASYNCHRONOUS)
        for _ in range(3):
            self._iterate()
        self.checkpointer.wait()

    def block(self, mode: str, iterations: int) -> float:
        """Seconds of a save and so many iterations."""
        self._synchronize()
        began = time.perf_counter()
        if mode != NOT_SAVING:
            self._save(mode)
        for _ in range(iterations):
            self._iterate()
            self.checkpointer.poll()
        self.checkpointer.wait()
        self._synchronize()
        return time.perf_counter() - began

    def forget_checkpoints(self) -> int:
        """Deletes this process's files; the size of the last."""
        size = 0
        for path in Path(self.checkpointer.save_dir).glob("model_*.rank_*.pth"):
            size = path.stat().st_size
        for step in self.checkpointer.steps("model"):
            self.checkpointer.forget(step, "model")
        return size

    def _save(self, mode: str) -> None:
        self.checkpointer.asynchronous = mode == ASYNCHRONOUS
        self.checkpointer.save(f"model_{self.iteration:07d}", iteration=self.iteration)

    def _iterate(self) -> None:
        batch = next(self.batches).to(self.device)
        iteration = self.iteration % self.total_iterations
        now = {name: schedule[iteration] for name, schedule in self.schedules.items()}
        scale = self.optimization.loss_scale(self.device)
        losses = self.model.forward_backward(batch, teacher_temp=now["teacher_temp"], loss_scale=scale)
        grad_norms = self.optimization.clip()
        agreement = agree(losses, stop=False)
        self.optimization.check_finite(agreement, losses, grad_norms, self.iteration, batch.names)
        self.optimization.step(lr=now["lr"], weight_decay=now["weight_decay"], last_layer_lr=now["last_layer_lr"])
        update_teacher(self.model.student, self.model.teacher, now["momentum"])
        self.iteration += 1

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        barrier()


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config: Path | None = option(
        None, help="YAML file of a run (usually configs/train/demo_parts_cpu.yaml)", aliases=("--config-file",)
    )
    save_every: int = option(50, help="iterations per save")
    rounds: int = option(3, help="blocks of that length of each kind: not saving, waiting for a save, saving beside")
    folder: Path | None = option(
        None, help="where the checkpoints go, to measure that disk; by default a temporary folder"
    )


def main() -> int:
    """Measures and prints."""
    options = parse(
        BenchmarkOptions,
        description="Measures images per second of training, and the share that saving takes, synchronously and in "
        "the background.",
        example=(
            "python tools/benchmark_train.py --config configs/train/cpu_10min.yaml "
            "train.dataset_path=ImageFolder:root=/data/images --rounds 5"
        ),
    )
    usual = Path(__file__).resolve().parents[1] / "configs" / "train" / "demo_parts_cpu.yaml"
    config = load_config(options.config or usual, options.overrides)
    with distributed_session(config.train.device) as device, tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        speed = benchmark_train(config, device, folder, save_every=options.save_every, rounds=options.rounds)
        if is_main_process():
            print(speed)
    return 0


if __name__ == "__main__":
    exit_with(main)
