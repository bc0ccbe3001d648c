"""Encoded pictures to square uint8 images, by the paper's rule."""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

LARGEST_PICTURE = 178_956_970  # pixels: where Pillow refuses a picture; half of that it warns at
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DecodeError(ValueError):
    """Bytes that are not a picture that can be read; the message says why."""


def decode(encoded: bytes, size: int) -> np.ndarray:
    """A picture in any usual format to uint8[size, size, 3], RGB.

    The shorter side is brought to `size` and the central square cut out (section 2 of the paper);
    a picture that is `size` × `size` already keeps its pixels. Grey and CMYK become RGB, and
    transparency is dropped; the EXIF orientation is not applied, as the original code did not.

    Raises:
      DecodeError: the bytes are truncated, damaged, no picture, or one of more than
        `LARGEST_PICTURE` pixels.
    """
    return to_square(_pixels(encoded), size)


def to_square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[h, w, 3] to uint8[size, size, 3]: shorter side to `size`, then the central square."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    short = min(height, width)
    # The square is cut out of the original's pixels and scaled once: no resized copy in between.
    top, left = (height - short) / 2, (width - short) / 2
    box = (left, top, left + short, top + short)
    square = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square)


def _pixels(encoded: bytes) -> np.ndarray:
    if not encoded:
        raise DecodeError("it is empty")
    try:
        if simplejpeg.is_jpeg(encoded):
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
            if height * width > LARGEST_PICTURE:
                raise DecodeError(f"it has {height * width:,} pixels")
            return simplejpeg.decode_jpeg(encoded, colorspace="RGB")
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey rather than scale it
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise DecodeError("it is no picture in a known format") from None
    # Pillow reports a damaged picture by any of these, depending on the format.
    except (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error).splitlines()[0] if str(error) else repr(error)) from error
