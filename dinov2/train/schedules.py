"""The five hyper-parameters of pretraining that change with the iteration."""

from dataclasses import dataclass
from math import sqrt

from dinov2.config.schema import Config, OptimOptions
from dinov2.utils.schedules import CosineSchedule, Schedule


@dataclass(frozen=True, kw_only=True)
class StepHyperparameters:
    """What one optimisation step uses; learning rates and weight decay before the multipliers of parameter groups."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    last_layer_lr: float


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Schedules over the iterations of a run: learning rates, weight decay, EMA momentum, teacher temperature."""

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    teacher_temp: Schedule
    last_layer_lr: Schedule

    def at(self, iteration: int) -> StepHyperparameters:
        """Values of the step that follows ``iteration`` finished ones."""
        return StepHyperparameters(
            lr=self.lr[iteration],
            weight_decay=self.weight_decay[iteration],
            momentum=self.momentum[iteration],
            teacher_temp=self.teacher_temp[iteration],
            last_layer_lr=self.last_layer_lr[iteration],
        )


def scaled_learning_rate(optim: OptimOptions, global_batch_size: int) -> float:
    """The peak learning rate for a batch of ``global_batch_size`` images over all processes.

    A positive ``optim.lr`` is used as it is; otherwise ``optim.base_lr`` is scaled by ``optim.scaling_rule``.

    Raises:
        ValueError: the rule is unknown.
    """
    if optim.lr > 0:
        return optim.lr
    match optim.scaling_rule:
        case "sqrt_wrt_1024":
            return optim.base_lr * sqrt(global_batch_size / 1024)
        case "linear_wrt_256":
            return optim.base_lr * global_batch_size / 256
        case "none":
            return optim.base_lr
        case unknown:
            raise ValueError(
                f"optim.scaling_rule: found {unknown!r}, allowed are 'sqrt_wrt_1024', 'linear_wrt_256' and 'none'"
            )


def build_schedules(config: Config, world_size: int) -> Schedules:
    """Builds the schedules of a run on ``world_size`` processes.

    The warm-up of the teacher temperature may be longer than the run, which then ends below the final temperature.

    Raises:
        ValueError: the learning rate's warm-up is longer than the run, or the scaling rule is unknown.
    """
    optim, teacher = config.optim, config.teacher
    if optim.warmup_epochs > optim.epochs:
        raise ValueError(
            f"optim.warmup_epochs must not exceed optim.epochs, found {optim.warmup_epochs} > {optim.epochs}"
        )
    epoch_length = config.train.OFFICIAL_EPOCH_LENGTH
    total_iters = optim.epochs * epoch_length
    lr = CosineSchedule(
        base_value=scaled_learning_rate(optim, config.train.batch_size_per_gpu * world_size),
        final_value=optim.min_lr,
        total_iters=total_iters,
        warmup_iters=optim.warmup_epochs * epoch_length,
    )
    temperature_warmup_iters = teacher.warmup_teacher_temp_epochs * epoch_length
    return Schedules(
        lr=lr,
        weight_decay=CosineSchedule(optim.weight_decay, optim.weight_decay_end, total_iters),
        momentum=CosineSchedule(teacher.momentum_teacher, teacher.final_momentum_teacher, total_iters),
        teacher_temp=CosineSchedule(
            base_value=teacher.teacher_temp,
            final_value=teacher.teacher_temp,
            total_iters=temperature_warmup_iters,
            warmup_iters=temperature_warmup_iters,
            start_warmup_value=teacher.warmup_teacher_temp,
        ),
        last_layer_lr=lr.frozen_until(optim.freeze_last_layer_epochs * epoch_length),
    )
