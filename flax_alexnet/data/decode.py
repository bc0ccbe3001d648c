"""Decodes images to square uint8 arrays, with the resize rule of a model."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from flax_alexnet.data import image_files
from flax_alexnet.data.image_files import JPEG, DecodeError, Segment
from flax_alexnet.data.preprocessing import ResizeRule
from flax_alexnet.utils.errors import first_line
from flax_alexnet.utils.inputs import open_regular, read_bytes
from flax_alexnet.utils.text import printable

LARGEST_IMAGE = 178_956_970  # pixels: Pillow rejects more, and warns from half of that on
# The most pixels that are decoded at full size, which takes up to 22 bytes each. A larger JPEG is
# decoded at a half, a quarter or an eighth of its size; a larger image in another format is not
# decoded. The limit holds for all threads together. Small JPEGs do not count, since the lock takes
# a fortieth of the time of a prepared image.
LARGEST_WHOLE = 20_000_000
SMALL = 2**17  # pixels: 3 MB
# For a JPEG in several scans, such as a progressive one, the decoder keeps 2 bytes of each value
# until the last scan, at any decoded size, and each scan passes over all values.
LARGEST_IN_SCANS = 150_000_000  # pixels times channels
LONGEST_IN_SCANS = 1_500_000_000  # pixels times scans: about 2 s
# Pillow decodes these in Python, in seconds per megapixel: plain and scaled PPM, BMP in runs.
LARGEST_SLOW = 2**18  # pixels, and bytes
# An arithmetic-coded JPEG, which no camera writes, takes ten times as long.
ARITHMETIC_IS_SLOWER = 10
MOST_ROWS = 2**18  # of an image that Pillow decodes; Pillow keeps a pointer to each row
LARGEST_FILE = 200_000_000  # bytes
# The formats of Pillow that are read; some others start programs or are not images of pixels.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TILE_WIDTH, TILE_LENGTH = 322, 323  # of a TIFF
# Kinds of a JPEG's segments.
PROGRESSIVE, LOSSLESS, ARITHMETIC = {0xC2, 0xCA}, {0xC3, 0xCB}, {0xC9, 0xCA, 0xCB}
EXIF, XMP = ("exif", "Raw profile type exif"), ("XML:com.adobe.xmp", "xmp")  # Pillow's names
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of damaged metadata
# Pillow stores a large image in blocks of 16 MB by default, and each thread's heap would keep some
# of them forever. A single block is given back to the system.
Image.core.set_block_size(2**27)
PngImagePlugin.MAX_TEXT_MEMORY = 2**22  # bytes that each thread may hold; the default is 64 MB


class _Room:
    """A number of pixels that threads may hold; a thread waits if it needs more than are left."""

    def __init__(self, pixels: int):
        self._all = self._left = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Holds `pixels` pixels, or all that there are if these are fewer."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: pixels <= self._left)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


ROOM = _Room(LARGEST_WHOLE)


def decode(
    encoded: bytes, size: int, resize: ResizeRule = "paper", out: np.ndarray | None = None
) -> np.ndarray:
    """Decodes an image in any usual format to uint8[size, size, 3], RGB.

    The content decides the format, not the file name. Grey and CMYK become RGB, 16 bits a channel
    become 8, transparency is dropped, the first frame of an animation is taken, and the image is
    rotated to its EXIF orientation. JPEGs of more than `LARGEST_WHOLE` pixels are decoded at a
    lower resolution, still at least twice `size`, so that no image takes more than 500 MB. Several
    threads together take no more: they decode small images in parallel and large ones in turn.

    Args:
      encoded: the image as it lies on the disk.
      size: pixels a side.
      resize: the rule.
      out: uint8[size, size, 3] for the result, such as a row of a batch; a prepared JPEG is decoded
        directly into it. After an error its content is not an image. None: a new array is made.

    Raises:
      DecodeError: the bytes are truncated, damaged or no image; the image has 32 bits a channel, or
        more pixels than `LARGEST_IMAGE` (in a JPEG of several scans, than `LARGEST_IN_SCANS` over
        its channels; in another format, than `LARGEST_WHOLE` or `LARGEST_SLOW`); or its file has
        more parts than an image needs (`image_files`).
    """
    with contextlib.ExitStack() as resources:
        resized = resize_to(_pixels(encoded, 2 * size, resources, out), size, resize)
    if out is None or out is resized:
        return resized
    out[...] = resized
    return out


def read_file(path: str | Path) -> bytes:
    """The bytes of an image. Raises DecodeError if the file cannot be read or is too large."""
    try:
        return read_bytes(path, LARGEST_FILE)
    except OSError as error:
        raise DecodeError(error.strerror or type(error).__name__) from None


def is_image_file(path: str | Path) -> bool | None:
    """Whether a file begins as an image does, in a format that `decode` reads.

    The result is None if the file is empty or cannot be read: it may have been an image.
    """
    try:
        with open_regular(path) as file:
            start = file.read(18)
    except OSError:
        return None
    if not start:
        return None
    if start.startswith(JPEG):
        return True
    if start.startswith(b"BM"):  # as a text may begin, too; the size of its second header follows
        return int.from_bytes(start[14:18], "little") in image_files.BMP_HEADERS
    if start.startswith(b"P") and not start[2:3].isspace():  # likewise
        return False
    Image.init()  # once
    padded = start.ljust(18, b"\0")  # Pillow's own functions do not check the length
    return any(accept(padded) for name in FORMATS if (accept := Image.OPEN[name][1]))


def decode_whole(encoded: bytes) -> np.ndarray:
    """An image of at most `LARGEST_WHOLE` pixels at its own size: uint8[h, w, 3]; see `decode`."""
    with contextlib.ExitStack() as resources:
        return _pixels(encoded, None, resources)


def resize_to(image: np.ndarray, size: int, resize: ResizeRule = "paper") -> np.ndarray:
    """uint8[h, w, 3] to uint8[size, size, 3]; one that has this size already keeps its pixels."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    opened = Image.fromarray(image)
    short = min(height, width)
    if resize == "caffe":
        steps = (width / size, 0, 0, 0, height / size, 0)
        resized = opened.transform(
            (size, size), Image.Transform.AFFINE, steps, Image.Resampling.BILINEAR
        )
    elif resize == "torchvision":
        # torchvision's own arithmetic: int(), and Python's round() to even.
        sides = int(size * width / short), int(size * height / short)
        if sides[0] * sides[1] > LARGEST_WHOLE:  # a strip, of which only the centre is wanted
            opened = opened.crop(_centre(width, height, 8 * short))
            return resize_to(np.asarray(opened), size, resize)
        left, top = (round((side - size) / 2) for side in sides)
        resized = opened.resize(sides, Image.Resampling.BILINEAR)
        resized = resized.crop((left, top, left + size, top + size))
    else:
        # The square is cut out and scaled in one operation, without a resized copy in between.
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        resized = opened.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized)


def _pixels(
    encoded: bytes,
    enough: int | None,
    resources: contextlib.ExitStack,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """uint8[h, w, 3], upright; a very large JPEG is reduced to sides of at least `enough` pixels.

    The result may lie in `out`, if that has the same shape. The pixels count against `ROOM` until
    `resources` is closed.
    """
    if not encoded:
        raise DecodeError("it is empty")
    try:
        if encoded.startswith(JPEG):
            return _jpeg(encoded, enough, resources, out)
        return _other(encoded, resources)
    except UnidentifiedImageError:
        raise DecodeError("it is no image in a known format") from None
    except Exception as error:  # Pillow reports a damaged image by almost any, TypeError included
        raise DecodeError(printable(first_line(error))) from error


def _jpeg(
    encoded: bytes, enough: int | None, resources: contextlib.ExitStack, out: np.ndarray | None
) -> np.ndarray:
    segments = image_files.jpeg_segments(encoded)
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:  # an unusual sampling of the colours, which Pillow knows
        pixels = _other(image_files.plain_jpeg(encoded, segments), resources)
        return _turned(pixels, image_files.jpeg_orientation(encoded, segments))
    kinds = {segment.kind for segment in segments}
    shrinks = enough and not kinds & (LOSSLESS | ARITHMETIC)
    _check_at_most(LARGEST_IMAGE if shrinks else LARGEST_WHOLE, height * width)
    channels = {"Gray": 1, "CMYK": 4, "YCCK": 4}.get(colors, 3)
    _check_few_scans(encoded, segments, channels, height * width)
    if height * width > SMALL:
        resources.enter_context(ROOM.take(height * width))
    least = enough if enough and height * width > LARGEST_WHOLE else max(height, width)
    if out is not None and out.shape == (height, width, 3):
        simplejpeg.decode_jpeg(encoded, "RGB", buffer=out)
        pixels = out
    else:
        pixels = simplejpeg.decode_jpeg(encoded, "RGB", min_height=least, min_width=least)
    return _turned(pixels, image_files.jpeg_orientation(encoded, segments))


def _check_few_scans(jpeg: bytes, segments: list[Segment], channels: int, pixels: int) -> None:
    """Raises DecodeError if a JPEG that cannot be decoded row by row is too large."""
    kinds = {segment.kind for segment in segments}
    first = segments[-1]
    if jpeg[first.body : first.body + 1] == bytes([channels]) and not kinds & PROGRESSIVE:
        return
    _check_at_most(LARGEST_IN_SCANS // channels, pixels)
    scans = image_files.count_scans(jpeg, first)
    if scans * pixels > LONGEST_IN_SCANS // (ARITHMETIC_IS_SLOWER if kinds & ARITHMETIC else 1):
        raise DecodeError(f"it has {scans:,} scans over {pixels:,} pixels: too many")


def _other(encoded: bytes, resources: contextlib.ExitStack) -> np.ndarray:
    """Decodes with Pillow: any other format, or a JPEG without EXIF data, which is not rotated."""
    image_files.check_decodable(encoded)
    with Image.open(image_files.Stream(encoded), formats=FORMATS) as image:
        _check_at_most(LARGEST_WHOLE, _stored(image))
        if image.height > MOST_ROWS:
            raise DecodeError(f"it has {image.height:,} rows; at most {MOST_ROWS:,} are read")
        if encoded.startswith(JPEG):
            segments = image_files.jpeg_segments(encoded)
            _check_few_scans(encoded, segments, len(image.getbands()), _stored(image))
        slow = image.tile and image.tile[0][0] in Image.DECODERS
        if slow and max(image.height * image.width, len(encoded)) > LARGEST_SLOW:
            raise DecodeError(
                f"it is a kind of {image.format} that is read up to {LARGEST_SLOW:,} pixels and "
                "bytes; save it as PNG"
            )
        resources.enter_context(ROOM.take(_stored(image)))
        if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey rather than scale it
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return _turned(np.repeat(grey[..., None], 3, axis=-1), _orientation(image))
        if image.mode in ("I", "F"):  # the range of their values is not known
            raise DecodeError("it has 32 bits a channel; save it with 8 or 16")
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # else a copy for nothing
        return _turned(np.asarray(rgb), _orientation(image))


def _stored(image: Image.Image) -> int:
    """The number of pixels that are decoded; a TIFF's tiles may extend far beyond its image."""
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)
    width, height = (-(-side // step) * step for side, step in zip(image.size, tile, strict=True))
    return width * height


def _centre(width: int, height: int, most: int) -> tuple[int, int, int, int]:
    """The box in the middle of an image with sides of at most `most` pixels."""
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return left, top, min(width, left + most), min(height, top + most)


def _check_at_most(largest: int, pixels: int) -> None:
    if pixels > largest:
        raise DecodeError(f"it has {pixels:,} pixels; at most {largest:,} of its format are read")


def _orientation(image: Image.Image) -> int:
    """The orientation, 1 to 8, of an image that Pillow has not rotated itself: PNG and WebP."""
    if image.format == "TIFF":  # which Pillow has turned
        return 1
    exif, raw = (image.info.get(name) for name in EXIF)
    if exif is None and raw is not None:  # as some programs put it into a PNG
        exif = bytes.fromhex("".join(raw.split("\n")[3:]))
    xmp = next((value for name in XMP if (value := image.info.get(name))), b"")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    return image_files.orientation((exif or b"").removeprefix(image_files.EXIF), xmp)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels rotated and mirrored from their EXIF orientation to upright."""
    if orientation in (5, 6, 7, 8):  # the first row of the file is a side of the image
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
