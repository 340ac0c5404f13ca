"""Door: predicts classes, masks or depths for photos with a trained task model."""

from dinov2.tasks.infer_images import main
from dinov2.utils.process_end import exit_with

if __name__ == "__main__":
    exit_with(main)
