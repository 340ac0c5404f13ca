"""Replays a batch that gave NaN or infinity: nearly the same weights, the same crops, masks and random numbers."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.checkpoint.checkpointer import FSDPCheckpointer
from dinov2.checkpoint.integrity import find_steps
from dinov2.config import Config, load_config
from dinov2.config.command_line import option, parse
from dinov2.data.collate import PretrainingBatch
from dinov2.distributed import distributed_session
from dinov2.run.launch import exit_with
from dinov2.train.bad_batches import FOLDER, load_bad_batch
from dinov2.train.command import build_model
from dinov2.train.setup import build_optimizer
from dinov2.train.ssl_meta_arch import SSLMetaArch


@dataclass
class Replay:
    """What a batch comes to.

    Attributes:
        path: file of the batch.
        about: what the run knew of it: iteration, rank, its own losses and gradient norms.
        names: images of the batch.
        weights: where they come from.
        bad_inputs: parts of the batch that hold NaN or infinity.
        losses: by name, now.
        grad_norms: by sub-network, now.
        first_bad_module: the first whose output is not finite; empty for none.
        anomaly: the first operation of backward that gives NaN; empty for none.
    """

    path: Path
    about: Mapping[str, Any]
    names: tuple[str, ...]
    weights: str
    bad_inputs: list[str]
    losses: dict[str, float] = field(default_factory=dict)
    grad_norms: dict[str, float] = field(default_factory=dict)
    first_bad_module: str = ""
    anomaly: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether nothing is wrong with the batch and these weights."""
        return all(math.isfinite(value) for value in (*self.losses.values(), *self.grad_norms.values()))

    def __str__(self) -> str:
        then = self.about["losses"] | {f"gradient of {name}": norm for name, norm in self.about["grad_norms"].items()}
        now = self.losses | {f"gradient of {name}": norm for name, norm in self.grad_norms.items()}
        width = max(map(len, [*then, *now]))
        rows = [f"  {name:{width}}  {_show(then.get(name)):>12}  {_show(now.get(name)):>12}" for name in then | now]
        return "\n".join(
            [
                f"{self.path}: " + ", ".join(f"{name} {self.about[name]}" for name in ("iteration", "rank", "seed")),
                f"weights: {self.weights}",
                f"  {'':{width}}  {'in the run':>12}  {'replayed':>12}",
                *rows,
                f"NaN or infinity in the batch: {', '.join(self.bad_inputs) or 'none'}",
                f"first module whose output is not finite: {self.first_bad_module or 'none'}",
                f"first operation of backward that gives NaN: {self.anomaly or 'none'}",
                "images:",
                *(f"  {name}" for name in self.names),
            ]
        )


def replay_batch(
    output_dir: Path, iteration: int | None = None, *, rank: int | None = None, weights: str = "", device: str = "auto"
) -> Replay:
    """Runs forward and backward on a batch of ``bad_batches/``; nothing is written.

    Args:
        output_dir: folder of the run.
        iteration: of the batch; None for the newest.
        rank: whose batch; None for the first that there is.
        weights: rank files, with ``{rank}``; empty for the newest step of the run before the iteration, and where there
            is none for the weights that the run started from.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no such batch or checkpoint.
        ValueError: a file is damaged.
    """
    path = find_bad_batch(output_dir, iteration, rank)
    batch, about = load_bad_batch(path)
    config = load_config(output_dir / "config.yaml", [])
    with distributed_session(device) as place:
        model = build_model(config, place)
        source = load_weights(config, model, output_dir, about["iteration"], weights, place)
        model.train()
        return look_at(model, batch.to(place), about, path, source)


def find_bad_batch(output_dir: Path, iteration: int | None, rank: int | None) -> Path:
    """The file of a batch.

    Raises:
        FileNotFoundError: naming those that there are.
    """
    every = sorted((output_dir / FOLDER).glob("iteration_*.rank_*.pth"))
    number = "*" if iteration is None else f"{iteration:07d}"
    found = [path for path in every if path.match(f"iteration_{number}.rank_{'*' if rank is None else rank}.pth")]
    if not found:
        there = ", ".join(path.name for path in every) or "none"
        raise FileNotFoundError(f"no such batch in {output_dir / FOLDER}; there are: {there}")
    newest = found[-1].name.partition(".")[0]
    return next(path for path in found if path.name.startswith(f"{newest}."))


def load_weights(
    config: Config, model: SSLMetaArch, output_dir: Path, iteration: int, weights: str, device: torch.device
) -> str:
    """Fills the model; returns where the weights come from, in words."""
    if not weights:
        before = [step for step in find_steps(output_dir) if step.number < iteration]
        if not before:
            return f"those that the run starts from (no checkpoint before iteration {iteration} is kept)"
        weights = before[0].pattern
    checkpointer = FSDPCheckpointer(model, output_dir, optimizer=build_optimizer(config, model.student, device))
    number = checkpointer.load(weights, [])["iteration"]
    return (
        f"{weights}, {iteration - 1 - number} iteration(s) before those of the run" if number < iteration else weights
    )


def look_at(model: SSLMetaArch, batch: PretrainingBatch, about: Mapping[str, Any], path: Path, source: str) -> Replay:
    """Forward and backward, and again with torch's search for NaN if anything is not finite."""
    bad_inputs = [
        name
        for name in ("global_crops", "local_crops", "mask_weights")
        if (tensor := getattr(batch, name)) is not None and not torch.isfinite(tensor).all()
    ]
    found = Replay(path, about, batch.names, source, bad_inputs)
    with first_bad_output(model) as bad:
        _set_random_state(about["random"])
        losses = model.forward_backward(batch, teacher_temp=about["teacher_temp"])
    found.losses = {name: loss.item() for name, loss in losses.items()}
    for name, network in model.student.items():
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        found.grad_norms[name] = float(torch.nn.utils.get_total_norm(gradients))
    found.first_bad_module = bad[0] if bad else ""
    if not found.is_finite:
        found.anomaly = _find_anomaly(model, batch, about)
    model.zero_grad(set_to_none=True)
    return found


@contextmanager
def first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """Yields a list that is filled with the names of modules whose output holds NaN or infinity, in order."""
    bad: list[str] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
                bad.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _find_anomaly(model: SSLMetaArch, batch: PretrainingBatch, about: Mapping[str, Any]) -> str:
    _set_random_state(about["random"])
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")  # the traceback of the forward operation, which the module's name stands for
        try:
            model.forward_backward(batch, teacher_temp=about["teacher_temp"])
        except RuntimeError as error:
            return str(error)
    return ""


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


@dataclass(frozen=True)
class ReplayOptions:
    """Options of the command."""

    output_dir: Path = option(help="folder of the run, which holds bad_batches/", positional=True)
    iteration: int | None = option(None, help="of the batch; by default the newest")
    rank: int | None = option(None, help="process whose batch it was; by default the first that wrote one")
    weights: str = option("", help="rank files to use, with {rank}; by default the newest step before the batch")
    device: str = option("auto", help="where to compute: auto, cpu, cuda, mps")


def main() -> int:
    """Prints what forward and backward give; 0 when all is finite now, else 1."""
    options = parse(
        ReplayOptions,
        description="Runs forward and backward on a batch that a run has skipped, and names the first module and "
        "operation whose result is not finite; exit code 0 when all is finite with these weights, else 1.",
        example="python tools/replay_batch.py outputs/vits14 --iteration 1234",
    )
    found = replay_batch(
        options.output_dir, options.iteration, rank=options.rank, weights=options.weights, device=options.device
    )
    print(found)
    return 0 if found.is_finite else 1


if __name__ == "__main__":
    exit_with(main)
