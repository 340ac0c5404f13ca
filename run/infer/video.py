"""Door: predicts classes, masks or depths for the frames of a video file, a camera or a stream."""

from dinov2.predict.video import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
