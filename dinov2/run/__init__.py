"""Starting commands: in this process, or as jobs of a SLURM cluster that come back after preemption and time-out.

Nothing is imported here: a job loads this package before anybody listens to its signals.
"""
