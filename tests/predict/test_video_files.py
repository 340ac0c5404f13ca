"""Reading videos: whole, irregular, turned, damaged and live ones."""

import random
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av
from video_stand_ins import decode, facts, moving_frames, write_clip

from dinov2.predict.video_files import (
    DamagedVideoError,
    VideoAddress,
    VideoFrame,
    VideoReader,
    VideoWriter,
    locate_video,
    words_of_decoders,
)

CODECS = {
    "h264.mp4": {"codec": "libx264"},
    "h264.mkv": {"codec": "libx264"},
    "h264.ts": {"codec": "libx264"},
    "h264.avi": {"codec": "libx264"},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p", "bframes": 0},
}


@pytest.fixture(autouse=True)
def words() -> Iterator[None]:
    with words_of_decoders():
        yield


def read(source: str | Path | VideoAddress, **settings: bool) -> tuple[list[VideoFrame], str | None]:
    """Frames up to the end or to the damage, and what is said about it."""
    frames: list[VideoFrame] = []
    with VideoReader(source if isinstance(source, VideoAddress) else str(source), **settings) as reader:
        try:
            frames.extend(reader)  # keeps what came before an error
        except DamagedVideoError as error:
            return frames, str(error)
    return frames, None


@pytest.mark.parametrize("name", CODECS)
def test_a_whole_file_gives_every_frame_once(name: str, tmp_path: Path) -> None:
    rate = Fraction(30000, 1001)
    path = write_clip(tmp_path / name, moving_frames(25), rate=rate, **CODECS[name])
    frames, damage = read(path)
    assert damage is None
    assert [frame.number for frame in frames] == list(range(25))
    np.testing.assert_allclose([frame.seconds for frame in frames], [float(n / rate) for n in range(25)], atol=1e-9)
    for frame, expected in zip(frames, decode(path), strict=True):
        np.testing.assert_array_equal(frame.pixels, expected)
    with VideoReader(str(path)) as reader:
        assert reader.frame_rate == rate
        assert reader.num_frames in (25, None)
        assert not reader.live


@pytest.mark.parametrize("name", CODECS)
def test_of_a_truncated_file_exactly_the_frames_before_the_cut_are_given(name: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / name, moving_frames(30), **CODECS[name])
    whole, data = decode(path), path.read_bytes()
    cut = tmp_path / f"cut_{name}"
    draws = random.Random(5)
    given = []
    for _ in range(60 if name in ("h264.avi", "h264.ts") else 16):  # these tell least, and few cuts are hard
        cut.write_bytes(data[: int(len(data) * draws.uniform(0.3, 0.99))])
        frames, damage = read(cut)
        given.append(len(frames))
        for frame in frames:
            np.testing.assert_array_equal(frame.pixels, whole[round(25 * frame.seconds)])
        assert [frame.number for frame in frames] == list(range(len(frames)))
        # A transport stream has no header that tells its length: cut between two frames it is a shorter stream.
        # An AVI file may lose its index only, at its very end.
        assert damage is not None or name.endswith(".ts") or len(frames) == 30
        if damage is not None:
            assert damage.startswith(f"video {cut} is damaged at frame {len(frames)} (")
            done = f"the {len(frames)} frames before it are done" if frames else "nothing could be read"
            assert damage.endswith(f"; {done}")
    assert len(set(given)) > 3
    assert min(given) < 25


def test_a_cut_between_two_frames_is_noticed(tmp_path: Path) -> None:
    """No decoder complains then: only the header knows that there should be more."""
    path = write_clip(tmp_path / "a.mp4", moving_frames(30), bframes=0)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    whole = path.read_bytes()
    for number in (1, 12, 20, 28):
        path.write_bytes(whole[: places[number]])
        frames, damage = read(path)
        assert len(frames) == number
        assert damage is not None
    path.write_bytes(whole)
    assert read(path)[1] is None


def test_the_message_holds_the_decoders_own_words(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", moving_frames(20), faststart=False)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(DamagedVideoError, match=r"a\.mp4 is damaged at frame 0 .*moov atom not found; nothing could"):
        VideoReader(str(path))
    zeros = bytearray(write_clip(tmp_path / "b.mp4", moving_frames(20)).read_bytes())
    zeros[len(zeros) // 2 : len(zeros) // 2 + 3000] = bytes(3000)
    (tmp_path / "b.mp4").write_bytes(zeros)
    frames, damage = read(tmp_path / "b.mp4")
    assert f"b.mp4 is damaged at frame {len(frames)} " in damage
    assert "[h264]" in damage


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\x00" * 5000])
def test_what_is_no_video_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DamagedVideoError, match=r"a\.mp4 is damaged at frame 0"):
        read(path)


def test_a_file_of_sound_holds_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DamagedVideoError, match="it holds no pictures"):
        VideoReader(str(path))


def test_a_recording_that_begins_in_the_middle_starts_at_its_first_key_frame(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.ts", moving_frames(30), bframes=0)
    whole, data = decode(path), path.read_bytes()
    path.write_bytes(data[188 * (len(data) // 188 // 4) :])
    frames, damage = read(path)
    assert damage is None
    assert 10 < len(frames) < 24
    for frame, expected in zip(frames, whole[-len(frames) :], strict=True):
        np.testing.assert_array_equal(frame.pixels, expected)
    assert frames[0].seconds == 0


def test_keeping_going_gives_what_comes_after_the_damage(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", moving_frames(30), bframes=0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    path.write_bytes(data)
    strict, damage = read(path)
    assert damage is not None
    tolerant, damage = read(path, keep_going=True)
    assert damage is None
    assert len(strict) < 28 < len(tolerant)


def test_irregular_times_are_kept(tmp_path: Path) -> None:
    seconds = [0.0, 0.04, 0.08, 0.5, 0.52, 1.3]
    path = write_clip(tmp_path / "a.mp4", moving_frames(6), seconds=seconds)
    frames, damage = read(path)
    assert damage is None
    np.testing.assert_allclose([frame.seconds for frame in frames], seconds, atol=1e-3)


def test_rates_that_the_clock_of_the_file_cannot_tell_exactly_stay_exact(tmp_path: Path) -> None:
    """Matroska counts milliseconds: 1/30 s is 33 or 34 of them."""
    path = write_clip(tmp_path / "a.mkv", moving_frames(40), rate=Fraction(30))
    frames, _ = read(path)
    np.testing.assert_allclose(np.diff([frame.seconds for frame in frames]), 1 / 30, atol=1e-9)


def test_the_clock_of_a_stream_is_not_taken_for_its_rate(tmp_path: Path) -> None:
    """Copied into Matroska without a rate, a stream is said to have as many frames a second as its clock ticks."""
    rate = Fraction(30000, 1001)
    with VideoWriter(tmp_path / "a.mp4", frame_rate=rate, height=48, width=64) as writer:
        for number, frame in enumerate(moving_frames(20)):
            writer.write(frame, float(number / rate))
    with av.open(str(tmp_path / "a.mp4")) as whole, av.open(str(tmp_path / "b.mkv"), "w") as copy:
        stream = copy.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    with av.open(str(tmp_path / "b.mkv")) as made:
        assert made.streams.video[0].average_rate > 10_000
    with VideoReader(str(tmp_path / "b.mkv")) as reader:
        assert reader.frame_rate == rate
        assert reader.num_frames == 20
        assert [frame.seconds for frame in reader] == pytest.approx([float(n / rate) for n in range(20)], abs=1e-3)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_are_turned_upright(rotation: int, tmp_path: Path) -> None:
    plain = write_clip(tmp_path / "a.mp4", moving_frames(3))
    turned = write_clip(tmp_path / "b.mp4", moving_frames(3), rotation=rotation)
    for frame, expected in zip(read(turned)[0], decode(plain), strict=True):
        # A rotation of 90 degrees is counter-clockwise.
        np.testing.assert_array_equal(frame.pixels, np.rot90(expected, rotation // 90))


def test_a_live_source_has_no_length_and_is_never_damaged_at_its_end() -> None:
    address = VideoAddress("test picture", "test", "testsrc=size=32x24:rate=10:duration=1", "lavfi")
    frames, damage = read(address)
    assert damage is None
    assert len(frames) == 10
    with VideoReader(address) as reader:
        assert reader.live
        assert (reader.frame_rate, reader.num_frames) == (10, None)


def test_times_increase_always(tmp_path: Path) -> None:
    """AVI stores the order of decoding: its time stamps jump back and forth."""
    path = write_clip(tmp_path / "a.avi", moving_frames(20))
    seconds = [frame.seconds for frame in read(path)[0]]
    assert all(later > earlier for earlier, later in pairwise(seconds))


def test_names_of_videos(tmp_path: Path) -> None:
    file = tmp_path / "line 1.mp4"
    file.touch()
    found = locate_video(str(file))
    assert (found.url, found.stem, found.file, found.format) == (f"file:{file}", "line 1", True, None)
    stream = locate_video("rtsp://user:secret@10.0.0.7:554/cam/1")
    assert (stream.url, stream.file) == ("rtsp://user:secret@10.0.0.7:554/cam/1", False)
    assert stream.stem == "10_0_0_7_554_cam_1"
    assert "secret" not in stream.name
    assert locate_video("0", platform="darwin").format == "avfoundation"
    assert locate_video("/dev/null").format == "v4l2"
    for source, error, message in [
        (str(tmp_path / "no.mp4"), FileNotFoundError, "no video file at"),
        (str(tmp_path), FileNotFoundError, "no video file at"),
        ("99", FileNotFoundError, "camera 99: there is no /dev/video99"),
    ]:
        with pytest.raises(error, match=message):
            locate_video(source, platform="linux")
    assert locate_video(f"file://{file}").url == f"file:{file}"
    for address in (
        "subfile,,start,0,end,9,,:///etc/passwd",
        "concat:file:///a|file:///b",
        "crypto+http://x",
        "data://x",
    ):
        with pytest.raises(ValueError, match="is no protocol that videos are read by; allowed are rtsp://"):
            locate_video(address)
    assert locate_video("HTTP://10.0.0.7/a.m3u8").url == "HTTP://10.0.0.7/a.m3u8"
    with pytest.raises(ValueError, match="cameras have numbers on Linux and macOS only"):
        locate_video("0", platform="win32")


def test_a_stream_that_does_not_answer_is_an_error_without_its_password() -> None:
    with pytest.raises(DamagedVideoError, match=r"127\.0\.0\.1:1/cam") as raised:
        VideoReader("rtsp://user:secret@127.0.0.1:1/cam")
    assert "secret" not in str(raised.value)


def test_words_of_decoders_leaves_no_trace() -> None:
    before = av.logging.get_level()
    with words_of_decoders():
        pass
    assert av.logging.get_level() == before


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


def test_irregular_times_are_kept_by_the_writer(tmp_path: Path) -> None:
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


def test_without_a_frame_or_with_a_size_that_the_encoder_refuses_nothing_is_left(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=16, width=16):
        pass
    with pytest.raises(ValueError, match=r"a\.mp4: libx264 cannot encode frames of 40000x2"):
        VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=2, width=40_000)
    assert not list(tmp_path.iterdir())


def test_mpeg4_stands_in_where_there_is_no_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    writer = VideoWriter(tmp_path / "a.mp4", frame_rate=Fraction(25), height=15, width=15)
    assert (writer.codec, writer.note) == ("mpeg4", "")
    writer.close()
