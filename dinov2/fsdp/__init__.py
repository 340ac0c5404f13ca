"""Sharding, precision and compilation, applied to a network from outside; and the names of checkpoints by it."""

from dinov2.checkpoint.checkpointer import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.checkpoint.integrity import DamagedCheckpointError
from dinov2.checkpoint.sharding import full_state_dict
from dinov2.fsdp.wrap import (
    checkpoint_activations,
    compile_units,
    release_gathered_parameters,
    resolve_dtype,
    shard,
)

PeriodicCheckpointer = PeriodicFSDPCheckpointer  # the name in the published training loop

__all__ = [
    "DamagedCheckpointError",
    "FSDPCheckpointer",
    "PeriodicCheckpointer",
    "PeriodicFSDPCheckpointer",
    "checkpoint_activations",
    "compile_units",
    "full_state_dict",
    "release_gathered_parameters",
    "resolve_dtype",
    "shard",
]
