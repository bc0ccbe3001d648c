"""Encoded pictures to square uint8 images, by the rule that a net was trained with."""

import io
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from flax_alexnet.preprocessing import ResizeRule

LARGEST_PICTURE = 178_956_970  # pixels: where Pillow refuses a picture; half of that it warns at
# Pixels up to which a picture is decoded whole, which takes up to 22 bytes each. A larger JPEG is
# decoded at a half, a quarter or an eighth of its size; other formats cannot be.
LARGEST_WHOLE = 20_000_000
# A progressive JPEG keeps 2 bytes of each value until it is complete, whatever its size then.
LARGEST_PROGRESSIVE = 180_000_000  # pixels times channels
# Of what Pillow reads; some others start programs, or read what is no picture of pixels.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXIF_ORIENTATION, FAR = 0x0112, 2**18  # within so many bytes of a JPEG's start
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of damaged metadata


class DecodeError(ValueError):
    """Bytes that are not a picture that can be read; the message says why."""


def decode(encoded: bytes, size: int, resize: ResizeRule = "paper") -> np.ndarray:
    """A picture in any usual format to uint8[size, size, 3], RGB.

    What is inside counts, not what a file's name says. Grey and CMYK become RGB, 16 bits a channel
    become 8, transparency is dropped, of an animation the first frame is taken, and a picture is
    turned as its EXIF orientation says. JPEGs of more than `LARGEST_WHOLE` pixels are decoded at a
    lower resolution, still at least twice `size`, so that no picture takes more than 500 MB.

    Raises:
      DecodeError: the bytes are truncated, damaged, no picture, one with 32 bits a channel, or one
        of more pixels than `LARGEST_PICTURE` (of a progressive JPEG `LARGEST_PROGRESSIVE` over its
        channels, of another format `LARGEST_WHOLE`).
    """
    return to_square(_pixels(encoded, 2 * size), size, resize)


def read_file(path: Path) -> bytes:
    """A picture's bytes; DecodeError where there are none to be had."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for for ever
            raise DecodeError("it is no regular file")
        return path.read_bytes()
    except OSError as error:
        raise DecodeError(error.strerror or type(error).__name__) from None


def decode_whole(encoded: bytes) -> np.ndarray:
    """A picture of at most `LARGEST_WHOLE` pixels at its own size: uint8[h, w, 3]; see `decode`."""
    return _pixels(encoded, None)


def to_square(image: np.ndarray, size: int, resize: ResizeRule = "paper") -> np.ndarray:
    """uint8[h, w, 3] to uint8[size, size, 3]; one that has this size already keeps its pixels."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    picture = Image.fromarray(image)
    short = min(height, width)
    if resize == "caffe":
        steps = (width / size, 0, 0, 0, height / size, 0)
        square = picture.transform(
            (size, size), Image.Transform.AFFINE, steps, Image.Resampling.BILINEAR
        )
    elif resize == "torchvision":
        # torchvision's own arithmetic: int(), and Python's round() to even.
        sides = int(size * width / short), int(size * height / short)
        if sides[0] * sides[1] > LARGEST_WHOLE:  # a strip, of which only the centre is wanted
            picture = picture.crop(_centre(width, height, 8 * short))
            return to_square(np.asarray(picture), size, resize)
        left, top = (round((side - size) / 2) for side in sides)
        square = picture.resize(sides, Image.Resampling.BILINEAR)
        square = square.crop((left, top, left + size, top + size))
    else:
        # The square is cut out of the original's pixels and scaled once: no resized copy between.
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        square = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square)


def _pixels(encoded: bytes, enough: int | None) -> np.ndarray:
    """uint8[h, w, 3], upright; of a very large JPEG with sides of at least `enough` pixels."""
    if not encoded:
        raise DecodeError("it is empty")
    try:
        if simplejpeg.is_jpeg(encoded):
            height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
            _need_at_most(LARGEST_PICTURE if enough else LARGEST_WHOLE, height * width)
            least = max(height, width)
            if enough and height * width > LARGEST_WHOLE:
                least = enough
                with _open(encoded) as image:
                    if image.info.get("progressive"):
                        channels = {"Gray": 1, "CMYK": 4, "YCCK": 4}.get(colors, 3)
                        _need_at_most(LARGEST_PROGRESSIVE // channels, height * width)
            pixels = simplejpeg.decode_jpeg(encoded, "RGB", min_height=least, min_width=least)
            if encoded.find(b"Exif\0\0", 0, FAR) < 0:  # dearer to parse than to look for
                return pixels
            with _open(encoded) as image:
                return _upright(pixels, image)
        with _open(encoded) as image:
            _need_at_most(LARGEST_WHOLE, image.height * image.width)
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey rather than scale it
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return _upright(np.repeat(grey[..., None], 3, axis=-1), image)
            if image.mode in ("I", "F"):  # and of these nobody knows the range
                raise DecodeError("it has 32 bits a channel; save it with 8 or 16")
            return _upright(np.asarray(image.convert("RGB")), image)
    except UnidentifiedImageError:
        raise DecodeError("it is no picture in a known format") from None
    # Pillow reports a damaged picture by any of these, depending on the format.
    except (
        *(ValueError, OSError, SyntaxError, EOFError, MemoryError, RuntimeError, OverflowError),
        Image.DecompressionBombError,
    ) as error:
        raise DecodeError(str(error).splitlines()[0] if str(error) else repr(error)) from error


def _open(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded), formats=FORMATS)


def _centre(width: int, height: int, most: int) -> tuple[int, int, int, int]:
    """The box in the middle of a picture with sides of at most `most` pixels."""
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return left, top, min(width, left + most), min(height, top + most)


def _need_at_most(largest: int, pixels: int) -> None:
    if pixels > largest:
        raise DecodeError(f"it has {pixels:,} pixels; at most {largest:,} of its format are read")


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """The pixels turned and mirrored as the orientation in the EXIF data of `image` says."""
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):  # the first row of the file is a side of the picture
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
