"""One optimisation of many linear classifiers at once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_world_size
from dinov2.eval.linear.classifiers import ClassifierSettings, ClassifierStack
from dinov2.eval.metrics import IntArray

MOMENTUM = 0.9
REFERENCE_BATCH = 256
CLASS_WEIGHTINGS = ("none", "balanced")


class LinearTrainer:
    """Trains the classifiers of all stacks by SGD with momentum; their learning rates fall to 0 along a cosine.

    The gradient of a classifier does not depend on the others, so the numbers are those of one optimiser for each.
    Several processes average their gradients, and each ends with the same parameters.

    Args:
        stacks: the classifiers, changed in place.
        num_iterations: steps until the learning rates are 0.
        global_batch_size: images of one step over all processes; learning rates are multiplied by it / 256.
        class_weights: ``[C]``, what an image of a class weighs in the loss; by default 1.

    Attributes:
        iteration: how many steps were done.
    """

    def __init__(
        self,
        stacks: Sequence[ClassifierStack],
        *,
        num_iterations: int,
        global_batch_size: int,
        class_weights: Tensor | None = None,
    ) -> None:
        self.stacks = tuple(stacks)
        self.num_iterations = num_iterations
        self.iteration = 0
        self._parameters = [parameter for stack in self.stacks for parameter in (stack.weight, stack.bias)]
        self._momentum = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._base_rates = [_rates(stack, global_batch_size) for stack in self.stacks for _ in range(2)]
        self._class_weights = None if class_weights is None else class_weights.to(self._parameters[0].device)

    def learning_rate_factor(self, iteration: int) -> float:
        """What the scaled learning rates are multiplied by in a step, counted from 0."""
        return (1 + math.cos(math.pi * iteration / self.num_iterations)) / 2

    def step(self, rows: Tensor, labels: Tensor) -> Tensor:
        """One step of all classifiers.

        Args:
            rows: ``[B, (blocks + 1) * D]``, this process's share of the batch.
            labels: ``[B]`` int64.

        Returns:
            Loss of every classifier on this process's share before the step, in the order of the stacks.
        """
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        losses = torch.cat([self._losses(stack, rows, labels) for stack in self.stacks])
        gradients = torch.autograd.grad(losses.sum(), self._parameters)
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        self._update(_average(gradients))
        self.iteration += 1
        return losses.detach()

    def state_dict(self) -> dict[str, Any]:
        """Number of steps and, by classifier, the momentum of its weight and bias; the classifiers are kept apart."""
        momentum = {}
        for number, stack in enumerate(self.stacks):
            weight, bias = self._momentum[2 * number : 2 * number + 2]
            for place, settings in enumerate(stack.settings):
                momentum[settings.name] = {"weight": weight[place].cpu().clone(), "bias": bias[place].cpu().clone()}
        return {"iteration": self.iteration, "momentum": momentum}

    def load_state_dict(self, state: Mapping[str, Any], classifiers: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over the number of steps, the momentum and the classifiers of a checkpoint."""
        self.iteration = int(state["iteration"])
        for number, stack in enumerate(self.stacks):
            for offset, part in enumerate(("weight", "bias")):
                for place, settings in enumerate(stack.settings):
                    self._parameters[2 * number + offset][place] = classifiers[settings.name][part]
                    self._momentum[2 * number + offset][place] = state["momentum"][settings.name][part]

    def _losses(self, stack: ClassifierStack, rows: Tensor, labels: Tensor) -> Tensor:
        """Mean loss ``[L]`` of each classifier of a stack."""
        logits = stack.logits(rows)  # [B, L, C]
        count = logits.shape[1]
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.repeat_interleave(count), weight=self._class_weights, reduction="none"
        )
        # Not the weighted mean of torch: its divisor changes with the classes of a batch, and so with how many
        # processes share one.
        return losses.view(-1, count).mean(dim=0)

    def _update(self, gradients: Sequence[Tensor]) -> None:
        factor = self.learning_rate_factor(self.iteration)
        for parameter, momentum, gradient, rates in zip(
            self._parameters, self._momentum, gradients, self._base_rates, strict=True
        ):
            momentum.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(momentum * (rates * factor).view(-1, *[1] * (parameter.ndim - 1)))


def scaled_learning_rate(settings: ClassifierSettings, global_batch_size: int) -> float:
    """The learning rate that a classifier starts with."""
    assert settings.learning_rate is not None, "a classifier without a learning rate cannot be trained"
    return settings.learning_rate * global_batch_size / REFERENCE_BATCH


def class_weights(labels: IntArray, num_classes: int, weighting: str) -> Tensor | None:
    """What an image of each class weighs in the loss.

    Args:
        labels: ``[N]`` of the training set.
        num_classes: width of the result.
        weighting: ``none``, or ``balanced`` for weights that give every class that occurs the same share of the loss,
            1 on average over the images.

    Returns:
        ``[C]`` float32, or None where every image weighs the same.

    Raises:
        ValueError: for another weighting.
    """
    if weighting not in CLASS_WEIGHTINGS:
        raise ValueError(f"class weighting {weighting!r} is not one of {', '.join(CLASS_WEIGHTINGS)}")
    if weighting == "none":
        return None
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 0.0)).float()


def _rates(stack: ClassifierStack, global_batch_size: int) -> Tensor:
    rates = [scaled_learning_rate(settings, global_batch_size) for settings in stack.settings]
    return torch.tensor(rates, device=stack.weight.device)


def _average(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Means over all processes, by one collective."""
    if get_world_size() == 1:
        return gradients
    mean = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / get_world_size()
    pieces = mean.split([gradient.numel() for gradient in gradients])
    return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
