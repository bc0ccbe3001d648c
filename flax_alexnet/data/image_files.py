"""The structure of image files, checked before a library decodes them.

Some files cost a library minutes or gigabytes for an image of a few pixels: they come in millions
of parts, their parts lie over one another, or are unpacked to much more than they are. Here parts
are counted, and no time is taken, so that an image is refused on every machine or on none.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

# Of what follows, images of cameras and programs have a hundredth or less.
MOST_READS = 2**19  # by Pillow of one file; it reads some formats byte by byte
MOST_SEGMENTS = 2**16  # of a JPEG, beside its pixels, and of a WebP
LARGEST_CHUNK = 2**25  # bytes of a PNG's chunk that is no pixels, of which there are copies
MOST_CHUNKS = 2**17  # of a PNG
MOST_UNPACKED = 1000  # texts and profiles of a PNG, each of which may become 1 MB
MOST_ENTRIES = 2**16  # in a directory of a TIFF
MOST_NUMBERS = 2**18  # in all entries: a TIFF's strips, twice, and its palette
LARGEST_ENTRIES = 100_000_000  # bytes of a TIFF's entries, of which there are copies
LARGEST_WEBP = 100_000_000  # bytes of a WebP file, likewise

PNG, BIG_TIFF = b"\x89PNG\r\n\x1a\n", b"MM\0+"
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes
TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", BIG_TIFF)
JPEG = b"\xff\xd8\xff"
MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)  # of a JPEG, with a segment
SCAN, END, APP0, APP1, APP14, APP15, COMMENT = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
ORIENTATION = 0x0112
# Of a TIFF: how pixels are compressed, how many bytes each strip or tile has, further directories.
COMPRESSION, LENGTHS, DIRECTORIES = 0x0103, (0x0117, 0x0145), (0x8769, 0x8825, 0xA005)
# How whole numbers are stored, and how many bytes any value takes.
WHOLE = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
BYTES = {kind: struct.calcsize("=" + layout) for kind, layout in WHOLE.items()} | {
    kind: size for size, kinds in {1: (1, 2, 7), 4: (11,), 8: (5, 10, 12)}.items() for kind in kinds
}
TEXTS = (1, 2, 7)  # which are kept as they are


class DecodeError(ValueError):
    """Bytes that are not an image that can be read; the message says why."""


class Stream(io.BytesIO):
    """A file in memory for Pillow, which may read from it so often and no more."""

    def __init__(self, encoded: bytes):
        super().__init__(encoded)
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MOST_READS:
            raise DecodeError(f"it is in more than {MOST_READS // 4:,} pieces: too many")
        return super().read(size)


class Segment(NamedTuple):
    """A part of a JPEG."""

    kind: int  # the second byte of its marker
    start: int  # of its marker, in bytes
    body: int  # where what follows its length begins
    end: int


class Entry(NamedTuple):
    """A line of a TIFF's directory."""

    tag: int
    kind: int
    place: int  # of its value, in bytes
    size: int  # bytes that are there


def jpeg_segments(jpeg: bytes) -> list[Segment]:
    """What a JPEG says before its pixels; the last is the head of its first scan.

    Raises:
      DecodeError: there is no scan, or there are more than `MOST_SEGMENTS`.
    """
    segments = []
    for segment in _segments(jpeg, 2):
        segments.append(segment)
        if segment.kind == SCAN:
            return segments
    raise DecodeError("it ends before its pixels begin")


def count_scans(jpeg: bytes, first: Segment) -> int:
    """How often a JPEG goes over its pixels; raises DecodeError for more than `MOST_SEGMENTS`."""
    scans = 1
    for segment in _segments(jpeg, first.end):
        if segment.kind == END:
            break
        scans += segment.kind == SCAN
    return scans


def _segments(jpeg: bytes, place: int) -> Iterator[Segment]:
    count = 0
    while match := MARKER.search(jpeg, place):
        if (count := count + 1) > MOST_SEGMENTS:
            raise DecodeError(f"it has more than {MOST_SEGMENTS:,} segments: too many")
        start, body = match.start(), match.end() + 2
        place = match.end() + int.from_bytes(jpeg[match.end() : body], "big")
        yield Segment(match[1][0], start, body, place)


def plain_jpeg(jpeg: bytes, segments: list[Segment]) -> bytes:
    """The same JPEG without comments, profiles and the like, on which Pillow may spend minutes."""
    kept = [jpeg[:2]]
    for kind, start, _, end in segments[:-1]:
        if kind in (APP0, APP14) or not (APP1 <= kind <= APP15 or kind == COMMENT):
            kept.append(jpeg[start:end])
    return b"".join([*kept, jpeg[segments[-1].start :]])


def jpeg_orientation(jpeg: bytes, segments: list[Segment]) -> int:
    """1 to 8, as the EXIF data says, or where that says nothing the XMP data; 1 without EXIF."""
    exif, xmp = [], b""
    for kind, _, body, end in segments:
        if kind == APP1 and jpeg.startswith(EXIF, body):
            exif.append(jpeg[body + len(EXIF) : end])
        elif kind == APP1 and jpeg.startswith(XMP, body):
            xmp = jpeg[body:end]
    return orientation(b"".join(exif), xmp) if exif else 1


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """1 to 8, as EXIF data (a TIFF without pixels) says, or else XMP data; 1 if neither does."""
    for entry in _directory(exif):
        if entry.tag == ORIENTATION and (values := _whole_numbers(exif, entry)):
            return values[0]
    match = re.search(rb"""tiff:Orientation(?:="|>)([0-9])""", xmp)
    return int(match[1]) if match else 1


def check_decodable(encoded: bytes) -> None:
    """Raises DecodeError for a file in more parts, or larger ones, than an image can need."""
    if encoded.startswith(PNG):
        _check_decodable_png(encoded)
    elif encoded.startswith(TIFF):
        _check_decodable_tiff(encoded)
    elif encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        _check_decodable_webp(encoded)
    # Pillow would read the whole header of a BMP before it looks at what it is.
    elif encoded.startswith(b"BM") and int.from_bytes(encoded[14:18], "little") not in BMP_HEADERS:
        raise DecodeError("it is no image in a known format")


def _check_decodable_png(png: bytes) -> None:
    unpacked, place = 0, len(PNG)
    for _ in range(MOST_CHUNKS):
        size, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        if size > LARGEST_CHUNK and kind not in (b"IDAT", b"fdAT"):
            raise DecodeError(f"it has {size:,} bytes of something else than pixels: too many")
        unpacked += kind in (b"zTXt", b"iTXt", b"iCCP")
        place += 12 + size
        if kind == b"IEND" or place >= len(png):
            break
    else:
        raise DecodeError(f"it has more than {MOST_CHUNKS:,} chunks: too many")
    if unpacked > MOST_UNPACKED:
        raise DecodeError(f"it has {unpacked:,} texts and profiles: too many")


def _check_decodable_tiff(tiff: bytes) -> None:
    if tiff.startswith(BIG_TIFF):  # readers disagree on where its directory is
        raise DecodeError("it is a BigTIFF with the larger byte first; save it as TIFF")
    entries = list(_directory(tiff))
    for entry in list(entries):
        if entry.tag in DIRECTORIES and (places := _whole_numbers(tiff, entry, 1)):
            entries += _directory(tiff, places[0])
        if len(entries) > MOST_ENTRIES:
            raise DecodeError(f"its directories have {len(entries):,} entries: too many")
    numbers = sum(e.size // BYTES[e.kind] for e in entries if e.kind not in TEXTS)
    if numbers > MOST_NUMBERS:
        raise DecodeError(
            f"its strips and tables have {numbers:,} entries; at most {MOST_NUMBERS:,} are read"
        )
    size = sum(entry.size for entry in entries)
    if size > LARGEST_ENTRIES:
        raise DecodeError(f"it has {size:,} bytes of something else than pixels: too many")
    if any(e.tag == COMPRESSION and _whole_numbers(tiff, e, 1) != (1,) for e in entries):
        # Strips in the same place would be unpacked again and again.
        packed = sum(sum(map(abs, _whole_numbers(tiff, e))) for e in entries if e.tag in LENGTHS)
        if packed > len(tiff) + LARGEST_ENTRIES:
            raise DecodeError(f"its strips have {packed:,} bytes, the file has {len(tiff):,}")


def _check_decodable_webp(webp: bytes) -> None:
    if len(webp) > LARGEST_WEBP:
        raise DecodeError(f"it has {len(webp):,} bytes; at most {LARGEST_WEBP:,} of WebP are read")
    place, end = 12, min(len(webp), 8 + int.from_bytes(webp[4:8], "little"))
    for _ in range(MOST_SEGMENTS):
        size = int.from_bytes(webp[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
        if place >= end:
            return
    raise DecodeError(f"it has more than {MOST_SEGMENTS:,} chunks: too many")


def _directory(tiff: bytes, place: int | None = None) -> Iterator[Entry]:
    """The entries of a directory that are whole, as far as there are some.

    Args:
      tiff: the whole file.
      place: of the directory, in bytes; None is the first.

    Raises:
      DecodeError: there are more than `MOST_ENTRIES`.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return
    big = tiff[2:3] == b"+"
    number, line = (order + "Q", order + "HHQQ") if big else (order + "I", order + "HHII")
    if place is None:
        first = _at(number, tiff, 8 if big else 4)
        place = first[0] if first else len(tiff)
    count = _at(order + ("Q" if big else "H"), tiff, place)
    if count and count[0] > MOST_ENTRIES:
        raise DecodeError(f"it has {count[0]:,} entries in a directory: too many")
    step, inside = struct.calcsize(line), struct.calcsize(number)
    place += 8 if big else 2
    for _ in range(count[0] if count else 0):
        entry = _at(line, tiff, place)
        if entry is None:
            return
        place += step
        tag, kind, values, offset = entry
        if kind in BYTES:
            size = values * BYTES[kind]
            if size <= inside:
                offset = place - inside
            yield Entry(tag, kind, offset, max(0, min(size, len(tiff) - offset)))


def _whole_numbers(tiff: bytes, entry: Entry, most: int = MOST_NUMBERS) -> tuple[int, ...]:
    """The first values of an entry; none, where they are of another kind or cut off."""
    if entry.kind not in WHOLE:
        return ()
    order = "<" if tiff.startswith(b"II") else ">"
    count = min(most, entry.size // BYTES[entry.kind])
    return _at(f"{order}{count}{WHOLE[entry.kind]}", tiff, entry.place) or ()


def _at(layout: str, data: bytes, place: int) -> tuple[int, ...] | None:
    """Numbers in the layout of `struct`; None beyond the end."""
    if not 0 <= place <= len(data) - struct.calcsize(layout):
        return None
    return struct.unpack_from(layout, data, place)
