"""Door: training a task head. ``python run/train/finetune.py --help`` shows the options."""

from functools import partial

from dinov2.run.launch import exit_with, launch
from dinov2.tasks.engine import FinetuneCommand, main

if __name__ == "__main__":
    exit_with(partial(launch, main, FinetuneCommand))
