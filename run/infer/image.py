"""Door: predicts classes, masks or depths for photos with a trained task model."""

from dinov2.run.process_end import exit_with
from dinov2.tasks.infer_images import main

if __name__ == "__main__":
    exit_with(main)
