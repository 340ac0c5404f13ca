"""Decoding: known colours of every mode as a person sees them, and damaged files."""

import contextlib
import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from dinov2.data import decoding, value_range
from dinov2.data.decoding import (
    decode_image,
    decode_levels,
    decode_values,
    load_image,
    read_image_size,
    sample_values,
    to_upright_rgb,
)
from dinov2.data.reading import UnreadableImageError
from dinov2.data.value_range import ValueRange


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(data: bytes) -> list[int]:
    decoded = pixels(data)
    assert (decoded == decoded[..., :1]).all()
    return decoded[..., 0].ravel().tolist()


@pytest.fixture(autouse=True)
def _warn_anew() -> Iterator[None]:
    value_range._reported.cache_clear()
    yield
    value_range._reported.cache_clear()


def encode_tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    kind = "rgb" if array.ndim == 3 and array.shape[2] in (3, 4) else "minisblack"
    options = {"photometric": kind, "planarconfig": "contig" if array.ndim == 3 else None} | options
    pytest.importorskip("tifffile").imwrite(buffer, array, **options)
    return buffer.getvalue()


LEVELS_16 = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
LEVELS_8 = [0, 1, 128, 255]


class TestGrey:
    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (encode(Image.fromarray(np.array([[0, 7, 255]], np.uint8)), "PNG"), [0, 7, 255]),
            (encode(Image.fromarray(np.array([[False, True]])), "PNG"), [0, 255]),
            *((encode(Image.fromarray(LEVELS_16), kind), LEVELS_8) for kind in ("PNG", "TIFF", "JPEG2000")),
            (encode(Image.frombytes("I;16B", (4, 1), LEVELS_16.astype(">u2").tobytes()), "TIFF"), LEVELS_8),
            (b"P5 4 1 65535\n" + LEVELS_16.astype(">u2").tobytes(), LEVELS_8),
            (b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes(), [0, 128, 255]),
            (encode(Image.fromarray(LEVELS_16), "TIFF", tiffinfo={262: 0}), [255, 254, 127, 0]),  # white is zero
            # The scale depends on the format, not on the scene: images of one set stay comparable.
            (encode(Image.fromarray(LEVELS_16 // 257), "PNG"), [0, 0, 0, 1]),
        ],
    )
    def test_8_and_16_bits_are_scaled_by_their_full_range(self, data: bytes, expected: list[int]) -> None:
        assert grey(data) == expected

    @pytest.mark.parametrize(
        ("values", "dtype", "expected"),
        [
            ([0, 100, 255], np.int32, [0, 100, 255]),
            ([0, 257, 65535], np.int32, [0, 1, 255]),
            ([-100, 0, 100], np.int32, [0, 128, 255]),
            ([0, 50_000, 100_000], np.int32, [0, 128, 255]),
            ([-5, -5, -5], np.int32, [0, 0, 0]),
            ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
            ([0.0, 100.0, 255.0], np.float32, [0, 100, 255]),
            ([0.0, 257.0, 65535.0], np.float32, [0, 1, 255]),
            ([-1.0, 0.0, 1.0], np.float32, [0, 128, 255]),
            ([float("nan"), 0.5, 1.0], np.float32, [0, 128, 255]),
            ([float("inf"), 0.5, float("-inf")], np.float32, [255, 128, 0]),
            ([float("nan")] * 3, np.float32, [0, 0, 0]),
        ],
    )
    def test_32_bits_by_the_range_that_holds_them(self, values: list[float], dtype: type, expected: list[int]) -> None:
        data = encode(Image.fromarray(np.array([values], dtype)), "TIFF")
        assert np.allclose(grey(data), expected, atol=dtype is np.float32)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint32, np.int16])
    def test_one_bright_pixel_blackens_no_image(self, dtype: type, caplog: pytest.LogCaptureFixture) -> None:
        scene = np.linspace(0, 1 if dtype in (np.float32, np.float64) else 255, 64 * 64).reshape(64, 64).astype(dtype)
        hot = scene.copy()
        hot[0, 0] = scene.max() * 20
        plain, bright = pixels(encode_tiff(scene)), pixels(encode_tiff(hot))
        assert abs(plain.mean() - 127.5) < 1
        assert np.abs(plain.astype(int) - bright)[1:].max() <= 1
        (message,) = [record.message for record in caplog.records]
        assert "no range of its set is known" in message, "once"

    def test_what_was_not_measured_is_no_end_of_the_range(self) -> None:
        heights = np.linspace(3, 5, 64 * 64, dtype=np.float32).reshape(64, 64)
        heights[:8] = -9999
        found = pixels(encode_tiff(heights))[..., 0]
        assert found[:8].max() == 0
        assert found[8:].std() > 60

    @pytest.mark.parametrize("read", [decode_image, decode_values])
    def test_8_bits_with_a_sign_do_not_wrap(self, read: object) -> None:
        values = np.array([[-128, -1, 0, 1, 127]], np.int8)
        image = read(encode_tiff(values), "x")
        if read is decode_values:
            assert np.asarray(image).tolist() == values.tolist()
        else:
            assert np.asarray(image)[0, :, 0].tolist() == [0, 127, 128, 129, 255]


class TestRange:
    """The range of a set, where the values of a file are more than 8 bits."""

    @pytest.mark.parametrize(
        ("data", "values"),
        [
            (encode(Image.fromarray(np.array([[0, 2048, 4095]], np.uint16)), "PNG"), [0, 128, 255]),
            (encode(Image.fromarray(np.array([[0, 2048, 4095]], np.uint16)), "TIFF", tiffinfo={262: 0}), [255, 127, 0]),
            (b"P5 3 1 65535\n" + np.array([0, 2048, 4095], ">u2").tobytes(), [0, 128, 255]),
            (b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes(), [0, 128, 255]),
            (encode(Image.fromarray(np.array([[-5, 2047.5, 5000]], np.float32)), "TIFF"), [0, 128, 255]),
            (encode(Image.fromarray(np.array([[-5, 2048, 5000]], np.int32)), "TIFF"), [0, 128, 255]),
            (encode(Image.fromarray(np.array([[0, 100, 255]], np.uint8)), "PNG"), [0, 100, 255]),  # as it is
        ],
    )
    def test_scales_what_is_deeper_than_8_bits(self, data: bytes, values: list[int]) -> None:
        image = decode_image(data, "x", ValueRange.of_bits(12))
        assert np.asarray(image)[0, :, 0].tolist() == values

    @pytest.mark.parametrize("kind", ["png", "ppm", "tiff"])
    def test_colours_of_16_bits(self, kind: str) -> None:
        cv2 = pytest.importorskip("cv2")
        colours = np.array([[[4095, 0, 2048]]], np.uint16)  # blue, green, red
        data = cv2.imencode(f".{kind}", colours)[1].tobytes()
        assert np.asarray(decode_image(data, "x", ValueRange.of_bits(12)))[0, 0].tolist() == [128, 0, 255]
        found = sample_values(data, "x")
        assert found is not None
        assert (found[0].max(), found[1]) == (4095, ValueRange.of_bits(16))

    def test_transparency_has_a_range_of_its_own(self) -> None:
        cv2 = pytest.importorskip("cv2")
        colours = np.array([[[4095, 0, 0, 65535], [0, 0, 0, 0]]], np.uint16)
        image = decode_image(cv2.imencode(".png", colours)[1].tobytes(), "x", ValueRange.of_bits(12))
        assert np.asarray(image)[0].tolist() == [[0, 0, 255], [255, 255, 255]]

    def test_levels_of_8_bits_are_known_without_decoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encode(Image.new("RGB", (4, 4)), "JPEG")
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)
        assert sample_values(data, "x") is None

    def test_samples_are_spread_and_keep_the_unit_of_the_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(value_range, "_SAMPLE", 100)
        monkeypatch.setattr(value_range, "_BAND", 256)
        values = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
        found = sample_values(encode(Image.fromarray(values), "TIFF"), "x")
        assert found is not None
        assert (found[0].tolist(), found[1]) == (values[::7, ::7].ravel().tolist(), None)
        found = sample_values(b"P5 2 1 4095\n" + np.array([7, 4095], ">u2").tobytes(), "x")
        assert found is not None
        assert np.allclose(found[0], [7, 4095], atol=0.1)
        assert found[1] == ValueRange(0, 4095)


class TestTiffKinds:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int64])
    def test_kinds_that_pillow_has_no_mode_for(self, dtype: type, channels: int) -> None:
        top = 1 if np.dtype(dtype).kind == "f" else 255
        values = np.linspace(0, top, 6 * 8).reshape(6, 8, 1).astype(dtype) * np.ones(channels, dtype)
        if channels == 4:
            values[..., 3] = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
        data = encode_tiff(values[..., 0] if channels == 1 else values, compression="zlib")
        expected = np.rint(values[..., :1].astype(float) * 255 / top)
        assert np.abs(pixels(data) - expected).max() <= 1
        assert read_image_size(data, "x") == (6, 8)

    @pytest.mark.parametrize(("dtype", "top"), [(np.float32, 1), (np.uint16, 4095)])
    def test_red_stays_red_and_orientation_counts(self, dtype: type, top: int) -> None:
        values = np.zeros((2, 3, 3), dtype)
        values[0, 0] = top, top / 2, 0
        for orientation, place in ((1, (0, 0)), (3, (1, 2)), (6, (0, 1)), (8, (2, 0))):
            data = encode_tiff(values, extratags=[(274, "H", 1, orientation, True)])
            image = decode_image(data, "x", ValueRange(0, top))
            assert read_image_size(data, "x") == image.size[::-1] == ((3, 2) if orientation > 4 else (2, 3))
            assert np.asarray(image)[place].tolist() == [255, 128 if top == 1 else 127, 0]

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            (np.zeros((4, 4), np.float16), {}, "1 channel.* of 16-bit floating-point numbers, .* cannot be read; save"),
            (np.zeros((4, 4, 5), np.uint8), {}, "5 channel.* of 8-bit unsigned integers"),
            (np.zeros((4, 4, 2), np.uint16), {}, "2 channel.* of 16-bit unsigned integers"),
            (np.zeros((4, 4), np.complex64), {}, "64-bit complex numbers"),
            (
                np.zeros((3, 4, 4), np.float32),
                {"photometric": "rgb", "planarconfig": "separate"},
                "separate colour planes",
            ),
        ],
    )
    def test_others_are_refused_by_name(self, values: np.ndarray, options: dict[str, object], message: str) -> None:
        for read in (decode_image, decode_values, read_image_size, sample_values):
            with pytest.raises(UnreadableImageError, match=message):
                read(encode_tiff(values, **options), "x")

    def test_masks_of_64_bits_keep_their_values(self) -> None:
        mask = decode_values(encode_tiff(np.array([[0, 3, 255]], np.int64)), "x")
        assert (mask.mode, np.asarray(mask).tolist()) == ("I", [[0, 3, 255]])
        depth = decode_values(encode_tiff(np.array([[0.5, np.nan]], np.float64)), "x")
        assert depth.mode == "F"


class TestInMemory:
    """Arrays and tensors give the pixels that a file with their values gives."""

    @pytest.mark.parametrize(
        "array",
        [
            np.arange(12, dtype=np.uint8).reshape(3, 4) * 20,
            np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000,
            np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
            np.linspace(0, 255, 12).reshape(3, 4),
            np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7,
            np.arange(48, dtype=np.uint8).reshape(3, 4, 4) * 5,
            np.linspace(0, 1, 36, dtype=np.float32).reshape(3, 4, 3),
        ],
    )
    @pytest.mark.parametrize("span", [None, ValueRange(0, 2)])
    def test_arrays_tensors_and_files_agree(self, array: np.ndarray, span: ValueRange | None) -> None:
        expected = np.asarray(decode_image(encode_tiff(array), "x", span))
        channels_first = torch.from_numpy(array if array.ndim == 2 else array.transpose(2, 0, 1).copy())
        with_channel = array[..., None] if array.ndim == 2 else array
        for given in (array, array.astype(array.dtype.newbyteorder()), channels_first, with_channel):
            image = to_upright_rgb(given, span)
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), expected)

    def test_bool_is_black_and_white_and_a_turned_view_is_read_as_it_looks(self) -> None:
        array = np.array([[True, False]])
        assert np.asarray(to_upright_rgb(array))[0, :, 0].tolist() == [255, 0]
        assert np.asarray(to_upright_rgb(torch.from_numpy(array)))[0, :, 0].tolist() == [255, 0]
        assert np.asarray(to_upright_rgb(np.eye(3, dtype=np.uint8)[:, ::-1])).shape == (3, 3, 3)
        assert np.asarray(to_upright_rgb(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)))[0, 1, 0] == 255

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.zeros((3, 4, 5), np.uint8), r"\[H, W, C\] of numbers, .* found uint8 \[3, 4, 5\]"),
            (np.zeros(5), r"found float64 \[5\]"),
            (np.zeros((0, 4)), r"found float64 \[0, 4\]"),
            (np.array([["a"]]), r"found <U1 \[1, 1\]"),
            (torch.zeros(5, 4, 6), r"\[C, H, W\] of numbers, .* found torch.float32 \[5, 4, 6\]"),
        ],
    )
    def test_what_is_no_image(self, image: np.ndarray | torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            to_upright_rgb(image)

    def test_colours_that_pillow_has_cut_have_no_range(self) -> None:
        cv2 = pytest.importorskip("cv2")
        data = cv2.imencode(".png", np.full((2, 2, 3), 4095, np.uint16))[1].tobytes()
        assert np.asarray(to_upright_rgb(Image.open(io.BytesIO(data)))).max() == 15
        with pytest.raises(ValueError, match="give the file or an array"):
            to_upright_rgb(Image.open(io.BytesIO(data)), ValueRange.of_bits(12))


class TestColour:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI"])
    def test_rgb_is_kept(self, kind: str) -> None:
        colours = np.array([[[255, 0, 0], [0, 255, 0], [1, 2, 3]]], np.uint8)
        assert (pixels(encode(Image.fromarray(colours), kind)) == colours).all()

    def test_transparency_lies_on_white(self) -> None:
        alpha = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128]]], np.uint8))
        rgb = Image.fromarray(np.array([[[9, 9, 9], [10, 20, 30]]], np.uint8))
        level = Image.fromarray(np.array([[9, 10]], np.uint8))
        grey_alpha = Image.fromarray(np.array([[[0, 0], [0, 255], [100, 255]]], np.uint8), "LA")
        red, white = [255, 0, 0], [255, 255, 255]
        for data, expected in (
            (encode(alpha, "PNG"), [red, white, [127, 127, 127]]),
            (encode(palette_image(), "PNG"), [red, [0, 0, 255]]),
            (encode(palette_image(), "PNG", transparency=1), [red, white]),
            (encode(palette_image(), "PNG", transparency=b"\xff\x00"), [red, white]),
            (encode(palette_image(), "GIF", transparency=1), [red, white]),
            (encode(rgb, "PNG", transparency=(10, 20, 30)), [[9, 9, 9], white]),
            (encode(level, "PNG", transparency=10), [[9, 9, 9], white]),
            (encode(grey_alpha, "PNG"), [white, [0, 0, 0], [100, 100, 100]]),
        ):
            assert pixels(data)[0].tolist() == expected

    @pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
    def test_cmyk(self, kind: str) -> None:
        """Full cyan is cyan, no ink is white, black ink is black; Pillow writes JPEGs inverted, as Adobe does."""
        for ink, colour in (((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 0), (255,) * 3), ((0, 0, 0, 255), (0,) * 3)):
            data = encode(Image.new("CMYK", (16, 16), ink), kind)
            assert Image.open(io.BytesIO(data)).mode == "CMYK"
            assert np.abs(pixels(data).astype(int) - colour).max() <= 2

    def test_ycbcr_and_lab(self) -> None:
        image = Image.new("RGB", (8, 8), (200, 30, 60)).convert("YCbCr")
        assert np.abs(pixels(encode(image, "TIFF")).astype(int) - (200, 30, 60)).max() <= 2
        decoded = pixels(encode(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF")).astype(int)
        assert np.abs(decoded - 255).max() <= 3

    def test_16_bit_rgb_png(self) -> None:
        cv2 = pytest.importorskip("cv2")
        colours = np.array([[[65535, 0, 32768]]], np.uint16)  # blue, green, red
        assert pixels(cv2.imencode(".png", colours)[1].tobytes())[0].tolist() == [[128, 0, 255]]

    def test_16_bit_rgb_and_unsigned_32_bit_tiff(self) -> None:
        tifffile = pytest.importorskip("tifffile")
        levels = io.BytesIO()
        tifffile.imwrite(levels, np.array([[0, 2**31, 2**32 - 1]], np.uint32))
        assert grey(levels.getvalue()) == [0, 128, 255], "beyond the signed range"
        colours = np.full((2, 3, 3), 40_000, np.uint16)
        interleaved, planes = io.BytesIO(), io.BytesIO()
        tifffile.imwrite(interleaved, colours, photometric="rgb")
        tifffile.imwrite(planes, colours.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
        assert (pixels(interleaved.getvalue()) == 156).all()
        with pytest.raises(UnreadableImageError, match="separate colour planes"):
            decode_image(planes.getvalue(), "x")


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_every_orientation_gives_the_upright_image(self, orientation: int, kind: str) -> None:
        """Stored as the camera would for each orientation, the image comes out the same."""
        upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.T,
            6: np.rot90(upright),
            7: upright[::-1, ::-1].T,
            8: np.rot90(upright, -1),
        }[orientation]
        data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=oriented(orientation))
        assert pixels(data)[..., 0].tolist() == upright.tolist()

    def test_the_result_carries_no_orientation_and_damaged_exif_loses_no_image(self) -> None:
        image = decode_image(encode(Image.new("RGB", (4, 2)), "JPEG", exif=oriented(6)), "x")
        assert image.size == (2, 4)
        assert 0x0112 not in image.getexif()
        data = encode(Image.new("L", (4, 2), 7), "PNG", exif=b"Exif\0\0not a TIFF header")
        assert grey(data) == [7] * 8


class TestDamage:
    def test_what_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        for path, message in (
            (tmp_path / "absent.png", r"absent\.png: no such file"),
            (tmp_path, "it is a folder"),
            (tmp_path / "a.png", r"a\.png: the file is empty"),
            ("a\0b", "null"),
        ):
            with pytest.raises(UnreadableImageError, match=message):
                load_image(path)

    @pytest.mark.parametrize(
        "data", [b"", b"<html>not found</html>", b"\0" * 1000, bytes(range(64)), b"%!PS-Adobe-3.0 EPSF"]
    )
    def test_no_image(self, data: bytes) -> None:
        for read in (decode_image, decode_values, read_image_size):
            with pytest.raises(UnreadableImageError, match=r"cannot read image page\.jpg"):
                read(data, "page.jpg")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "GIF"])
    @pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
    def test_truncated_images_are_refused_not_filled_up(self, kind: str, share: float) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
        data = encode(Image.fromarray(noise), kind)
        decode_image(data, "whole")
        with pytest.raises(UnreadableImageError, match="cannot read image cut"):
            decode_image(data[: int(len(data) * share)], "cut")
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0}])
    def test_a_jpeg_may_lack_its_end_marker_and_no_row(
        self, options: dict[str, object], caplog: pytest.LogCaptureFixture
    ) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        data = encode(Image.fromarray(noise), "JPEG", **options)
        for cut in (data[:-1], data[:-2], data[:-2] + bytes(35)):
            assert (pixels(cut) == pixels(data)).all()
        assert sum("lacks its end marker" in record.message for record in caplog.records) == 1
        starts = list(range(20, len(data) - 4, 97))
        restarts = [place for place in range(len(data) - 1) if data[place] == 255 and 0xD0 <= data[place + 1] < 0xD8]
        scans = [place for place in range(200, len(data) - 1) if data[place : place + 2] == b"\xff\xda"]
        for place in starts + restarts[:20] + restarts[-5:] + scans:
            with pytest.raises(UnreadableImageError):
                decode_image(data[:place], "cut")

    @pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
    def test_flipped_bytes_raise_nothing_else(self, kind: str) -> None:
        rng = np.random.default_rng(1)
        data = encode(Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                damaged[place] = rng.integers(256)
            with contextlib.suppress(UnreadableImageError):
                assert decode_image(bytes(damaged), "damaged").mode == "RGB"


class TestSize:
    def test_pillows_limit_does_not_count_and_stays_and_ours_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        data = encode(Image.new("L", (100, 100), 5), "PNG")
        assert decode_image(data, "x").size == (100, 100)
        assert Image.MAX_IMAGE_PIXELS == 100
        assert decoding.MAX_PIXELS > 20_000 * 20_000
        monkeypatch.setattr(decoding, "MAX_PIXELS", 9_999)
        with pytest.raises(UnreadableImageError, match="10000 pixels are more than the limit of 9999"):
            decode_image(data, "bomb")

    def test_the_bytes_of_decoding_are_limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grey, colour = encode(Image.new("L", (100, 100)), "PNG"), encode(Image.new("RGB", (100, 100)), "PNG")
        values = encode(Image.new("F", (100, 100)), "TIFF")
        monkeypatch.setattr(decoding, "MAX_BYTES", 70_000)
        assert decode_image(grey, "x").size == (100, 100)
        for bomb in (colour, values, encode_tiff(np.zeros((100, 100, 3)))):
            for read in (decode_image, decode_values) if bomb is values else (decode_image,):
                with pytest.raises(UnreadableImageError, match=r"100x100 pixels take 0.00 GiB .*MAX_BYTES"):
                    read(bomb, "bomb")

    def test_a_jpeg_past_the_limit_is_not_decoded_to_look_for_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "MAX_PIXELS", 9_999)
        monkeypatch.setattr(decoding, "with_end_marker", lambda data: pytest.fail("it was decoded"))
        with pytest.raises(UnreadableImageError, match="MAX_PIXELS"):
            decode_image(encode(Image.new("RGB", (100, 100)), "JPEG")[:-2], "bomb")

    def test_a_png_is_not_decoded_for_its_orientation_past_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encode(Image.new("RGB", (100, 100)), "PNG", exif=oriented(6))
        monkeypatch.setattr(decoding, "MAX_BYTES", 70_000)
        with pytest.raises(UnreadableImageError, match="MAX_BYTES"):
            read_image_size(data, "bomb")

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
    def test_values_are_converted_by_rows(self, dtype: type) -> None:
        data = encode(Image.fromarray(np.zeros((2000, 1500), dtype)), "TIFF", compression="tiff_deflate")
        tracemalloc.start()
        decode_image(data, "x")
        peak = tracemalloc.get_traced_memory()[1]  # of arrays and bytes; the image itself is Pillow's
        tracemalloc.stop()
        assert peak < 5 * 2000 * 1500

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F", "LAB", "P"])
    def test_rows_at_once_change_no_pixel(self, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (31, 7, 4), dtype=np.uint8)
        image = Image.fromarray(noise)
        if mode in ("I;16", "F"):
            image = Image.fromarray(noise[..., 0].astype({"I;16": np.uint16, "F": np.float32}[mode]))
        elif mode == "LAB":
            image = Image.frombytes("LAB", (7, 31), noise[..., :3].tobytes())
        elif mode != "RGBA":
            image = image.convert(mode)
        data = encode(image, "TIFF") if mode != "P" else encode(image, "PNG", transparency=3)
        whole = pixels(data)
        monkeypatch.setattr(value_range, "_BAND", 20)
        assert (pixels(data) == whole).all()


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


def test_values_are_upright_too() -> None:
    data = encode(Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8)), "PNG", exif=oriented(6))
    assert np.asarray(decode_values(data, "x")).tolist() == [[4, 1], [5, 2], [6, 3]]


class TestHeader:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "GIF"])
    @pytest.mark.parametrize("orientation", [1, 4, 5, 6])
    def test_size_is_that_of_the_decoded_image(self, kind: str, orientation: int) -> None:
        data = encode(Image.new("RGB", (5, 3)), kind, exif=oriented(orientation))
        assert read_image_size(data, "x") == decode_image(data, "x").size[::-1]

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
    def test_no_pixel_is_decoded(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        data = encode(Image.new("L", (48, 64)), kind)

        def load(image: Image.Image) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", load)
        assert read_image_size(data, "x") == (64, 48)

    def test_orientation_at_the_end_of_a_png_counts(self) -> None:
        data = encode(Image.new("L", (5, 3)), "PNG", exif=oriented(6))
        start = data.index(b"eXIf") - 4
        length = 12 + int.from_bytes(data[start : start + 4], "big")
        chunk, end = data[start : start + length], data.index(b"IEND") - 4
        moved = data[:start] + data[start + length : end] + chunk + data[end:]
        assert moved.index(b"eXIf") > moved.index(b"IDAT")
        assert read_image_size(moved, "x") == decode_image(moved, "x").size[::-1] == (5, 3)


BYTES = np.array([[0, 1, 128, 255]], dtype=np.uint8)


class TestLevels:
    """`decode_levels`, which keeps 16 bits."""

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bits_stay_and_8_bits_stay(self, kind: str) -> None:
        for image in (LEVELS_16, BYTES, np.dstack([BYTES, BYTES, BYTES // 2])):
            found = decode_levels(encode(Image.fromarray(image), kind), "a")
            assert (found.dtype, found.tolist()) == (image.dtype, image.tolist())
        cv2 = pytest.importorskip("cv2")
        colours = np.array([[[4095, 0, 2048]]], np.uint16)  # blue, green, red
        data = cv2.imencode(f".{kind.lower()}", colours)[1].tobytes()
        assert decode_levels(data, "a").tolist() == [[[2048, 0, 4095]]]

    def test_a_range_spans_16_bits(self) -> None:
        data = encode(Image.fromarray(np.array([[0, 2048, 4095, 5000]], np.uint16)), "PNG")
        assert decode_levels(data, "a", ValueRange(0, 4095)).tolist() == [[0, 32776, 65535, 65535]]
        numbers = encode(Image.fromarray(np.array([[-1, 0, 1, np.nan]], np.float32)), "TIFF")
        assert decode_levels(numbers, "a", ValueRange(-1, 1)).tolist() == [[0, 32768, 65535, 0]]
        with pytest.raises(UnreadableImageError, match=r"cannot read image a: .*which values are black and white"):
            decode_levels(numbers, "a")

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_it_is_turned_as_its_8_bits_are(self, orientation: int) -> None:
        grey = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000
        for image in (grey, np.dstack([grey // 257] * 3).astype(np.uint8)):
            data = encode(Image.fromarray(image), "PNG", exif=oriented(orientation))
            levels = decode_levels(data, "a")
            rgb = np.asarray(decode_image(data, "a"))
            expected = rgb[..., 0] if levels.ndim == 2 else rgb
            assert (np.rint(levels / (np.iinfo(levels.dtype).max / 255)) == expected).all()
