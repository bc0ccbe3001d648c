"""Images made to do harm, and unusual ones: each has the outcome in docs/hostile_images.md.

What is read looks as it should, and nothing takes much memory or time, whatever its header claims.
"""

import csv
import functools
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from flax_alexnet.commands.prepare import prepare
from flax_alexnet.data.dataset import CachedExamples
from flax_alexnet.data.examples import find_images
from flax_alexnet.data.sources import FolderSplits
from flax_alexnet.utils.text import printable

SIDE = 64
# Slow gradients, which survive any compression, and tell each turn from the others.
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
IMAGE = np.stack([4 * COLUMNS, 4 * ROWS, 128 + 0 * ROWS], -1).astype(np.uint8)
GREY, BLACK, MEDIUM = IMAGE[..., 0], np.zeros_like(IMAGE), np.full_like(IMAGE, 128)


def encoded(pixels, kind, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


KINDS = {
    kind: encoded(IMAGE, kind, **options)
    for kind, options in {
        "bmp": {},
        "gif": {},
        "jpeg": {"quality": 95},
        "png": {},
        "ppm": {},
        "tiff": {"compression": "tiff_lzw"},
        "webp": {"quality": 95},
    }.items()
}
JPEG, PNG = KINDS["jpeg"], KINDS["png"]


def png(width, height, *chunks, depth=8, color=2):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        crc = zlib.crc32(kind + body)
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    return data


@functools.cache
def zeros(megabytes):
    """So many in a zlib stream: each megabyte is compressed on its own, to the same bytes."""
    deflate = zlib.compressobj(9, wbits=-15)
    piece = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + megabytes * piece


def gif(screen, frame):
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\2\4\x84\x8f\xa9\xcb\0;"


def bmp(width, height, data=b"", runs=False):
    palette = bytes(1024) if runs else b""
    start, bits, colors = 54 + len(palette), 8 if runs else 24, len(palette) // 4
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, runs, 0, 0, 0, colors, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, start) + info + palette + data


def webp(width, height):
    """An animation on a canvas of so many pixels, of which its frame covers a few."""
    frame = encoded(BLACK[:5, :5], "webp", lossless=True)[12:]
    size, corner, five = pack24(width - 1) + pack24(height - 1), bytes(6), 2 * pack24(5 - 1)
    body = b"WEBP"
    for kind, data in (
        (b"VP8X", b"\2\0\0\0" + size),
        (b"ANIM", bytes(6)),
        (b"ANMF", corner + five + bytes(4) + frame),
    ):
        body += kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_chunks(count):
    whole = webp(5, 5)
    whole = whole[:4] + struct.pack("<I", len(whole) - 8 + 8 * count) + whole[8:]
    return whole + count * (b"abcd" + bytes(4))


def pack24(value):
    return struct.pack("<I", value)[:3]


def tiff(width, height, data, entries=()):
    """Grey, in one compressed strip, unless other entries say something else.

    The value of an entry may also be (type, count, place), or bytes, of type LONG.
    """
    known = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 273: 8, 278: height, 279: len(data)}
    known |= dict(entries)
    for tag, value in known.items():
        if isinstance(value, bytes):
            known[tag] = (4, len(value) // 4, 8 + len(data))
            data += value
        elif isinstance(value, int):
            known[tag] = (4, 1, value)
    data += bytes(len(data) % 2)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data
    return head + directory(known)


def directory(entries):
    """What a TIFF's directory has of {tag: (type, count, value or place)}."""
    lines = [struct.pack("<HHII", tag, *value) for tag, value in sorted(entries.items())]
    return struct.pack("<H", len(lines)) + b"".join(lines) + bytes(4)


def many_strips(count):
    """All of them in the same place, and compressed."""
    data = zlib.compress(bytes(SIDE))
    places = [number.to_bytes(4, "little") * count for number in (8, len(data))]
    return tiff(SIDE, count, data, {278: 1, 273: places[0], 279: places[1]})


def strips_of_nothing(count, megabytes):
    """Each of them is all of the file, most of which says that nothing follows."""
    data = (
        b"\x78\xda" + b"\0\0\0\xff\xff" * (megabytes * 2**20 // 5) + zlib.compress(bytes(SIDE))[2:]
    )
    places = [number.to_bytes(4, "little") * count for number in (8, len(data))]
    return tiff(SIDE, count, data, {278: 1, 273: places[0], 279: places[1]})


def overlapping(count):
    """So many entries over the same megabyte, in the first directory, or in that of EXIF data."""
    entries = {40000 + number: (7, 2**20, 8) for number in range(count)}
    pixels = zlib.compress(bytes(SIDE * SIDE))
    data = bytes(2**20) + directory(entries)
    here = {273: 8 + len(data), 279: len(pixels)}
    return {
        "a.tiff": tiff(SIDE, SIDE, data + pixels, entries | here),
        "b.tiff": tiff(SIDE, SIDE, data + pixels, here | {0x8769: 8 + 2**20}),
    }


def overlapping_exif(count):
    entries = {40000 + number: (7, 2**20, 8) for number in range(count)} | {0x0112: (3, 1, 1)}
    lines = directory(entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + lines + bytes(2**20)


def lossless_jpeg(width, height):
    """Medium grey, each value as the one before: a bit each. It cannot be decoded smaller.

    libjpeg-turbo ends the process when it is asked to.
    """
    channels = b"".join(b"%c\x11\0" % channel for channel in (1, 2, 3))
    frame = struct.pack(">2sHBHHB9s", b"\xff\xc3", 17, 8, height, width, 3, channels)
    code = b"\xff\xc4\0\x14\0" + bytes([1] + [0] * 15) + b"\0"
    scan = b"\xff\xda\0\x0c\3\1\0\2\0\3\0\1\0\0"
    return b"\xff\xd8" + frame + code + scan + bytes(3 * width * height // 8) + b"\xff\xd9"


def segment(kind, body):
    return struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body


def arithmetic(jpeg):
    """A JPEG whose header claims another coding."""
    return jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1)


def with_much_metadata():
    """As cameras and programs leave it: profiles, texts, layers, and data of the maker."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x927C] = 1, "a text", bytes(60_000)
    profile = bytes(range(256)) * 4000
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>" + b" " * 60_000
    jpeg = encoded(IMAGE, "jpeg", quality=95, exif=exif, icc_profile=profile, comment=b"c" * 9999)
    more = segment(0xE1, xmp) + 200 * segment(0xEB, bytes(65_000))
    parts = re.findall(
        b"(?s).{1,10}", zlib.compress(b"".join(b"\0" + row.tobytes() for row in IMAGE))
    )
    texts = [(b"tEXt", b"key %d\0a text" % number) for number in range(500)]
    layers = {37724: (7, 30_000_000, 8), 34675: (7, 1_000_000, 8)}
    pixels = zlib.compress(IMAGE.tobytes())
    colors = {258: (3, 3, 8 + 30_000_000), 262: 2, 277: 3}
    place = {273: 8 + 30_000_006, 279: len(pixels)}
    bits = struct.pack("<3H", 8, 8, 8)
    return {
        "a.jpg": jpeg[:2] + more + jpeg[2:],
        "a.png": png(SIDE, SIDE, *texts, *((b"IDAT", part) for part in parts)),
        "b.png": encoded(IMAGE, "png", exif=exif, icc_profile=profile[:900_000]),
        "a.webp": encoded(IMAGE, "webp", quality=95, exif=exif, icc_profile=profile, xmp=xmp),
        "a.tiff": tiff(SIDE, SIDE, bytes(30_000_000) + bits + pixels, layers | colors | place),
        "a.gif": encoded(IMAGE, "gif", comment=b"c" * 100_000),
        "a.ppm": b"P6\n#" + b"c" * 10_000 + b"\n64 64 255\n" + IMAGE.tobytes(),
    }


def in_many_parts():
    """Strips of one row, and animations of 500 frames."""
    frames = [Image.fromarray(IMAGE), *[Image.new("RGB", (SIDE, SIDE))] * 499]
    return {
        "a.tiff": encoded(IMAGE, "tiff", strip_size=1),
        "b.tiff": encoded(IMAGE, "tiff", strip_size=1, compression="tiff_lzw"),
        "a.gif": encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
    }


def resized(jpeg, width, height):
    """A JPEG whose header claims another size."""
    size = re.search(rb"\xff[\xc0\xc2]..\x08", jpeg, re.DOTALL).end()
    return jpeg[:size] + struct.pack(">HH", height, width) + jpeg[size + 4 :]


def flat_jpeg(width, height, *, apart=False, sampling=1):
    """Medium grey in three channels that come together, or each in a scan of its own.

    The first channel has `sampling` times the columns of the others.
    """
    small = encoded(MEDIUM[:8, :8], "jpeg", subsampling=0)
    small = small.replace(b"\1\x11\0", b"\1%c\0" % (16 * sampling + 1))
    start = small.index(b"\xff\xda")
    # Of a block the codes for "no change of the mean" and "no more": of luma, and of chroma.
    luma, chroma = "00" + "1010", "00" + "00"
    scans = [(small[start : start + 14], sampling * luma + chroma + chroma)]
    if apart:
        scans = [(b"\xff\xda\0\x08\1%c\0\0\x3f\0" % channel, luma) for channel in (1, 2, 3)]
    eights, rest = divmod(-(-width // 8 // sampling) * -(-height // 8), 8)
    assert not rest, "else the last byte would have to be filled up"
    parts = [head + int(8 * codes, 2).to_bytes(len(codes)) * eights for head, codes in scans]
    return resized(small[:start], width, height) + b"".join(parts) + b"\xff\xd9"


def many_scans(side, count):
    """A progressive JPEG that says its last words again and again."""
    whole = encoded(Image.new("L", (side, side), 128), "jpeg", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * count + b"\xff\xd9"


def turned(orientation):
    """The image as a camera stores it that was held so (1 to 8)."""
    turns = {
        1: IMAGE,
        2: IMAGE[:, ::-1],
        3: IMAGE[::-1, ::-1],
        4: IMAGE[::-1],
        5: IMAGE.swapaxes(0, 1),
        6: np.rot90(IMAGE),
        7: IMAGE[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(IMAGE, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {
        f"{orientation}.{kind}": encoded(turns[orientation], kind, exif=exif, **options)
        for kind, options in {
            "jpeg": {"quality": 95},
            "png": {},
            "tiff": {},
            "webp": {"quality": 95},
        }.items()
    }


def cut_off(kind):
    data = encoded(NOISE, kind)
    return {f"{tenth}.{kind}": data[: len(data) * tenth // 10] for tenth in range(1, 10)}


def animated(kind):
    frames = [Image.fromarray(IMAGE), *(Image.new("RGB", (SIDE, SIDE)) for _ in range(9))]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def broken_exif():
    """Good images with bad EXIF data."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "maker" * 9
    good = exif.tobytes()
    cuts = [good[:length] for length in (6, 8, 20, len(good) - 9)]
    ones = [good[:6] + b"\xff" * 99, good[:14] + b"\xff" * (len(good) - 14)]
    return {
        f"{number}.jpg": encoded(IMAGE, "jpeg", quality=95, exif=bad)
        for number, bad in enumerate([*cuts, *ones])
    }


def huge(path):
    path.write_bytes(b"\xff\xd8\xff")  # or it would be set aside as no image
    os.truncate(path, 10**12)


def link(target):
    return {"a.jpg": lambda path: path.symlink_to(target)}


def one(kind, make, *arguments, **options):
    """A generator of one file, made when it is asked for."""
    return lambda: {f"a.{kind}": make(*arguments, **options)}


GREY3 = np.repeat(GREY[..., None], 3, -1)
SIXTEEN = (GREY.astype(np.uint16) << 8) + 77
NOISE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
PIXELS = (b"IDAT", zlib.compress(bytes(SIDE * (3 * SIDE + 1))))
CLAIMED = (65000, 65000)
WHOLE = (5000, 4000)  # the most that is read of most formats: 20 million pixels
FOUR = ("jpeg", "png", "tiff", "webp")

# What a row of the table calls it → what makes the contents of files by name, or writes them into
# a folder, and what all of them look like if they are read.
CORPUS = {
    "each format as it should be": (
        lambda: {f"a.{kind}": data for kind, data in KINDS.items()},
        IMAGE,
    ),
    "JPEG in CMYK": (
        one("jpg", encoded, Image.fromarray(IMAGE).convert("CMYK"), "jpeg", quality=95),
        IMAGE,
    ),
    "grey JPEG, PNG, TIFF and WebP": (
        lambda: {f"a.{kind}": encoded(GREY, kind) for kind in FOUR},
        GREY3,
    ),
    "PNG and TIFF with 16 bits a channel": (
        lambda: {f"a.{kind}": encoded(SIXTEEN, kind) for kind in ("png", "tiff")},
        GREY3,
    ),
    "TIFF with 32 bits a channel": (one("tiff", encoded, np.float32(GREY), "tiff"), None),
    "PNG with transparency, or with a palette": (
        lambda: {
            "a.png": encoded(np.dstack([IMAGE, GREY]), "png"),
            "b.png": encoded(Image.fromarray(IMAGE).quantize(256), "png"),
        },
        IMAGE,
    ),
    "PNG named .jpg, JPEG named .png": (lambda: {"a.jpg": PNG, "a.png": JPEG}, IMAGE),
    "animated GIF, PNG and WebP": (
        lambda: {f"a.{kind}": animated(kind) for kind in ("gif", "png", "webp")},
        IMAGE,
    ),
    **{
        f"EXIF orientation {turn}, in JPEG, PNG, TIFF and WebP": (
            functools.partial(turned, turn),
            IMAGE,
        )
        for turn in range(1, 9)
    },
    "JPEG with broken EXIF data": (broken_exif, IMAGE),
    "JPEG with something behind its end": (
        lambda: {"a.jpg": JPEG + JPEG, "b.jpg": JPEG + bytes(99), "c.jpg": JPEG + b"\xff\xda" * 99},
        IMAGE,
    ),
    "JPEG whose colours have a third of the columns": (
        one("jpg", flat_jpeg, 3 * SIDE, SIDE, sampling=3),
        MEDIUM,
    ),
    **{
        f"{kind.upper().replace('WEBP', 'WebP')} cut off at 1/10, 2/10 … 9/10": (
            functools.partial(cut_off, kind),
            None,
        )
        for kind in KINDS
    },
    "each format after its first 20 bytes": (
        lambda: {f"a.{kind}": data[:20] for kind, data in KINDS.items()},
        None,
    ),
    "JPEG whose header says 65000 × 65000": (one("jpg", resized, JPEG, *CLAIMED), None),
    "BMP, GIF, PNG, PPM, TIFF and WebP whose header says 65000 × 65000": (
        lambda: {
            "a.bmp": bmp(*CLAIMED),
            "b.bmp": bmp(65000, -65000),
            "a.gif": gif(CLAIMED, (5, 5)),
            "b.gif": gif((5, 5), CLAIMED),
            "a.png": png(*CLAIMED, (b"IDAT", zeros(9))),
            "a.ppm": b"P6 65000 65000 255\n",
            "a.tiff": tiff(*CLAIMED, zeros(9)),
            "a.webp": webp(*CLAIMED),
        },
        None,
    ),
    "PNG and WebP that are 5000 × 4000, in a few kB": (
        lambda: {
            "a.png": png(*WHOLE, (b"IDAT", zeros(155)), depth=16, color=6),
            "a.webp": webp(*WHOLE),
        },
        BLACK,
    ),
    "PNG that is 6000 × 5000": (one("png", png, 6000, 5000, (b"IDAT", zeros(90))), None),
    "JPEG that is 10048 × 10048": (one("jpg", flat_jpeg, 10048, 10048), MEDIUM),
    "JPEG that is 7040 × 7040, each channel on its own": (
        one("jpg", flat_jpeg, 7040, 7040, apart=True),
        MEDIUM,
    ),
    "JPEG that is 13056 × 13056, each channel on its own": (
        one("jpg", flat_jpeg, 13056, 13056, apart=True),
        None,
    ),
    "JPEG with 1006 scans over 4400 × 4400": (one("jpg", many_scans, 4400, 1000), None),
    "PNG of 64 × 64 with 4 GB of pixels": (
        one("png", png, SIDE, SIDE, (b"IDAT", zeros(4096))),
        BLACK,
    ),
    "PNG with 4 GB of text, or of a colour profile": (
        lambda: {
            f"{kind.decode()}.png": png(SIDE, SIDE, (kind, head + zeros(4096)), PIXELS)
            for kind, head in {
                b"zTXt": b"a\0\0",
                b"iTXt": b"a\0\1\0\0\0",
                b"iCCP": b"a\0\0",
            }.items()
        },
        None,
    ),
    "PNG with a hundred texts of 1 MB": (
        one("png", png, SIDE, SIDE, *100 * [(b"zTXt", b"a\0\0" + zeros(1))], PIXELS),
        None,
    ),
    "TIFF of 64 × 64 in a tile of 26000 × 26000": (
        one("tiff", tiff, SIDE, SIDE, zeros(676), {322: 26000, 323: 26000, 324: 8, 325: 700_000}),
        None,
    ),
    "TIFF that says that its data are 4 GB": (
        one("tiff", tiff, SIDE, SIDE, zeros(1), {279: 2**32 - 1}),
        None,
    ),
    "JPEG, PNG, TIFF, WebP, GIF and PPM with up to 30 MB of metadata": (
        with_much_metadata,
        IMAGE,
    ),
    "TIFF in strips of one row, GIF of 500 frames": (in_many_parts, IMAGE),
    "JPEG with 12,000 segments of EXIF data": (
        lambda: {"a.jpg": JPEG[:2] + 12_000 * segment(0xE1, b"Exif\0\0" + bytes(1500)) + JPEG[2:]},
        IMAGE,
    ),
    "JPEG with a million bytes `FF` in its head": (
        lambda: {"a.jpg": JPEG[:2] + b"\xff" * 10**6 + b"\0" + JPEG[2:]},
        IMAGE,
    ),
    "JPEG that is 20 MB of `FF`, or of zeros": (
        lambda: {
            "a.jpg": b"\xff\xd8" + b"\xff" * (2 * 10**7),
            "b.jpg": b"\xff\xd8\xff" + bytes(2 * 10**7),
        },
        None,
    ),
    "JPEG with 100,000 comments, or as many scans": (
        lambda: {
            "a.jpg": JPEG[:2] + 100_000 * segment(0xFE, b"") + JPEG[2:],
            "b.jpg": many_scans(8, 100_000),
        },
        None,
    ),
    "lossless JPEG": (one("jpg", lossless_jpeg, SIDE, SIDE), MEDIUM),
    "lossless JPEG of 5008 × 4000, and an arithmetic one": (
        lambda: {
            "a.jpg": lossless_jpeg(5008, 4000),
            "b.jpg": arithmetic(flat_jpeg(5008, 4000)),
        },
        None,
    ),
    "PNG of 500,000 chunks": (
        lambda: {"a.png": PNG[:33] + 500_000 * PNG[-12:].replace(b"IEND", b"abCd") + PNG[33:]},
        None,
    ),
    "PNG with 2,000 colour profiles of 1 MB": (
        one("png", png, SIDE, SIDE, *2000 * [(b"iCCP", b"a\0\0" + zeros(1))], PIXELS),
        None,
    ),
    "PNG with 40 MB of something unknown, or of text": (
        lambda: {
            f"{kind.decode()}.png": png(SIDE, SIDE, (kind, head + bytes(4 * 10**7)), PIXELS)
            for kind, head in {b"abCd": b"", b"iTXt": b"a\0\0\0\0\0"}.items()
        },
        None,
    ),
    "PNG that is 1 × 300,000": (one("png", png, 1, 300_000, (b"IDAT", zeros(2))), None),
    "PNG and WebP with 3,000 EXIF entries over one megabyte": (
        lambda: {
            f"a.{kind}": encoded(IMAGE, kind, exif=overlapping_exif(3000), **options)
            for kind, options in {"png": {}, "webp": {"quality": 95}}.items()
        },
        IMAGE,
    ),
    "TIFF of 300,000 strips, or with as many colours": (
        lambda: {
            "a.tiff": many_strips(300_000),
            "b.tiff": tiff(SIDE, SIDE, bytes(2 * 300_000), {320: (3, 300_000, 8)}),
        },
        None,
    ),
    "TIFF with 5,000 entries over one megabyte": (functools.partial(overlapping, 5000), None),
    "TIFF whose 10,000 strips are the same 10 MB": (
        one("tiff", strips_of_nothing, 10_000, 10),
        None,
    ),
    "GIF with a million comments, or 10 MB of zeros, before its pixels": (
        lambda: {
            "a.gif": (whole := KINDS["gif"])[:13] + 10**6 * b"!\xfe\1a\0" + whole[13:],
            "b.gif": whole[:13] + bytes(10**7) + whole[13:],
        },
        None,
    ),
    "PPM with 5 MB of comments": (
        lambda: {
            "a.ppm": b"P6\n#" + b"x" * (5 * 10**6) + b"\n1 1 255\nabc",
            "b.ppm": b"P6\n" + b"#\n" * (5 * 10**6) + b"1 1 255\nabc",
        },
        None,
    ),
    "BMP with a header of 20 MB": (
        lambda: {"a.bmp": b"BM" + bytes(12) + struct.pack("<I", 2 * 10**7) + bytes(2 * 10**7)},
        None,
    ),
    "WebP of 100,000 chunks": (one("webp", many_chunks, 100_000), None),
    "WebP of more than 100 MB": (
        lambda: {
            "a.webp": lambda path: (path.write_bytes(webp(5, 5)), os.truncate(path, 10**8 + 1))
        },
        None,
    ),
    "PPM and BMP that are decoded slowly": (
        lambda: {
            "a.ppm": b"P6 1000 1000 100\n" + bytes(3 * 10**6),
            "b.ppm": b"P1 1000 1000\n" + b"#\n" * 10**6,
            "a.bmp": bmp(100, 10**5, bytes(10**6), runs=True),
        },
        None,
    ),
    "an empty file": (lambda: {"a.jpg": b""}, None),
    "HTML, SVG, PostScript, a ZIP archive, a megabyte of zeros": (
        lambda: {
            "a.jpg": b"<html>",
            "b.jpg": b"<svg>",
            "c.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "d.jpg": b"PK\3\4" + bytes(99),
            "e.jpg": bytes(10**6),
        },
        None,
    ),
    "a file of 1 TB": (lambda: {"a.jpg": huge}, None),
    "a FIFO": (lambda: {"a.jpg": os.mkfifo}, None),
    "a link to a file of /proc that has no end": (lambda: link("/proc/self/pagemap"), None),
    "a link to /dev/zero": (lambda: link("/dev/zero"), None),
    "a link to nowhere": (lambda: link("nowhere"), None),
    "a link to itself": (lambda: link("a.jpg"), None),
    "an image in a folder named x.jpg": (lambda: {"x.jpg/a.jpg": PNG}, IMAGE),
    "names that are not UTF-8, very long, or with a line break": (
        lambda: {
            os.fsdecode(name + b".png"): PNG
            for name in (b"\xff\xfe", b"n" * 251, b"a\nb", b" ", b"--help", b"* [a] \x1b[31m $HOME")
        },
        IMAGE,
    ),
}
TABLE = Path(__file__).parents[2] / "docs" / "hostile_images.md"
OUTCOMES = dict(re.findall(r"^\| (.+?) \| ((?:not )?read.*?) \|$", TABLE.read_text(), re.MULTILINE))
WHATS = list(CORPUS)
SLOW = {  # about a second each; the others take hundredths
    "PNG and WebP that are 5000 × 4000, in a few kB",
    "JPEG that is 10048 × 10048",
    "JPEG that is 7040 × 7040, each channel on its own",
    "PNG with a hundred texts of 1 MB",
}
# What flax_alexnet.data.decode ignores, but pytest does not.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def fits(what, problem):
    """Whether the table says this of an image; "" where it was read. "…" there is any text."""
    outcome = f"not read: {problem}" if problem else "read"
    return re.fullmatch(re.escape(OUTCOMES[what]).replace("…", ".+"), outcome)


def put(number, folder):
    """Writes the files of a row."""
    make, _ = CORPUS[WHATS[number]]
    for name, contents in make().items():
        path = folder / f"{number:02}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        contents(path) if callable(contents) else path.write_bytes(contents)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with one of its own, by number, for each row."""
    root = tmp_path_factory.mktemp("hostile") / "corpus"
    for number in range(len(WHATS)):
        put(number, root)
    return root


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The same without `SLOW`, in two class folders."""
    root = tmp_path_factory.mktemp("quick") / "quick"
    for number, what in enumerate(WHATS):
        if what not in SLOW:
            put(number, root / "ab"[number % 2])
    for letter in "ab":
        (root / letter / "98.png").write_bytes(PNG)
    return root


def what_is(path, root):
    return WHATS[int(re.search(r"(?:^|/)(\d\d)/", str(Path(path).relative_to(root)))[1])]


READ = r"""
import json, re, sys, time
from pathlib import Path
import numpy as np
from flax_alexnet.data.examples import find_images, read_examples

def memory(name):
    return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

source = find_images([sys.argv[1]])
idle, images, problems, seconds = memory("VmRSS"), [], [], []
for index in range(len(source)):
    start = time.perf_counter()
    (image,) = read_examples(source, 64, indices=[index], threads=1)
    seconds.append(time.perf_counter() - start)
    problems.append(image.problem)
    images.append(np.zeros((64, 64, 3), np.uint8) if image.image is None else image.image)
np.save(sys.argv[2], images)
print(json.dumps([problems, seconds, memory("VmHWM") - idle]))
"""


class Outcomes(NamedTuple):
    whats: list[str]
    problems: list[str]
    images: np.ndarray  # uint8[n, SIDE, SIDE, 3]
    seconds: list[float]
    peak: float  # MB above the idle process


@pytest.fixture(scope="module")
def outcomes(corpus):
    """What a process of its own, whose memory nobody else fills, makes of all images."""
    whats = [what_is(path, corpus) for path in find_images([str(corpus)]).paths]
    images = corpus.parent / "images.npy"
    command = [sys.executable, "-c", READ, str(corpus), str(images)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    problems, seconds, peak = json.loads(done.stdout)
    return Outcomes(whats, problems, np.load(images), seconds, peak)


def test_the_table_has_a_row_for_each():
    assert list(OUTCOMES) == WHATS


@pytest.mark.parametrize("what", WHATS)
def test_the_outcome_is_what_the_table_says(outcomes, what):
    rows = [row for row, other in enumerate(outcomes.whats) if other == what]
    make, looks = CORPUS[what]
    assert len(rows) == len(make())
    for row in rows:
        assert fits(what, outcomes.problems[row]), outcomes.problems[row]
        if looks is not None:  # compression and palettes cost some grey levels
            assert not outcomes.problems[row]
            assert np.abs(outcomes.images[row].astype(int) - looks).mean() < 4


def test_memory_and_time_are_bounded(outcomes):
    slowest = int(np.argmax(outcomes.seconds))
    print(
        f"{outcomes.peak:.0f} MB above idle; at most {outcomes.seconds[slowest]:.1f} s, for: "
        f"{outcomes.whats[slowest]}"
    )
    assert outcomes.peak < 500
    assert outcomes.seconds[slowest] < 10


PREPARE = r"""
import os, re, sys
from pathlib import Path
os.cpu_count = lambda: 8
from flax_alexnet.commands.prepare import main

def memory(name):
    return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

idle = memory("VmRSS")
assert main(sys.argv[1:]) == 0
print(memory("VmHWM") - idle)
"""


@pytest.mark.slow
def test_memory_is_bounded_in_many_threads(corpus, tmp_path):
    """All of the largest at the same time, in eight threads."""
    for number, what in enumerate(CORPUS):
        for copy in "ab" if what in SLOW else "":
            (tmp_path / "images" / copy).mkdir(parents=True, exist_ok=True)
            for path in (corpus / f"{number:02}").iterdir():
                (tmp_path / "images" / copy / f"{path.name}{number}").symlink_to(path)
    flags = ["--data.name", f"folder:{tmp_path}/images", "--data.data-dir", str(tmp_path)]
    command = [sys.executable, "-c", PREPARE, *flags, "--data.image-size", str(SIDE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = float(done.stdout.split()[-1])
    print(f"{peak:.0f} MB above idle in eight threads")
    assert peak < 500


def test_training_says_the_same(quick):
    """What is set aside before is what would be no image in a known format."""
    splits = FolderSplits(quick)
    source = splits.open("all")
    problems = {}
    CachedExamples(source, SIDE, on_bad=lambda name, why, _: problems.update({name: why}))
    problems |= dict.fromkeys(map(printable, splits.others), "it is no image in a known format")
    names = {*map(source.name, range(len(source))), *problems}
    assert len(names) == 2 + sum(len(CORPUS[what][0]()) for what in WHATS if what not in SLOW)
    for name in names:
        if not name.endswith("98.png"):
            assert fits(what_is(name, quick), problems.get(name, ""))


@pytest.mark.slow
def test_prepare_says_the_same(quick, tmp_path):
    prepare(f"folder:{quick}", tmp_path, image_size=SIDE)
    (path,) = tmp_path.rglob("outcomes.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + sum(len(CORPUS[what][0]()) for what in WHATS if what not in SLOW)
    for row in rows:
        problem = "" if row["outcome"] == "ok" else row["outcome"]
        if not row["name"].endswith("98.png"):
            assert fits(what_is(row["name"], quick), problem)
