"""Door: draws what a backbone makes of the images of a dataset."""

from dinov2.eval.visualize import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
