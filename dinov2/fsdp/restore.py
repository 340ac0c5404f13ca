"""Choosing the step to go on from: the newest that every process finds undamaged. All processes call and agree."""

import logging
from pathlib import Path

from dinov2.distributed import all_gather_objects, get_rank, get_world_size
from dinov2.fsdp.integrity import (
    DamagedCheckpointError,
    Step,
    file_fault,
    find_steps,
    is_before_checksums,
    parse_rank_file,
    step_fault,
    tagged_name,
)
from dinov2.fsdp.shards import RankFiles

logger = logging.getLogger("dinov2")


def newest_good_step(folder: str | Path) -> str:
    """Path, with ``{rank}``, of the newest usable step; empty when the folder never held a finished one.

    The step that ``last_checkpoint`` names comes first. If a file of it is damaged or missing, a warning says which and
    why, and the next older step is tried.

    Raises:
        DamagedCheckpointError: a step was finished, and none is good; every step and its fault are named.
    """
    folder = Path(folder)
    # The main process looks, so that all judge the same list even while the folder changes.
    tagged, steps, before_checksums = all_gather_objects(
        (tagged_name(folder), find_steps(folder), is_before_checksums(folder))
    )[0]
    if not tagged and not steps:
        return ""
    if before_checksums and steps:
        logger.warning("the checkpoints in %s are from before checksums: damage may go unnoticed", folder)
    faults: list[str] = []
    for step in candidates(folder, tagged, steps):
        fault = _agreed_fault(step, before_checksums=before_checksums)
        if not fault:
            if faults:
                logger.warning("going on from the older step %s: what was done after it is done again", step.name)
            elif not tagged:
                logger.warning("no last_checkpoint file: going on from %s, which is complete and undamaged", step.name)
            return step.pattern
        logger.error("checkpoint %s is not used: %s", step.name, fault)
        faults.append(f"  {step.name}: {fault}")
    if not tagged:
        logger.warning("%s holds no step that was ever finished: the run begins anew", folder)
        return ""
    raise DamagedCheckpointError(
        f"no checkpoint in {folder} can be used; to begin anew, give another folder or --no-resume:\n"
        + "\n".join(faults)
    )


def candidates(folder: Path, tagged: str, steps: list[Step]) -> list[Step]:
    """The steps to try in turn: the tagged one, then older ones. Newer ones were never finished by all processes.

    Args:
        folder: of the run.
        tagged: what `tagged_name` says.
        steps: what `find_steps` found.
    """
    parsed = parse_rank_file(tagged)
    if parsed is None:
        if tagged:
            logger.error("last_checkpoint in %s is damaged: it says %.60r; trying every step", folder, tagged)
        return steps
    name, number = parsed
    newer = [step.name for step in steps if step.number > number]
    if newer:
        logger.warning(
            "not used, because newer than the step %s that last_checkpoint names: %s", name, ", ".join(newer)
        )
    chosen = [step for step in steps if step.name == name] or [Step(folder, name, number, ())]
    return chosen + [step for step in steps if step.number <= number and step.name != name]


def open_verified(pattern: str) -> RankFiles:
    """Opens all files of a step that was named explicitly, after every process has found its share undamaged.

    Raises:
        FileNotFoundError: when a file is missing, by name.
        ValueError: when a file is damaged, or is not a checkpoint, in this process or in any other.
    """
    opened: RankFiles | None = None
    error: OSError | ValueError | None = None
    try:
        opened = RankFiles(pattern)
    except (OSError, ValueError) as caught:
        error = caught
    errors = all_gather_objects(str(error or ""))
    if error is not None:
        raise error
    assert opened is not None
    if any(errors):
        raise ValueError(next(filter(None, errors)))
    path = Path(pattern)
    step = Step(path.parent, path.name.removesuffix(".rank_{rank}.pth"), -1, tuple(range(opened.world_size)))
    before_checksums = all_gather_objects(is_before_checksums(path.parent))[0]
    if before_checksums:
        logger.warning("%s is from before checksums: damage may go unnoticed", pattern)
    if fault := _agreed_fault(step, before_checksums=before_checksums):
        raise DamagedCheckpointError(f"{path.parent}: {fault}")
    return opened


def _agreed_fault(step: Step, *, before_checksums: bool) -> str:
    """Why any process cannot use a step. Each verifies a share of the files, and opens all."""
    mine = step.ranks[get_rank() :: get_world_size()]
    faults: dict[int, str] = {}
    for part in all_gather_objects(
        {rank: file_fault(step.path(rank), before_checksums=before_checksums) for rank in mine}
    ):
        faults |= part
    return next(filter(None, all_gather_objects(step_fault(step, faults))), "")
