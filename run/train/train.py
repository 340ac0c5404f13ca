"""Door: pretraining. ``python run/train/train.py --help`` shows the options."""

from dinov2.train.command import main
from dinov2.utils.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
