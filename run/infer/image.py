"""Door: predicts classes, masks or depths for images with a trained task model."""

from dinov2.predict.images import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
