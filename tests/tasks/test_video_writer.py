"""Writing videos: number, times, size and colours of frames stay."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av
from video_stand_ins import decode, facts, moving_frames

from dinov2.predict.video_files import VideoReader, VideoWriter

RATES = [Fraction(25), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(25, 2), Fraction(1), Fraction(240)]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("rate", RATES)
def test_rate_and_number_of_frames_are_kept(codec: str, rate: Fraction, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, frame_rate=rate, height=16, width=32, codec=codec) as writer:
        for number, frame in enumerate(moving_frames(21, 16, 32)):
            writer.write(frame, float(number / rate))
    assert facts(path) == (21, 16, 32, rate)
    assert writer.num_frames == 21


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("size", [(1, 1), (48, 65), (33, 64), (33, 65), (2, 2)])
def test_any_size_is_kept(codec: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, frame_rate=Fraction(25), height=size[0], width=size[1], codec=codec) as writer:
        for number in range(5):
            writer.write(np.full((*size, 3), 40 * number, dtype=np.uint8), number / 25)
    assert facts(path)[:3] == (5, *size)
    assert bool(writer.note) == (codec == "libx264" and bool(size[0] % 2 or size[1] % 2))
    levels = [frame.mean() for frame in decode(path)]
    np.testing.assert_allclose(levels, [0, 40, 80, 120, 160], atol=6)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_colours_come_back(codec: str, tmp_path: Path) -> None:
    colours = np.array([[213, 94, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [255, 255, 255], [0, 0, 0]])
    frame = colours.astype(np.uint8).repeat(16, 0)[None].repeat(32, 0)
    with VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=32, width=96, codec=codec) as writer:
        for number in range(3):
            writer.write(frame, number / 25)
    for decoded in decode(tmp_path / "a.mp4"):
        assert np.abs(decoded[8::16, 8::16].astype(int) - frame[8::16, 8::16]).max() <= 6


def test_irregular_times_are_kept(tmp_path: Path) -> None:
    seconds = [0.0, 0.04, 0.5, 0.5001, 1.25]
    with VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=16, width=16) as writer:
        for number, frame in zip(seconds, moving_frames(5, 16, 16), strict=True):
            writer.write(frame, number)
    with VideoReader(str(tmp_path / "a.mp4")) as reader:
        np.testing.assert_allclose([frame.seconds for frame in reader], seconds, atol=2e-4)


def test_the_shape_of_pixels_is_kept(tmp_path: Path) -> None:
    aspect = Fraction(16, 11)
    with VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=16, width=16, pixel_aspect=aspect) as writer:
        writer.write(np.zeros((16, 16, 3), dtype=np.uint8), 0)
    with VideoReader(str(tmp_path / "a.mp4")) as reader:
        assert reader.pixel_aspect == aspect


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a: b.mp4"
    path.write_bytes(b"old")
    writer = VideoWriter(path, frame_rate=Fraction(25), height=16, width=16)
    with pytest.raises(KeyError), writer:
        _write_and_fail(writer)
    assert facts(path)[0] == 3  # what was written before the failure can be played
    writer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a: b.mp4"]


def _write_and_fail(writer: VideoWriter) -> None:
    for number in range(3):
        writer.write(np.zeros((16, 16, 3), dtype=np.uint8), number / 25)
    assert writer.path.read_bytes() == b"old"
    raise KeyError


def test_without_a_frame_nothing_is_left(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=16, width=16):
        pass
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_encoder_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.mp4: libx264 cannot encode frames of 40000x2"):
        VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=2, width=40_000)
    assert not list(tmp_path.iterdir())


def test_mpeg4_stands_in_where_there_is_no_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    writer = VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=15, width=15)
    assert (writer.codec, writer.note) == ("mpeg4", "")
    writer.close()
