"""Door: retrieval of the photos of a part, or on the revisited Oxford and Paris benchmarks, with a frozen backbone."""

from dinov2.eval.retrieval.command import main
from dinov2.run.process_end import exit_with

if __name__ == "__main__":
    exit_with(main)
