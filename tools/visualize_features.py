"""Door: draws what a backbone sees in photos of a dataset."""

from dinov2.eval.pictures.command import main
from dinov2.run.process_end import exit_with

if __name__ == "__main__":
    exit_with(main)
