"""A check that everything is wired up: a few training images must be learnt by heart."""

import logging
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from dinov2.distributed import is_main_process
from dinov2.loop.optimization import Optimization
from dinov2.tasks.learner import Learner, StepRates, build_task_optimizer, train_step
from dinov2.tasks.networks import TaskNetworks
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.package import load_backbone_config
from dinov2.tasks.preparation import build_task
from dinov2.tasks.training_data import TrainingData, open_task_sets, spread_over_classes
from dinov2.utils.errors import RunError
from dinov2.utils.seeds import seed_everything

logger = logging.getLogger("dinov2")

MOST_STEPS = 400
LOG_PERIOD = 20
GOAL = 0.05  # share of the first loss


@dataclass(frozen=True)
class OverfitReport:
    """How the loss went.

    Attributes:
        losses: of every step, before it was taken.
        goal: loss that counts as near zero.
    """

    losses: tuple[float, ...]
    goal: float

    @property
    def reached(self) -> bool:
        """Whether the images were learnt by heart."""
        return self.losses[-1] <= self.goal


def overfit(config: TaskConfig, num_images: int, device: torch.device) -> int:
    """Learns a few training images by heart, and says whether that works; nothing is written.

    Images are prepared as for evaluation, without random changes; weight decay, dropout, label smoothing and averaging
    are off, and the learning rate is constant. The images are spread over the classes.

    Args:
        config: options of the run.
        num_images: how many (parts, with ``head.per_part``).
        device: where this process computes.

    Returns:
        0 when the loss has come near zero.

    Raises:
        RunError: it has not, after `MOST_STEPS` steps; the message tells what that may mean.
    """
    report = learn_by_heart(config, num_images, device)
    first, last, steps = report.losses[0], report.losses[-1], len(report.losses)
    if not report.reached:
        raise RunError(
            f"--overfit {num_images}: the loss fell from {first:.4f} to {last:.4f} only, in {steps} steps; "
            f"{report.goal:.4f} was to be reached. Either labels and images do not belong together, or optim.lr="
            f"{config.optim.lr} is far off, or the head (backbone.mode={config.backbone.mode}) is too weak for them"
        )
    if is_main_process():
        logger.info(
            "overfit %d: the loss fell from %.4f to %.4f in %d steps: all is wired up",
            *(num_images, first, last, steps),
        )
    return 0


def learn_by_heart(config: TaskConfig, num_images: int, device: torch.device) -> OverfitReport:
    """What `overfit` does, with the losses of all steps."""
    config = without_regularisation(config)
    seed_everything(config.train.seed)
    sets = open_task_sets(config)
    everything = TrainingData(config, sets.train, sets.facts, augment=False)
    chosen = spread_over_classes(everything.labels, num_images, config.train.seed)
    config = replace(config, train=replace(config.train, batch_size_per_gpu=len(chosen)))
    data = TrainingData(config, sets.train, sets.facts, indices=chosen, augment=False)
    networks = TaskNetworks(config, load_backbone_config(config), num_outputs=sets.facts.num_outputs, device=device)
    optimizer = build_task_optimizer(config, networks.trained, device)
    scaler = torch.amp.GradScaler(device.type, enabled=networks.dtype == torch.float16)
    learner = Learner(
        task=build_task(config, data, sets, device),
        networks=networks,
        optimization=Optimization(networks.trained, optimizer, scaler, config.optim.clip_grad),
        image_names=data.names,
    )
    rates = StepRates(lr=config.optim.lr, weight_decay=0.0)
    losses: list[float] = []
    with closing(data.batches(num_workers=0)) as batches:
        for step in range(MOST_STEPS):
            agreement, _ = train_step(learner, [next(batches)], step, rates, stop=False)
            losses.append(agreement.losses["total_loss"])
            if is_main_process() and step % LOG_PERIOD == 0:
                logger.info("step %d: loss %.4f", step, losses[-1])
            if losses[-1] <= GOAL * losses[0]:
                break
    return OverfitReport(tuple(losses), GOAL * losses[0])


def without_regularisation(config: TaskConfig) -> TaskConfig:
    """The same options without anything that keeps a network from learning images by heart."""
    return replace(
        config,
        backbone=replace(config.backbone, drop_path_rate=0.0, lora_dropout=0.0),
        head=replace(config.head, dropout=0.0),
        loss=replace(config.loss, label_smoothing=0.0),
        data=replace(config.data, balance_classes=False),
        train=replace(config.train, ema_momentum=0.0, accumulate_steps=1),
    )
