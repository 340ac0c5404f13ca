"""The command for videos: the same answers as for images, and nothing of the video lost."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.predict.conftest import lines_of, read
from tests.tasks.predictor_stand_ins import GREY, RED, halves, plain_image, write_package

pytest.importorskip("av")

from video_stand_ins import decode, facts, moving_frames, write_clip

from dinov2.predict import images as infer_images
from dinov2.predict import video as video_run
from dinov2.predict.predictor import Predictor
from dinov2.predict.video import InferVideoOptions, main
from dinov2.predict.video_files import DamagedVideoError, VideoAddress, VideoReader
from dinov2.tasks.package import TaskPackage, load_task_package
from dinov2.tasks.predictions import DepthPrediction
from dinov2.utils.errors import INTERRUPTED, RunError


def run(clip: Path | str, out: Path, *flags: str, weights: str = "masks.pth") -> list[dict[str, Any]]:
    words = ["--weights", weights, "--input", str(clip), "--output-dir", str(out), "--device", "cpu", *flags]
    assert main(words) == 0
    return lines_of(out / f"{Path(clip).stem}.jsonl")


def test_a_video_gives_the_masks_that_its_frames_give_as_images(tmp_path: Path) -> None:
    """Through both commands, from a trained file."""
    weights = write_package(tmp_path / "best.pth", "segmentation")
    clip = write_clip(tmp_path / "line.mp4", moving_frames(9), rate=Fraction(30000, 1001))
    frames = decode(clip)
    for number, frame in enumerate(frames):
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number:06d}.png")
    lines = run(clip, tmp_path / "video", "--raw", weights=str(weights))
    words = ["--weights", str(weights), "--input", str(tmp_path / "frames"), "--output-dir", str(tmp_path / "images")]
    assert infer_images.main([*words, "--device", "cpu"]) == 0
    images = lines_of(tmp_path / "images" / "predictions.jsonl")
    assert len(lines) == len(images) == len(frames) == 9
    different = set()
    for line, image in zip(lines, images, strict=True):
        mask = read(tmp_path / "video" / "line_frames" / line["mask"])
        np.testing.assert_array_equal(mask, read(tmp_path / "images" / image["mask"]))
        different.add(mask.tobytes())
        for key in ("pixels", "scores", "defect_score"):
            assert line[key] == image[key]
    assert len(different) > 3  # a model that always says the same would prove little
    assert facts(tmp_path / "video" / "line.mp4") == (9, 48, 64, Fraction(30000, 1001))
    np.testing.assert_allclose([line["time"] for line in lines], np.arange(9) * 1001 / 30000, atol=1e-6)
    assert [line["frame"] for line in lines] == list(range(9))


def test_an_anomaly_model_judges_frames_as_images(tmp_path: Path) -> None:
    weights = write_package(tmp_path / "best.pth", "anomaly", {"image": 1.0, "pixel": 1.0})
    clip = write_clip(tmp_path / "line.mp4", moving_frames(4))
    lines = run(clip, tmp_path / "out", "--raw", weights=str(weights))
    predictor = Predictor.of(load_task_package(weights))
    for line, found in zip(lines, predictor.predict(decode(clip)), strict=True):
        assert {name: line[name] for name in found.to_dict()} == found.to_dict()
        assert line["label"] in ("good", "anomalous")
    assert facts(tmp_path / "out" / "line.mp4")[:3] == (4, 48, 64)


def test_the_overlay_is_that_of_images(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving_frames(5, 240, 320))
    run(clip, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.mp4", "a.jsonl", "log"}
    predictor = Predictor.of(packages["masks.pth"])
    drawn = decode(tmp_path / "out" / "a.mp4")
    for frame, prediction, found in zip(decode(clip), predictor.predict(decode(clip)), drawn, strict=True):
        expected = np.array(prediction.draw(frame, keep_size=True))
        assert np.abs(found.astype(int) - expected).mean() < 8  # what the encoder loses in a noisy picture
        assert np.abs(found.astype(int) - expected).mean() < np.abs(found.astype(int) - frame).mean() / 1.5


def test_every_kind_of_model_reports_its_numbers(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving_frames(6))
    classes = run(clip, tmp_path / "c", "--draw-fps", "--flips", weights="classes.pth")
    assert all(sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-4) for line in classes)
    depth = run(clip, tmp_path / "d", "--no-overlay", "--raw", weights="depth.pth")
    assert not (tmp_path / "d" / "a.mp4").exists()
    predictions = Predictor.of(packages["depth.pth"]).predict(decode(clip))
    for line, prediction in zip(depth, predictions, strict=True):
        exact = np.load(tmp_path / "d" / "a_frames" / line["depth"])
        np.testing.assert_array_equal(exact, prediction.depth)
        assert line["max"] == pytest.approx(float(exact.max()), rel=1e-5)
    run(clip, tmp_path / "e", "--depth-range", "1", "2", weights="depth.pth")
    assert facts(tmp_path / "e" / "a.mp4")[0] == 6


def test_the_colours_of_depths_widen_and_never_jump_back(
    tmp_path: Path, packages: dict[str, TaskPackage], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [np.full((48, 64, 3), level, dtype=np.uint8) for level in (100, 200, 120, 50)]
    clip = write_clip(tmp_path / "a.mp4", frames)
    ranges: list[tuple[float, float]] = []

    taken = DepthPrediction.draw

    def draw(prediction: DepthPrediction, image: Any, *, value_range: tuple[float, float], **settings: Any) -> Any:
        ranges.append(value_range)
        return taken(prediction, image, value_range=value_range, **settings)

    monkeypatch.setattr(DepthPrediction, "draw", draw)
    run(clip, tmp_path / "out", weights="depth.pth")
    expected = np.array([(100, 100), (100, 200), (100, 200), (50, 200)]) / 255 + 1
    np.testing.assert_allclose(ranges, expected, atol=0.03)


def test_between_predicted_frames_the_last_prediction_stands(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving_frames(11))
    every = run(clip, tmp_path / "a")
    lines = run(clip, tmp_path / "b", "--every", "4", "--raw", "--batch-size", "3")
    assert facts(tmp_path / "b" / "a.mp4")[0] == len(lines) == 11
    for number, line in enumerate(lines):
        source = number // 4 * 4
        assert line["pixels"] == every[source]["pixels"]
        assert line.get("predicted_frame", number) == source
        assert ("mask" in line) == (number == source)
    model = packages["masks.pth"].model
    assert sum(shape[0] for shape in model.batches) == 11 + 3


def test_a_video_can_be_cut_short(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving_frames(20))
    assert len(run(clip, tmp_path / "out", "--max-frames", "7", "--batch-size", "4")) == 7
    assert facts(tmp_path / "out" / "a.mp4")[0] == 7


def test_a_truncated_file_is_processed_up_to_the_damage(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    whole = write_clip(tmp_path / "whole.mp4", moving_frames(30))
    clip = tmp_path / "cut.mp4"
    clip.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    complete = run(whole, tmp_path / "out", "--raw")
    with pytest.raises(DamagedVideoError, match=r"cut\.mp4 is damaged at frame \d+ \(") as raised:
        run(clip, tmp_path / "out", "--raw", "--batch-size", "4")
    lines = lines_of(tmp_path / "out" / "cut.jsonl")
    assert len(lines) == raised.value.frame == facts(tmp_path / "out" / "cut.mp4")[0]
    assert 5 < len(lines) < 30
    assert lines == complete[: len(lines)]
    for line in lines:
        cut_mask = read(tmp_path / "out" / "cut_frames" / line["mask"])
        np.testing.assert_array_equal(cut_mask, read(tmp_path / "out" / "whole_frames" / line["mask"]))


def test_a_file_that_cannot_be_opened_leaves_no_video(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving_frames(20), faststart=False)
    clip.write_bytes(clip.read_bytes()[:-1500])
    with pytest.raises(DamagedVideoError, match=r"a\.mp4 is damaged at frame 0 .*nothing could be read"):
        run(clip, tmp_path / "out")
    assert not (tmp_path / "out" / "a.mp4").exists()
    with pytest.raises(FileNotFoundError, match="no video file at"):
        run(tmp_path / "no.mp4", tmp_path / "out")


TEST_PICTURE = VideoAddress("camera", "camera", "testsrc=size=64x48:rate=30", "lavfi")


def test_a_live_source_goes_frame_by_frame_until_it_is_stopped(
    tmp_path: Path, packages: dict[str, TaskPackage]
) -> None:
    options = InferVideoOptions(weights=Path("masks.pth"), input="0", output_dir=tmp_path, device="cpu", batch_size=8)
    answers = iter([False] * 6 + [True])
    with VideoReader(TEST_PICTURE) as reader, video_run.FrameResults(options, reader) as results:
        predictor = Predictor.of(packages["masks.pth"], batch_size=8)
        counted = video_run.infer_frames(predictor, reader, results, options, stop=lambda: next(answers))
    assert counted == 7
    assert facts(tmp_path / "camera.mp4")[:3] == (7, 48, 64)
    model = packages["masks.pth"].model
    assert {shape[0] for shape in model.batches} == {1}


def test_a_signal_ends_the_video_properly(
    tmp_path: Path, packages: dict[str, TaskPackage], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = InferVideoOptions(weights=Path("masks.pth"), input="0", output_dir=tmp_path, device="cpu")
    write = video_run.FrameResults.write

    def write_and_interrupt(results: Any, frame: Any, *words: Any, **settings: Any) -> None:
        write(results, frame, *words, **settings)
        if frame.number == 9:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(video_run.FrameResults, "write", write_and_interrupt)
    assert video_run.run_video(options, TEST_PICTURE) == INTERRUPTED
    assert facts(tmp_path / "camera.mp4")[:3] == (10, 48, 64)
    assert len(lines_of(tmp_path / "camera.jsonl")) == 10


def test_the_input_is_never_overwritten(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving_frames(5))
    before = clip.read_bytes()
    with pytest.raises(ValueError, match="would replace"):
        run(clip, tmp_path)
    assert clip.read_bytes() == before


def test_without_pyav_the_way_to_get_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'dinov2\[video\]'"):
        run(tmp_path / "a.mp4", tmp_path)


@pytest.mark.parametrize("flags", [("--every", "0"), ("--max-frames", "-1"), ("--depth-range", "1")])
def test_wrong_options_are_said(flags: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--(every|max-frames|depth-range)"):
        run(tmp_path / "a.mp4", tmp_path, *flags)


def test_the_pace_is_reported(
    tmp_path: Path, packages: dict[str, TaskPackage], capsys: pytest.CaptureFixture[str]
) -> None:
    run(write_clip(tmp_path / "a.mp4", moving_frames(12)), tmp_path / "out")
    told = capsys.readouterr().err
    assert "a.mp4 on cpu: 12 frames at 25 frames/s" in told
    assert "12 frames in 0:00:0" in told
    assert "frames/s (the video has 25)" in told


def test_the_door_ends_with_code_one_and_the_message(tmp_path: Path, repository: Path) -> None:
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"no video")
    weights = write_package(tmp_path / "best.pth", "segmentation")
    words = ["--weights", str(weights), "--input", str(clip), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    ended = subprocess.run(
        [sys.executable, str(repository / "run" / "infer" / "video.py"), *words],
        capture_output=True, text=True, timeout=120, check=False, cwd=repository,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "error: video" in ended.stderr
    assert "a.mp4 is damaged at frame 0" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_frames_are_compared_with_one_image_of_the_scene(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    frames = [plain_image(48, 64, GREY), halves(48, 64, GREY, RED), plain_image(48, 64, GREY)]
    clip = write_clip(tmp_path / "line.mp4", frames)
    Image.fromarray(frames[0]).save(tmp_path / "scene.png")
    lines = run(clip, tmp_path / "out", "--reference", str(tmp_path / "scene.png"), weights="compared.pth")
    assert [line["pixels"].get("new", 0) > 1000 for line in lines] == [False, True, False]
    with pytest.raises(ValueError, match="give its reference"):
        run(clip, tmp_path / "other", weights="compared.pth")
    Image.fromarray(frames[0][:40]).save(tmp_path / "smaller.png")
    with pytest.raises(ValueError, match="its reference has 40 x 64 pixels"):
        run(clip, tmp_path / "other", "--reference", str(tmp_path / "smaller.png"), weights="compared.pth")
