"""Door: retrieval of the images of a part, or on the revisited Oxford and Paris benchmarks, with a frozen backbone."""

from dinov2.eval.retrieval.evaluation import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
