"""The command that predicts for a video: from weights and a file, camera or stream to an overlaid video and numbers."""

import importlib.util
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.config.command_line import option, parse, run_as
from dinov2.distributed import choose_device
from dinov2.logging import logging_to
from dinov2.logging.progress import format_duration, memory_gib
from dinov2.predict.images import DEVICES, check_value_range
from dinov2.predict.predictor import Predictor
from dinov2.predict.video_files import (
    DamagedVideoError,
    VideoAddress,
    VideoFrame,
    VideoReader,
    VideoWriter,
    locate_video,
    words_of_decoders,
)
from dinov2.tasks.package import load_task_package
from dinov2.tasks.predictions import Prediction, SaveOptions
from dinov2.utils.errors import RunError
from dinov2.utils.interruption import Interruption

logger = logging.getLogger("dinov2")

_MAX_PIXELS = 40_000_000  # of frames that are in memory together
_RATE_SECONDS = 2.0  # the rate that is drawn looks back so far
_LOG_SECONDS = 10.0


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
    scales: tuple[float, ...] = option((1.0,), help="average over these sizes (models of maps)")
    every: int = option(1, help="predict every Nth frame; those between show the last prediction")
    max_frames: int = option(0, help="stop after this many frames; 0: at the end")
    raw: bool = option(False, help="also write the files about every predicted frame, such as a map")
    keep_going: bool = option(False, help="go on behind damage in a file, where decoders guess what is missing")
    depth_range: tuple[float, ...] = option((), help="least and greatest value of the colours (usually those so far)")
    reference: Path | None = option(None, help="for a model that compares: an image of the scene without a defect")

    def __post_init__(self) -> None:
        if self.every < 1 or self.max_frames < 0:
            raise ValueError(f"--every {self.every} must be at least 1, --max-frames {self.max_frames} at least 0")
        check_value_range(self.depth_range)


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts for all frames; returns the exit code."""
    options = parse(
        InferVideoOptions,
        argv,
        description=(
            "Predicts for every frame of a video what a model was trained for, draws it, and writes it as a JSON line."
        ),
        example="python run/infer/video.py --weights outputs/cracks/best.pth --input line.mp4 --output-dir found",
    )
    if importlib.util.find_spec("av") is None:
        raise RunError("reading videos needs PyAV, which is not installed: pip install 'dinov2[video]'")

    with logging_to(options.output_dir):
        return run_video(options)


def run_video(options: InferVideoOptions, address: VideoAddress | None = None) -> int:
    """Does what the options say.

    Args:
        options: of the command.
        address: where the video comes from; by default what ``options.input`` means.

    Returns:
        The exit code: 0, or that of a signal that came. All files are complete either way.

    Raises:
        DamagedVideoError: where the video is damaged, when everything before is done and all files are complete.
    """
    address = address or locate_video(options.input)
    if (options.output_dir / f"{address.stem}.mp4").resolve() == Path(options.input).resolve():
        raise ValueError(f"--output-dir {options.output_dir} would replace {options.input}: choose another folder")
    device = choose_device(options.device)
    package = load_task_package(options.weights, device)
    predictor = Predictor.of(package, batch_size=options.batch_size, flips=options.flips, scales=options.scales)
    predictor.check_reference(given=options.reference is not None)
    with Interruption() as interruption, ExitStack() as stack:
        stack.enter_context(words_of_decoders())
        reader = stack.enter_context(VideoReader(address, keep_going=options.keep_going))
        length = "" if reader.num_frames is None else f"{reader.num_frames} frames at "
        logger.info(
            "%s of %s on %s: %s%.6g frames/s", package.task.name, address.name, device, length, reader.frame_rate
        )
        results = stack.enter_context(FrameResults(options, reader))
        infer_frames(predictor, reader, results, options, stop=lambda: interruption.requested)
    logger.info("results are in %s", options.output_dir)
    if reader.num_skipped:
        logger.warning("%s: left out %d damaged pieces", address.name, reader.num_skipped)
    return interruption.exit_code if interruption.requested else 0


def infer_frames(
    predictor: Predictor,
    reader: VideoReader,
    results: "FrameResults",
    options: InferVideoOptions,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Predicts for frames and writes what comes out; returns how many frames there were.

    Args:
        predictor: of the task.
        reader: gives the frames.
        results: takes them.
        options: ``every``, ``max_frames``, ``draw_fps`` and ``reference`` are read.
        stop: asked between frames whether to end early.

    Raises:
        DamagedVideoError: where the video is damaged, when everything before is done.
    """
    pace = _Pace(reader)
    beside = options.reference and predictor.preprocessing.reader.read(options.reference)
    last: tuple[int, Prediction] | None = None
    try:
        for frames in _chunks(reader, 1 if reader.live else predictor.batch_size, options.max_frames):
            chosen = [frame for frame in frames if frame.number % options.every == 0]
            references = [beside] * len(chosen) if beside else None
            predictions = predictor.predict([frame.pixels for frame in chosen], references)
            found = dict(zip(chosen, predictions, strict=True))
            for frame in frames:
                if frame in found:
                    last = frame.number, found[frame]
                assert last is not None  # the first frame is predicted
                pace.count()
                results.write(frame, *last, caption=f"{pace.rate:.1f} frames/s" if options.draw_fps else "")
            if stop():
                break
    finally:
        pace.finish()
    return pace.num_frames


class FrameResults(AbstractContextManager["FrameResults"]):
    """Files about a video, in the folder of the options: use it in a ``with`` block.

    ``STEM.mp4``, with predictions drawn on the frames; ``STEM.jsonl``, a line per frame: ``frame`` (from 0), ``time``
    in seconds since the first, ``predicted_frame`` where that is another one, and what `Prediction.to_dict` says; with
    ``raw`` the files of `Prediction.save` below ``STEM_frames``.

    Args:
        options: of the command.
        reader: of the video.
    """

    def __init__(self, options: InferVideoOptions, reader: VideoReader) -> None:
        self.options = options
        self.reader = reader
        folder, stem = options.output_dir, reader.address.stem
        folder.mkdir(parents=True, exist_ok=True)
        self.video_path, self.lines_path = folder / f"{stem}.mp4", folder / f"{stem}.jsonl"
        self._frames_folder = folder / f"{stem}_frames"
        self._save_options = SaveOptions()
        self._lines = self.lines_path.open("w", encoding="utf-8")
        self._writer: VideoWriter | None = None
        self._fixed_range = check_value_range(options.depth_range)
        self._range_so_far: tuple[float, float] | None = None

    def write(self, frame: VideoFrame, predicted_frame: int, prediction: Prediction, *, caption: str = "") -> None:
        """Writes what there is about a frame.

        Args:
            frame: the next one.
            predicted_frame: number of the frame that the prediction is about.
            prediction: of that frame.
            caption: further words on the drawing.
        """
        line: dict[str, Any] = {"frame": frame.number, "time": round(frame.seconds, 6)}
        if predicted_frame != frame.number:
            line["predicted_frame"] = predicted_frame
        line |= prediction.to_dict()
        if self.options.raw and predicted_frame == frame.number:
            line |= prediction.save(self._frames_folder, f"{frame.number:06d}", self._save_options)
        if self.options.overlay:
            self._draw(frame, prediction, caption)
        self._lines.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        """Completes the files; twice is harmless."""
        self._lines.close()
        if self._writer is not None:
            self._writer.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _draw(self, frame: VideoFrame, prediction: Prediction, caption: str) -> None:
        height, width = frame.pixels.shape[:2]
        if self._writer is None:
            self._writer = VideoWriter(
                self.video_path,
                frame_rate=self.reader.frame_rate,
                height=height,
                width=width,
                pixel_aspect=self.reader.pixel_aspect,
            )
            if self._writer.note:
                logger.warning("%s: %s", self.video_path, self._writer.note)
        value_range = self._value_range(prediction)
        drawing = prediction.draw(frame.pixels, keep_size=True, value_range=value_range, caption=caption)
        self._writer.write(drawing, frame.seconds)

    def _value_range(self, prediction: Prediction) -> tuple[float, float] | None:
        """What the colours span: with nothing given all that was seen so far, since colours that jump say nothing."""
        if self._fixed_range is not None:
            return self._fixed_range
        found = prediction.value_range()
        if found is not None and not math.isnan(found[0]):
            before = self._range_so_far or found
            self._range_so_far = min(found[0], before[0]), max(found[1], before[1])
        return self._range_so_far


class _Pace:
    """Counts frames and says how fast they go."""

    def __init__(self, reader: VideoReader) -> None:
        self.reader = reader
        self.num_frames = 0
        self._start = self._spoken = time.monotonic()
        self._recent: deque[float] = deque([self._start])

    @property
    def rate(self) -> float:
        """Frames per second of late."""
        return (len(self._recent) - 1) / max(self._recent[-1] - self._recent[0], 1e-9)

    def count(self) -> None:
        """One more frame is done."""
        self.num_frames += 1
        now = time.monotonic()
        self._recent.append(now)
        while len(self._recent) > 2 and now - self._recent[0] > _RATE_SECONDS:
            self._recent.popleft()
        if now - self._spoken >= _LOG_SECONDS:
            self._spoken = now
            total = self.reader.num_frames
            left = (
                "" if total is None else f", {format_duration((total - self.num_frames) / max(self.rate, 1e-9))} left"
            )
            of = "" if total is None else f" of {total}"
            logger.info("frame %d%s, %.1f frames/s%s, %.1f GiB", self.num_frames, of, self.rate, left, memory_gib())

    def finish(self) -> None:
        """Logs the mean rate."""
        seconds = time.monotonic() - self._start
        logger.info(
            "%d frames in %s: %.1f frames/s (the video has %.6g)",
            self.num_frames, format_duration(seconds), self.num_frames / max(seconds, 1e-9), self.reader.frame_rate,
        )  # fmt: skip


def _chunks(reader: VideoReader, most: int, max_frames: int) -> Iterator[list[VideoFrame]]:
    """Frames that are predicted together; those before damage come before its error."""
    chunk: list[VideoFrame] = []
    try:
        for frame in reader:
            chunk.append(frame)
            if len(chunk) >= most or (len(chunk) + 1) * frame.pixels[..., 0].size > _MAX_PIXELS:
                yield chunk
                chunk = []
            if frame.number + 1 == max_frames:
                break
    except DamagedVideoError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


if __name__ == "__main__":
    run_as("infer_video")
