"""Door: predicts classes, masks or depths for the frames of a video file, a camera or a stream."""

from dinov2.tasks.infer_video import main
from dinov2.utils.process_end import exit_with

if __name__ == "__main__":
    exit_with(main)
