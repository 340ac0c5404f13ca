"""Starting commands: in this process, or as jobs of a SLURM cluster that come back after preemption and time-out."""

from dinov2.run.launch import launch

__all__ = ["launch"]
