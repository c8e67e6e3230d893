from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tes.data.images import UnreadableImageError, decode, depth, depth_notes


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image = decode(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(content: bytes) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        decode(content)
    return caught.value.reason


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def test_a_photo_on_its_side_is_put_upright(noise):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(noise, "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(turned), np.rot90(np.asarray(noise), k=-1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_matter(noise):
    assert decode(encoded(noise, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (64, 48)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBA", "LA"])
def test_every_colour_mode_becomes_rgb(noise, mode):
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert pixels(encoded(noise.convert(mode), kind)).shape == (48, 64, 3)


def test_a_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    np.testing.assert_allclose(pixels(encoded(red.convert("CMYK"), "JPEG"))[8, 8], (200, 30, 40), atol=8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    assert (pixels(encoded(image, "PNG")) == 255).all()


def test_a_palette_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((0, 0), 0)
    found = pixels(encoded(image, "PNG", transparency=0))
    assert tuple(found[0, 0]) == (255, 255, 255)
    assert tuple(found[1, 1]) == (200, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(ramp), kind))[..., 0].ravel(), np.arange(256))


def test_thirty_two_bit_integers_and_floats_are_scaled_by_their_range():
    ramp = np.arange(256).reshape(16, 16)
    for values in (ramp.astype(np.int32), (ramp * 257).astype(np.int32), (ramp / 255).astype(np.float32)):
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(values), "TIFF"))[..., 0], ramp)


def test_floats_that_are_no_numbers_are_black():
    values = np.array([[np.nan, np.inf], [-1.0, 1.0]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[..., 0].tolist() == [[0, 0], [0, 255]]


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = pixels(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert tuple(found[4, 4]) == (255, 0, 0)


def test_a_hint_makes_a_jpeg_smaller_but_never_below_it():
    content = encoded(Image.new("RGB", (800, 600)), "JPEG")
    assert decode(content, max_side_hint=100).size == (200, 150)
    assert decode(content, max_side_hint=1000).size == (800, 600)


def test_what_is_no_image_says_so():
    assert reason(b"") == "empty file"
    assert reason(b"hello, I am a text\n" * 9) == "not an image"
    assert "git lfs pull" in reason(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_truncated_file_is_unreadable(noise, kind):
    content = encoded(noise, kind)
    assert reason(content[: len(content) // 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncation_is_called_by_its_name(noise, kind):
    content = encoded(noise, kind)
    assert reason(content[: len(content) // 2]) == "truncated file"


def test_a_damaged_png_is_unreadable(noise):
    content = bytearray(encoded(noise, "PNG"))
    content[60:90] = bytes(30)
    assert reason(bytes(content))


def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    assert reason(content) == "more than 178 million pixels"


def test_a_line_of_pixels_is_no_photo():
    assert reason(encoded(Image.new("RGB", (5000, 2)), "PNG")) == "5000 x 2 pixels is too narrow"
    assert decode(encoded(Image.new("RGB", (1, 1)), "PNG")).size == (1, 1)


def test_a_heic_photo_is_named_with_what_to_install():
    assert "`pillow-heif`" in reason(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))


def test_a_postscript_file_is_not_run_whatever_its_name():
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "not an image"


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImageError("truncated file")))
    assert error.reason == "truncated file"
    assert str(error) == "The image cannot be read: truncated file."


def test_deep_images_that_would_look_black_or_uneven_are_said_to():
    def notes(*arrays):
        return depth_notes([depth(encoded(Image.fromarray(values), "TIFF")) for values in arrays])

    twelve_bits = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    assert "the brightest value of 2 looked at is 4095 of 65535" in notes(twelve_bits, twelve_bits // 2)[0]
    assert notes(twelve_bits, twelve_bits * 15) == []  # one dark image among brighter ones is a dark image
    signed = np.arange(-1000, 1000, dtype=np.int32).reshape(40, 50)
    assert any("negative values" in note for note in notes(signed))
    floats = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert notes(floats) == [] and "differs from one to the next (1 to 255)" in notes(floats, floats * 1.2)[0]
    assert depth(encoded(Image.new("RGB", (4, 4)), "PNG")) is None and depth(b"nothing") is None
