"""Door: weighted nearest-neighbour classification with a frozen backbone."""

from dinov2.eval.knn import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
