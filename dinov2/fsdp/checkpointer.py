"""Saving and resuming a run: one file per process and step, readable by any number of processes.

A step's files are complete before any process names the step in its ``last_checkpoint`` file, and every file appears
under its name only when it is whole. A crash at any instant therefore leaves the step before usable.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from torch import Tensor, nn

from dinov2.distributed import barrier, get_rank, get_world_size, is_main_process
from dinov2.fsdp.shards import RankFiles, held_rows, load_file, local_part, rank_file
from dinov2.utils.files import write_atomically, write_text_atomically

logger = logging.getLogger("dinov2")

FORMAT_VERSION = 1
RANDOM_STATE = "random"


class FSDPCheckpointer(Checkpointer):  # type: ignore[misc]
    """Checkpointer of a sharded, replicated or plain model with its optimiser.

    Every process writes ``{name}.rank_{rank}.pth`` with its own rows of every tensor, and after all have finished
    ``last_checkpoint.rank_{rank}``. Files hold plain tensors and builtins and are read without running code. What N
    processes wrote, M processes load.

    Args:
        model: the model; its parameters may be sharded.
        save_dir: folder of the run.
        optimizer: optimiser of some of the model's parameters.
        checkpointables: further objects with ``state_dict()`` and ``load_state_dict()``; one named ``random`` holds
            this process's random states and is restored only when the number of processes is the same.
    """

    def __init__(
        self, model: nn.Module, save_dir: str | Path, *, optimizer: torch.optim.Optimizer, **checkpointables: Any
    ) -> None:
        super().__init__(model, str(save_dir), **checkpointables)
        self.optimizer = optimizer

    def save(self, name: str, *, iteration: int, **extras: Any) -> None:
        """Writes this process's file of a step, waits for the others, then names the step as the last one.

        Args:
            name: such as ``model_0001249``.
            iteration: the iteration that was finished, from 0.
            extras: further plain values, returned by `load`.

        Raises:
            OSError: when the file cannot be written; earlier checkpoints stay.
        """
        tensors = dict(self._named_tensors())
        content = {
            "format_version": FORMAT_VERSION,
            "rank": get_rank(),
            "world_size": get_world_size(),
            "iteration": iteration,
            "model": {key: local_part(tensor).detach() for key, tensor in tensors.items()},
            "rows": {key: _as_list(tensor) for key, tensor in tensors.items()},
            "optimizer": self._optimizer_state(),
            **{key: value.state_dict() for key, value in self.checkpointables.items()},
            **extras,
        }
        path = Path(self.save_dir) / f"{name}.rank_{get_rank()}.pth"
        self._remove_leftovers()
        write_atomically(path, lambda file: torch.save(content, file))
        barrier()
        self.tag_last_checkpoint(path.name)
        barrier()
        logger.info("saved %s", path)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads a step into the model, the optimiser and everything else that is tracked.

        Args:
            path: a rank file, or the same with ``{rank}`` in place of the number.
            checkpointables: names of the further objects to load; by default all.

        Returns:
            What else the file holds: ``iteration`` and the extras given to `save`.

        Raises:
            FileNotFoundError: when a rank file is missing.
            ValueError: when a file is truncated, or comes from another architecture (the keys are named).
        """
        files = RankFiles(rank_pattern(path))
        self._load_tensors(files, path)
        self._load_optimizer(files)
        rank = get_rank()
        own: dict[str, Any] = dict(files.files[rank if rank < files.world_size else 0])
        for key in checkpointables if checkpointables is not None else self.checkpointables:
            state = own.pop(key, None)
            if key == RANDOM_STATE and files.world_size != get_world_size():
                logger.warning(
                    "the checkpoint was written by %d processes and is loaded by %d: random states start anew",
                    files.world_size,
                    get_world_size(),
                )
            elif state:  # an idle gradient scaler saves nothing
                self.checkpointables[key].load_state_dict(state)
        logger.info("resumed from %s (iteration %d)", path, own["iteration"])
        return {key: value for key, value in own.items() if key not in ("model", "optimizer", "rows")}

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the step that ``path`` names, else the newest of the own folder if ``resume``, else nothing."""
        if path:
            return self.load(path)
        return self.load(self.get_checkpoint_file()) if resume and self.has_checkpoint() else {}

    def has_checkpoint(self) -> bool:
        """Whether the folder names a checkpoint to resume from."""
        return bool(self._tags())

    def get_checkpoint_file(self) -> str:
        """Path, with ``{rank}``, of the newest step that every process finished; empty when there is none."""
        names = [tag.read_text(encoding="utf-8").strip() for tag in self._tags()]
        if not names:
            return ""
        return rank_pattern(str(Path(self.save_dir) / max(names, key=_step)))

    def newest(self) -> dict[str, Any]:
        """What the main process's file of the newest step holds, tensors unread; empty when none can be read."""
        if not self.has_checkpoint():
            return {}
        try:
            return load_file(rank_file(self.get_checkpoint_file(), 0))
        except (FileNotFoundError, ValueError) as error:
            logger.warning("the newest checkpoint cannot be read: %s", error)
            return {}

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the newest step for this process; the main one drops the tags of ranks that no longer exist."""
        path = Path(self.save_dir) / f"last_checkpoint.rank_{get_rank()}"
        write_text_atomically(path, last_filename_basename + "\n")
        if is_main_process():
            for tag in self._tags():
                if (rank := _rank(tag)) is not None and rank >= get_world_size():
                    tag.unlink()

    def forget(self, step: int, prefix: str) -> None:
        """Deletes this process's file of a step, and those of ranks that no longer exist."""
        for path in Path(self.save_dir).glob(f"{prefix}_{step:07d}.rank_*.pth"):
            rank = _rank(path)
            if rank == get_rank() or (rank is not None and rank >= get_world_size() and is_main_process()):
                path.unlink(missing_ok=True)

    def steps(self, prefix: str) -> list[int]:
        """Steps of which this process has a file, oldest first."""
        return sorted(_step(path.name) for path in Path(self.save_dir).glob(f"{prefix}_*.rank_{get_rank()}.pth"))

    def _tags(self) -> list[Path]:
        return [path for path in Path(self.save_dir).glob("last_checkpoint.rank_*") if _rank(path) is not None]

    def _remove_leftovers(self) -> None:
        """Deletes what this process was writing when it was killed."""
        for path in Path(self.save_dir).glob(f".*.rank_{get_rank()}.pth.*.tmp"):
            path.unlink()

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """State tensors by kind and parameter name: ``{"exp_avg": {"student.backbone.norm.weight": …}, …}``."""
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            for kind, tensor in self.optimizer.state.get(parameter, {}).items():
                state.setdefault(kind, {})[name] = local_part(tensor)
        return state

    def _step_device(self, parameter: Tensor) -> torch.device:
        """Where the optimiser counts steps: fused kernels want the count beside the parameters."""
        return parameter.device if self.optimizer.defaults.get("fused") else torch.device("cpu")

    @torch.no_grad()
    def _load_tensors(self, files: RankFiles, path: str) -> None:
        tensors = dict(self._named_tensors())
        _check_same_architecture({key: tuple(tensor.shape) for key, tensor in tensors.items()}, files, path)
        for key, tensor in tensors.items():
            local_part(tensor).copy_(files.read("model", key, held_rows(tensor)))

    @torch.no_grad()
    def _load_optimizer(self, files: RankFiles) -> None:
        for kind in files.files[0]["optimizer"]:
            part = f"optimizer.{kind}"
            saved = files.names(part)
            for name, parameter in self.model.named_parameters():
                if name in saved:
                    scalar = files.shape(part, name) == ()
                    value = (
                        torch.zeros((), device=self._step_device(parameter)) if scalar else torch.zeros_like(parameter)
                    )
                    local_part(value).copy_(files.read(part, name, held_rows(parameter)))
                    self.optimizer.state[parameter][kind] = value


class PeriodicFSDPCheckpointer(PeriodicCheckpointer):  # type: ignore[misc]
    """Saves every ``period`` iterations and at the end, and keeps the newest checkpoints only.

    Steps after the one just saved, which a run that starts again from an earlier step finds, are left alone.

    Args:
        checkpointer: writes the files.
        period: iterations between checkpoints.
        max_iter: length of the run; its last iteration is saved too.
        keep_last: steps to keep; 0 keeps all. Those of an earlier start of the same run count.
    """

    def __init__(self, checkpointer: FSDPCheckpointer, period: int, max_iter: int, keep_last: int) -> None:
        super().__init__(checkpointer, period, max_iter, keep_last or None)

    def step(self, iteration: int, **extras: Any) -> None:
        """To be called after every iteration."""
        if (iteration + 1) % self.period == 0 or iteration == self.max_iter - 1:
            self.save_step(iteration, **extras)

    def save_step(self, iteration: int, **extras: Any) -> None:
        """Saves now, whatever the period."""
        self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration, **extras)
        if self.max_to_keep:
            steps = [step for step in self.checkpointer.steps(self.file_prefix) if step <= iteration]
            for step in steps[: -self.max_to_keep]:
                self.checkpointer.forget(step, self.file_prefix)


def rank_pattern(path: str) -> str:
    """Puts ``{rank}`` in place of the number in ``….rank_<number>.pth``.

    Raises:
        ValueError: when the path names no rank.
    """
    if "{rank}" in path:
        return path
    pattern, count = re.subn(r"\.rank_\d+\.pth$", ".rank_{rank}.pth", path)
    if count == 0:
        raise ValueError(
            f"{path} is not a rank file: expected a name such as model_0011249.rank_{{rank}}.pth "
            "(weights of a backbone alone go into student.pretrained_weights)"
        )
    return pattern


def _step(name: str) -> int:
    match = re.search(r"_(\d+)\.rank_", name)
    return int(match.group(1)) if match else -1


def _rank(path: Path) -> int | None:
    """The rank that a checkpoint file or a ``last_checkpoint`` file belongs to."""
    match = re.search(r"\.rank_(\d+)(?:\.pth)?$", path.name)
    return int(match.group(1)) if match else None


def _as_list(tensor: Tensor) -> list[int]:
    rows = held_rows(tensor)
    return [rows.start, rows.count, rows.total]


def _check_same_architecture(shapes: dict[str, tuple[int, ...]], files: RankFiles, path: str) -> None:
    saved = files.names("model")
    problems = [f"  not in the checkpoint: {name}" for name in sorted(shapes.keys() - saved)]
    problems += [f"  only in the checkpoint: {name}" for name in sorted(saved - shapes.keys())]
    problems += [
        f"  {name}: {files.shape('model', name)} in the checkpoint, {shape} in the model"
        for name, shape in shapes.items()
        if name in saved and files.shape("model", name) != shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{path} was written by another architecture:\n" + "\n".join(problems[:12]) + more)
