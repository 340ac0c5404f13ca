"""Door: linear classification with a frozen backbone, here or as a job (``--slurm``)."""

from functools import partial

from dinov2.eval.linear import LinearOptions, main
from dinov2.run.launch import exit_with, launch

if __name__ == "__main__":
    exit_with(partial(launch, main, LinearOptions))
