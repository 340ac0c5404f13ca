"""The command that predicts for a video: from weights and a file, camera or stream to an overlaid video and numbers."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.logging import logging_to
from dinov2.tasks.infer_images import DEVICES, check_depth_range
from dinov2.utils.errors import RunError


@dataclass(frozen=True, kw_only=True)
class InferVideoOptions:
    """Options of the command."""

    weights: Path = option(help="best.pth of run/train/finetune.py")
    input: str = option(help="video file, number of a camera, or address of a stream (rtsp://…)")
    output_dir: Path = option(help="folder for the overlaid video and the JSON lines")
    device: str = option("auto", help="where to compute", choices=DEVICES)
    batch_size: int | None = option(None, help="frames per forward pass (usually what suits the device; live: 1)")
    overlay: bool = option(True, help="write a video with the predictions drawn on it")
    draw_fps: bool = option(False, help="also draw how many frames per second are processed")
    flips: bool = option(False, help="average with the mirrored frame")
    scales: tuple[float, ...] = option((1.0,), help="average over these sizes (segmentation and depth)")
    every: int = option(1, help="predict every Nth frame; those between show the last prediction")
    max_frames: int = option(0, help="stop after this many frames; 0: at the end")
    raw: bool = option(False, help="also write the mask or depth of every predicted frame")
    keep_going: bool = option(False, help="go on behind damage in a file, where decoders guess what is missing")
    depth_range: tuple[float, ...] = option((), help="least and greatest depth of the colours (usually those so far)")

    def __post_init__(self) -> None:
        if self.every < 1 or self.max_frames < 0:
            raise ValueError(f"--every {self.every} must be at least 1, --max-frames {self.max_frames} at least 0")
        check_depth_range(self.depth_range)


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts for all frames; returns the exit code."""
    options = parse(
        InferVideoOptions,
        argv,
        description=(
            "Predicts classes, masks or depths for the frames of a video, draws them, and writes a JSON line per frame."
        ),
        example="python run/infer/video.py --weights outputs/cracks/best.pth --input line.mp4 --output-dir found",
    )
    if importlib.util.find_spec("av") is None:
        raise RunError("reading videos needs PyAV, which is not installed: pip install 'dinov2[video]'")
    from dinov2.tasks.video_run import run_video

    with logging_to(options.output_dir):
        return run_video(options)
