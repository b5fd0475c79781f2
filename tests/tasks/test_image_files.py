"""Images are decoded from the listed formats only, within bounds, and composited on white."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from maml_jax.tasks import image_files
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.image_files import decode


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def drawing(ink, alpha):
    """An image in which all pixels have the grey value `ink`, and the drawing is in the alpha channel."""
    grey = np.full_like(alpha, ink)
    return Image.fromarray(np.stack([grey, grey, grey, alpha], -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_drawings_in_the_alpha_channel_are_composited_on_white(mode):
    for alpha in np.random.default_rng(0).integers(0, 256, (2, 5, 4), np.uint8):
        if mode == "P":  # A palette of black colours, each with its own transparency.
            indices = Image.fromarray(np.arange(20, dtype=np.uint8).reshape(5, 4), "P")
            indices.putpalette(bytes(60))
            content = saved(indices, transparency=alpha.tobytes())
        else:
            content = saved(drawing(0, alpha).convert(mode))
        found = np.asarray(decode(content, "a.png", "here"))
        np.testing.assert_array_equal(found, (255 - alpha)[..., None].repeat(3, 2))


def test_one_transparent_colour_becomes_white():
    pixels = np.array([[0, 1, 2]], np.uint8)
    for image, transparent in (
        (Image.fromarray(pixels), 1),
        (Image.fromarray(pixels.astype(np.uint16) * 257), 257),
        (Image.fromarray(pixels[..., None].repeat(3, 2)), (1, 1, 1)),
    ):
        found = np.asarray(decode(saved(image, transparency=transparent), "a.png", "here"))
        assert found[0, :, 0].tolist() == [0, 255, 2]


def test_opaque_pixels_keep_their_values_and_white_drawings_raise():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    opaque = Image.fromarray(np.concatenate([pixels, np.full((5, 4, 1), 255, np.uint8)], -1))
    np.testing.assert_array_equal(np.asarray(decode(saved(opaque), "a.png", "here")), pixels)
    alpha = np.arange(20, dtype=np.uint8).reshape(5, 4)
    with pytest.raises(DataError, match=r"a.png in here is white on a transparent background"):
        decode(saved(drawing(255, alpha)), "a.png", "here")
    assert decode(saved(drawing(255, alpha * 0)), "a.png", "here").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "TGA"])
def test_every_listed_format_is_decoded(kind):
    image = Image.new("RGB", (8, 6), (200, 40, 90))
    found = np.asarray(decode(saved(image, kind), f"a.{kind.lower()}", "here"))
    assert found.shape == (6, 8, 3) and np.abs(found.astype(int) - np.asarray(image)).max() < 8


def test_postscript_starts_no_program(monkeypatch):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "EPS"  # Pillow reads this file by Ghostscript.
    for module in ("subprocess.Popen", "subprocess.check_call"):
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("A program was started."))
    with pytest.raises(DataError, match=r"x.png in here is damaged, or has none of the formats JPEG, PNG") as error:
        decode(content, "x.png", "here")
    assert "BytesIO" not in str(error.value)


def bomb(side):
    """A PNG of a few bytes with a header of `side` rows and columns."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 3, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"PLTE", bytes(3)), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize("side", [8193, 9500, 20_000])
def test_large_images_are_refused_before_decoding(side, monkeypatch):
    """Below the limits of Pillow, above the limit of its warning, and above the limit of its error."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("The image is decoded."))
    with pytest.raises(DataError, match=r"x.png in here is refused: .* at most 67,108,864 pixels"):
        decode(bomb(side), "x.png", "here")


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(image_files, "PARALLEL_IMAGE", 10)
    together, most, lock = [0], [0], threading.Lock()
    arrived, convert = threading.Event(), Image.Image.convert

    def slow(image, mode):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        arrived.wait(0.05)
        with lock:
            together[0] -= 1
        return convert(image, mode)

    content = saved(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(Image.Image, "convert", slow)
    threads = [threading.Thread(target=decode, args=(content, "a.png", "here")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_damaged_images_are_named():
    content = saved(Image.new("RGB", (40, 40)), "PNG")
    for damaged in (content[:60], b"no image", b""):
        with pytest.raises(DataError, match=r"The image a/x.png in here is damaged"):
            decode(damaged, "a/x.png", "here")
    with pytest.raises(DataError, match="pixels of 32 bits"):
        decode(saved(Image.fromarray(np.zeros((3, 3), np.float32)), "TIFF"), "x.tif", "here")
