"""Door: retrieval of the images of a part with a frozen backbone, here or as a job (``--slurm``)."""

from functools import partial

from dinov2.eval.retrieval.evaluation import RetrievalOptions, main
from dinov2.run.launch import exit_with, launch

if __name__ == "__main__":
    exit_with(partial(launch, main, RetrievalOptions))
