"""Decodes image files, with bounds on their size.

Pillow decodes only the listed formats. Other decoders of Pillow are not called, because some of these start programs:
the decoder of PostScript starts Ghostscript.
"""

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from maml_jax.tasks.cache import DataError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF")
"""Formats that are recognised by content, as Pillow names them. TGA is recognised by the ending of the name."""
LARGEST_IMAGE = 1 << 26
"""Pixels of the largest image that is decoded, 67 million."""
PARALLEL_IMAGE = 1 << 24
"""Pixels of the largest image that is decoded while other threads decode images. An image of this size takes about
0.2 GB of memory."""

_opening, _large = threading.Lock(), threading.Lock()


@contextlib.contextmanager
def open_image(content: bytes, where: str, formats: tuple[str, ...], largest: int = LARGEST_IMAGE) -> Iterator[Any]:
    """Opens an image with Pillow. The pixels are decoded inside the `with` block, after the size is checked.

    Args:
      content: the content of the file.
      where: the name of the image in error messages.
      formats: the formats to try, such as `FORMATS`.
      largest: pixels of the largest image.

    Yields:
      The `PIL.Image.Image`.

    Raises:
      DataError: if the file has another format or too many pixels, or is damaged. Damage that is found inside the
        `with` block also raises DataError.
    """
    from PIL import Image, UnidentifiedImageError

    with contextlib.ExitStack() as stack:
        try:
            # Pillow warns about large images. The filters of warnings belong to the process, so one thread sets them.
            with _opening, warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = stack.enter_context(Image.open(io.BytesIO(content), formats=formats))
            if (pixels := image.width * image.height) > largest:
                raise DataError(
                    f"The image {where} is refused: it has {image.width:,} x {image.height:,} pixels, but at most "
                    f"{largest:,} pixels are decoded. Make the image smaller first."
                )
            if pixels > PARALLEL_IMAGE:
                stack.enter_context(_large)
            yield image
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(
                f"The image {where} is refused: {str(error).rstrip('.')}; at most {largest:,} pixels are decoded. Make "
                "the image smaller first."
            ) from error
        except UnidentifiedImageError as error:
            raise DataError(
                f"The image {where} is damaged, or has none of the formats {', '.join(formats)}. Convert an image of "
                "another format to PNG or JPEG."
            ) from error
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            raise DataError(f"The image {where} is damaged or cannot be read ({error}).") from error


def decode(content: bytes, name: str, where: str) -> Any:
    """Decodes an image as RGB. Transparent pixels are composited on white. The orientation in EXIF data is applied.

    Args:
      content: the content of the file.
      name: the path of the file.
      where: the folder or archive of the file, for error messages.

    Returns:
      A `PIL.Image.Image` of mode RGB.

    Raises:
      DataError: if the file is damaged or too large, has another format or pixels of 32 bits, or if it has transparent
        pixels and is white everywhere else; the message names the file.

    Example:
      >>> from PIL import Image
      >>> file = io.BytesIO()
      >>> Image.new("RGBA", (2, 1), (0, 0, 0, 0)).save(file, "PNG")
      >>> decode(file.getvalue(), "clear.png", "folder").getpixel((0, 0))
      (255, 255, 255)
    """
    formats = (*FORMATS, "TGA") if name.lower().endswith(".tga") else FORMATS
    with open_image(content, f"{name} in {where}", formats) as opened:
        image = _rotate_upright(opened)
        if image.mode.startswith("I;16"):
            return _from_16_bits(image)
        if image.mode in ("I", "F"):
            raise DataError(
                f"The image {name} in {where} has pixels of 32 bits, for which the value of white is unknown. Convert "
                "the image to 8 bits first."
            )
        if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            return _on_white(image.convert("RGBA"), f"{name} in {where}")
        return image.convert("RGB")


def resize(image: Any, size: int, resampling: str) -> np.ndarray:
    """Returns the pixels of an RGB image, uint8 `[size, size, 3]`. The aspect ratio may change.

    Args:
      image: a `PIL.Image.Image`, or uint8 `[H, W, 3]`.
      size: height and width in pixels.
      resampling: a filter of Pillow in lower case, such as 'lanczos'.
    """
    from PIL import Image

    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if image.size == (size, size):
        return np.asarray(image)
    return np.asarray(image.resize((size, size), Image.Resampling[resampling.upper()]))


def _on_white(image: Any, where: str) -> Any:
    from PIL import Image

    alpha = image.getchannel("A")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=alpha)
    lowest, highest = alpha.getextrema()
    if lowest < highest and opaque.getcolors(1) == [(image.width * image.height, (255, 255, 255))]:
        raise DataError(
            f"The image {where} is white on a transparent background, so that nothing of it is left on white. Give "
            "the images a dark background first."
        )
    return opaque


def _from_16_bits(image: Any) -> Any:
    """Keeps the upper 8 of 16 bits of grey."""
    from PIL import Image

    grey = np.asarray(image)
    upper = (grey >> 8).astype(np.uint8)
    if "transparency" in image.info:  # The value of the transparent pixels.
        upper = np.where(grey == image.info["transparency"], np.uint8(255), upper)
    return Image.fromarray(upper).convert("RGB")


def _rotate_upright(image: Any) -> Any:
    """Applies the orientation in the EXIF data. Without a readable orientation the image is returned unchanged."""
    from PIL import Image

    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # Damaged EXIF data are ignored: the pixels are intact.
        orientation = None
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
             6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image
