"""Door: linear classification with a frozen backbone."""

from dinov2.eval.linear import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
