"""Door: predicts classes, masks or depths for the frames of a video file, a camera or a stream."""

from dinov2.run.process_end import exit_with
from dinov2.tasks.infer_video import main

if __name__ == "__main__":
    exit_with(main)
