"""Sharding, precision and checkpoints: everything that is applied to a network from outside."""

from dinov2.checkpoint.checkpointer import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.checkpoint.integrity import DamagedCheckpointError
from dinov2.checkpoint.sharding import full_state_dict
from dinov2.fsdp.wrap import checkpoint_activations, compile_units, release_gathered_parameters, resolve_dtype, shard

__all__ = [
    "DamagedCheckpointError",
    "FSDPCheckpointer",
    "PeriodicFSDPCheckpointer",
    "checkpoint_activations",
    "compile_units",
    "full_state_dict",
    "release_gathered_parameters",
    "resolve_dtype",
    "shard",
]
