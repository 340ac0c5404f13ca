"""Door: pretraining. ``python run/train/train.py --help`` shows the options."""

from functools import partial

from dinov2.run.launch import exit_with, launch
from dinov2.train.command import TrainCommand, main

if __name__ == "__main__":
    exit_with(partial(launch, main, TrainCommand))
