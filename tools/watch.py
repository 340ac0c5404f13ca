"""Door: predicts for images that are dropped into a folder."""

from dinov2.deploy.watch import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
