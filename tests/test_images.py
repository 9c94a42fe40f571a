"""Odd files and arrays: colour keys, damaged metadata, orientations, high ranges."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest

from latemax.encoders.images import load_image

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
WHITE = [255, 255, 255]
PICTURE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def pixels(image) -> np.ndarray:
    return np.asarray(load_image(image))


def test_a_colour_key_is_laid_over_white(tmp_path):
    path = tmp_path / "key.png"
    rgb = np.full((1, 2, 3), (10, 20, 30), np.uint8)
    rgb[0, 1] = (200, 100, 50)
    Image.fromarray(rgb).save(path, transparency=(10, 20, 30))
    assert pixels(path)[0].tolist() == [WHITE, [200, 100, 50]]
    grey = np.array([[7, 9]], np.uint8)
    Image.fromarray(grey).save(path, transparency=7)
    assert pixels(path)[0].tolist() == [WHITE, [9, 9, 9]]
    deep = np.array([[257 * 7, 257 * 9]], np.uint16)
    Image.fromarray(deep).save(path, transparency=257 * 7)
    assert pixels(path)[0].tolist() == [WHITE, [9, 9, 9]]
    palette = Image.fromarray(grey, "P")
    palette.putpalette([1, 2, 3] * 256)
    palette.save(path, transparency=7)
    assert pixels(path)[0].tolist() == [WHITE, [1, 2, 3]]
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    bits.save(path, transparency=0)
    assert pixels(path)[0].tolist() == [WHITE, WHITE]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_colour_key_of_sixteen_bits_a_channel(tmp_path):
    import zlib

    # Pillow writes no 16-bit RGB: 1x2 pixels, the first of the key's colour.
    row = b"\0" + struct.pack(">6H", 257 * 10, 257 * 20, 257 * 30, 257 * 40, 257 * 50, 257 * 60)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    content += png_chunk(b"tRNS", struct.pack(">3H", 257 * 10, 257 * 20, 257 * 30))
    content += png_chunk(b"IDAT", zlib.compress(row)) + png_chunk(b"IEND", b"")
    path = tmp_path / "deep.png"
    path.write_bytes(content)
    assert pixels(path)[0].tolist() == [WHITE, [40, 50, 60]]
    with Image.open(path) as image:
        assert pixels(image)[0].tolist() == [WHITE, [40, 50, 60]]


def exif_block(orientation: int) -> bytes:
    """A turned image whose resolution unit, an integer, holds text."""
    entries = struct.pack("<IHHHIHHHHI4sI", 8, 2, 0x112, 3, 1, orientation, 0, 0x128, 2, 2, b"ab\0\0", 0)
    return b"Exif\0\0II*\0" + entries


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_bad_tag_does_not_hide_the_orientation(tmp_path, ending):
    path = tmp_path / f"turned.{ending}"
    Image.fromarray(PICTURE[:6]).save(path, exif=exif_block(6))
    assert load_image(path).size == (6, 8)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_damaged_metadata_is_ignored_with_a_warning(tmp_path, ending):
    path = tmp_path / f"damaged.{ending}"
    Image.fromarray(PICTURE).save(path, exif=b"Exif\0\0" + b"\xff" * 9)
    with pytest.warns(UserWarning, match=rf"image \(.*damaged.{ending}\): unreadable EXIF data"):
        assert load_image(path).size == (8, 8)


@pytest.mark.parametrize("orientation", range(0, 10))
def test_every_orientation_is_turned_as_pillow_does_and_only_once(tmp_path, orientation):
    from PIL import ImageOps

    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PICTURE[:6]).save(path, exif=exif)
    with Image.open(path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    once = load_image(path)
    assert np.array_equal(np.asarray(once), expected)
    assert np.array_equal(pixels(once), expected)


def test_the_callers_image_is_left_as_it_was(tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PICTURE[:6]).save(path, exif=exif)
    with Image.open(path) as file:
        load_image(file)
        assert file.size == (8, 6) and "exif" in file.info
        assert load_image(file).size == (6, 8)


def test_thirty_two_bit_grey_of_eight_bit_values_is_refused(tmp_path):
    for high in (1, 200, 255):
        values = np.array([[0, high]], np.int32)
        with pytest.raises(ValueError, match=f"32-bit grey of 0 to {high} may be 8-bit or dark 16-bit values"):
            load_image(Image.fromarray(values))
        path = tmp_path / "grey.tiff"
        Image.fromarray(values).save(path)
        with pytest.raises(ValueError, match=r"grey.tiff\): 32-bit grey"):
            load_image(path)
    assert (pixels(Image.fromarray(np.zeros((1, 2), np.int32))) == 0).all()
    assert pixels(Image.fromarray(np.array([[0, 256]], np.int32)))[0, 1].tolist() == [1, 1, 1]
    # A file of 16-bit grey says so, also where it is dark.
    dark = tmp_path / "dark.png"
    Image.fromarray(np.array([[0, 255]], np.uint16)).save(dark)
    assert pixels(dark)[0, 1].tolist() == [1, 1, 1]


def test_whole_images_load_without_warnings(tmp_path):
    path = tmp_path / "plain.png"
    Image.fromarray(PICTURE).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(path), PICTURE)
