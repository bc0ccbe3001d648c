"""Images of every kind, from bytes to squares: a stated outcome for each, and bounded memory."""

import errno
import io
import os
import socket
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin

from flax_alexnet.data import image_files
from flax_alexnet.data.decode import (
    LARGEST_WHOLE,
    DecodeError,
    decode,
    decode_whole,
    is_image_file,
    read_file,
    resize_to,
)
from flax_alexnet.utils.inputs import read_bytes
from tests.images import random_image

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 60, 3), np.uint8)
# Half black, half coloured, so that it survives JPEG and shows its orientation.
FLAG = np.zeros((40, 60, 3), np.uint8)
FLAG[:, 30:] = (200, 100, 50)


def encoded(pixels, kind="png", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def linear(image, size):
    """Bilinear without antialiasing, pixel centres at (i + ½)·scale − ½, as OpenCV has it."""

    def taps(length):
        centre = (np.arange(size) + 0.5) * length / size - 0.5
        first = np.floor(centre).astype(int)
        low, high = (np.clip(first + step, 0, length - 1) for step in (0, 1))
        return low, high, centre - first

    (top, bottom, v), (left, right, u) = (taps(length) for length in image.shape[:2])
    image, u, v = image.astype(float), u[None, :, None], v[:, None, None]
    upper = image[top][:, left] * (1 - u) + image[top][:, right] * u
    lower = image[bottom][:, left] * (1 - u) + image[bottom][:, right] * u
    return upper * (1 - v) + lower * v


@pytest.mark.parametrize("size", [16, 97])
def test_caffes_rule_warps_without_antialiasing(size):
    # Pillow cuts off fractions where OpenCV rounds: less than one grey level apart.
    assert np.abs(resize_to(NOISE, size, "caffe") - linear(NOISE, size)).max() < 1


@pytest.mark.parametrize("shape", [(256, 300), (375, 500), (500, 333)])
def test_torchvisions_rule_is_resize_and_center_crop(shape):
    """What `transforms.Resize(256)` and `CenterCrop(224)` do to a PIL image, written down."""
    image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), np.uint8))
    short = min(shape)
    width, height = (int(256 * side / short) for side in image.size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - 224) / 2.0), round((width - 224) / 2.0)
    ours = resize_to(np.asarray(image), 256, "torchvision")[16:240, 16:240]
    np.testing.assert_array_equal(ours, resized[top : top + 224, left : left + 224])


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_data_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(FLAG, kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    ours = decode_whole(data)
    assert ours.shape == upright.shape
    assert np.abs(ours.astype(int) - upright).max() <= 3


@pytest.mark.parametrize("size", [40, 16])
@pytest.mark.parametrize("orientation", [1, 2, 6])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_row_of_a_batch_takes_the_image(kind, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(NOISE[:, :40], kind, exif=exif)
    batch = np.full((3, size, size, 3), 7, np.uint8)
    place = batch[1]
    assert decode(data, size, out=place) is place
    np.testing.assert_array_equal(place, decode(data, size))
    assert (batch[[0, 2]] == 7).all()


def test_grey_cmyk_palette_transparency_and_16_bits_become_rgb():
    grey = NOISE[..., 0]
    np.testing.assert_array_equal(decode_whole(encoded(grey)), np.stack([grey] * 3, -1))
    sixteen = (grey.astype(np.uint16) << 8) + 77
    np.testing.assert_array_equal(decode_whole(encoded(sixteen)), np.stack([grey] * 3, -1))
    clear = np.dstack([NOISE, grey])
    np.testing.assert_array_equal(decode_whole(encoded(clear)), NOISE)
    palette = Image.fromarray(NOISE).quantize(256)
    np.testing.assert_array_equal(decode_whole(encoded(palette)), palette.convert("RGB"))
    cmyk = decode_whole(encoded(Image.fromarray(FLAG).convert("CMYK"), "jpeg", quality=95))
    assert np.abs(cmyk.astype(int) - FLAG)[:, [*range(28), *range(32, 60)]].max() <= 12


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.fromarray(np.full((9, 9, 3), value, np.uint8)) for value in (10, 200)]
    for kind in ("gif", "webp", "png"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode_whole(data).astype(int) - 10).max() <= 2, kind


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"no image", "no image", id="mislabelled"),
        *(
            pytest.param(
                encoded(NOISE, kind)[: int(part * len(encoded(NOISE, kind)))], ".", id=kind
            )
            for kind in ("jpeg", "png", "gif", "bmp")
            for part in (0.05, 0.5, 0.95)
        ),
        pytest.param(
            encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "tiff"), "32 bits", id="float"
        ),
        pytest.param(encoded(Image.new("1", (6000, 5000))), "30,000,000 pixels", id="large png"),
    ],
)
def test_what_cannot_be_read_is_said(data, says):
    with pytest.raises(DecodeError, match=says):
        decode(data, 16)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_not_decoded_smaller_is_refused(monkeypatch):
    """Large JPEGs are, other formats not; and for `decode_whole` none is."""
    with pytest.raises(DecodeError, match="100,000,000 pixels"):
        decode(encoded(Image.new("1", (10_000, 10_000))), 256)
    monkeypatch.setattr("flax_alexnet.data.decode.LARGEST_WHOLE", 40 * 60 - 1)
    assert decode(encoded(NOISE, "jpeg"), 8).shape == (8, 8, 3)
    with pytest.raises(DecodeError, match="at most 2,399"):
        decode_whole(encoded(NOISE, "jpeg"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_progressive_jpeg_that_would_take_too_much_is_refused():
    """It keeps all coefficients. Here only the header of one says that it is so large."""
    data = bytearray(encoded(NOISE, "jpeg", progressive=True))
    start = data.index(b"\xff\xc2")  # SOF2: length, precision, height, width
    assert data[start + 5 : start + 9] == bytes([0, 40, 0, 60])
    data[start + 5 : start + 9] = (10_000).to_bytes(2, "big") * 2
    with pytest.raises(DecodeError, match="at most 50,000,000"):
        decode(bytes(data), 256)


def test_a_strip_is_cut_before_it_is_scaled():
    strip = RNG.integers(0, 256, (1, 200_000, 3), np.uint8)
    square = resize_to(strip, 256, "torchvision")
    assert square.shape == (256, 256, 3)
    np.testing.assert_array_equal(square, resize_to(strip[:, 99_996:100_004], 256, "torchvision"))


def test_no_program_is_started():
    """Pillow hands PostScript to Ghostscript; here it is no image."""
    with pytest.raises(DecodeError, match="no image in a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", 16)


def test_exif_data_may_lie_behind_a_colour_profile():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(FLAG, "jpeg", exif=exif)
    profile = b"\xff\xe2" + (60_002).to_bytes(2, "big") + bytes(60_000)
    assert decode_whole(data[:2] + profile + data[2:]).shape == (60, 40, 3)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    side = 5200
    assert side * side > LARGEST_WHOLE
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    pixels = np.stack([np.broadcast_to(ramp, (side, side))] * 3, -1)
    ours = decode(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels)), 64).astype(float)
    assert np.abs(ours - ramp[:: side // 64][:64][None, :, None]).max() < 6


# Type, how many, and the value as it lies there: SHORT, LONG, and what is none.
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("layout", "kind", "value"),
    [("HH", 3, 6), ("I", 4, 8), ("HH", 3, 9), ("I", 4, 2**31), ("BBH", 1, 6), ("I", 2, 6)],
)
def test_the_orientation_is_what_pillow_takes(order, layout, kind, value):
    mark, number = {"<": (b"II*\0", 8), ">": (b"MM\0*", 8)}[order]
    rest = [0] * (len(layout) - 1)
    lines = [(0x010F, 2, struct.pack("4s", b"abc"), 4)]
    lines.append((0x0112, kind, struct.pack(order + layout, value, *rest), 1))
    exif = mark + struct.pack(order + "IH", number, len(lines))
    for tag, type_, data, count in lines:
        exif += struct.pack(order + "HHI", tag, type_, count) + data
    exif += bytes(4)
    data = encoded(FLAG, "jpeg", exif=b"Exif\0\0" + exif)
    theirs = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
    turns = theirs if theirs in range(2, 9) else 1
    ours = image_files.orientation(exif)
    assert (ours if ours in range(2, 9) else 1) == turns
    assert decode_whole(data).shape == ((60, 40, 3) if turns > 4 else (40, 60, 3))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
@pytest.mark.parametrize("orientation", [None, 1, 3])
def test_xmp_data_count_where_exif_data_say_nothing(kind, orientation):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    if orientation:
        exif[0x0112] = orientation
    data = encoded(FLAG, kind, exif=exif, xmp=XMP)
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert decode_whole(data).shape == ((40, 60, 3) if orientation else (60, 40, 3))
    assert np.abs(decode_whole(data).astype(int) - np.asarray(theirs)).max() <= 3


def test_exif_data_may_be_a_text_in_a_png():
    """As ImageMagick writes them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    data = exif.tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    assert decode_whole(encoded(FLAG, "png", pnginfo=text)).shape == (60, 40, 3)


@pytest.mark.parametrize("compression", ["packbits", "tiff_lzw", "tiff_adobe_deflate"])
def test_a_tiff_may_have_many_strips(compression):
    noise = RNG.integers(0, 256, (20_000, 6, 3), np.uint8)
    data = encoded(noise, "tiff", strip_size=1, compression=compression)
    assert len(Image.open(io.BytesIO(data)).tag_v2[273]) == 20_000
    np.testing.assert_array_equal(decode_whole(data), noise)


def test_lengths_of_strips_below_0_make_up_for_no_others():
    """Readers disagree on which of two entries counts."""
    lines = [(259, 3, 1, 8), (279, 4, 1, 2**31), (279, 9, 1, 2**31)]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(lines))
    tiff += b"".join(struct.pack("<HHII", *line) for line in lines) + bytes(4)
    with pytest.raises(DecodeError, match="its strips have 4,294,967,296 bytes"):
        image_files.check_decodable(tiff)


def test_what_lies_behind_an_image_is_not_looked_at():
    """Some programs leave something there, and some file systems zeros."""
    for kind in ("png", "webp", "gif", "bmp", "ppm", "jpeg"):
        data = encoded(FLAG, kind)
        expected = decode_whole(data)
        for behind in (bytes(10**6), b"\xff" * 10**6, RNG.bytes(10**5), 1000 * b"zTXt"):
            np.testing.assert_array_equal(decode_whole(data + behind), expected, kind)


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (pipe, "it is no regular file"),
        (unix_socket, "No such device or address"),
        (lambda path: path.mkdir(), "it is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is no regular file"),
        (lambda path: path.symlink_to("/dev/tty"), "regular file|No such device"),
        (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_said_at_once(make, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    path = tmp_path.relative_to(tmp_path) / "a.jpg"
    make(path)
    assert is_image_file(path) is None
    with pytest.raises(DecodeError, match=says):
        read_file(path)


def test_a_file_that_is_larger_than_it_says_is_refused():
    """Those of /proc say 0."""
    with pytest.raises(OSError, match="at most 100 are read") as caught:
        read_bytes("/proc/self/maps", 100)
    assert caught.value.errno == errno.EFBIG
    assert len(read_bytes("/proc/self/stat", 10_000)) < 10_000


class TestDecoding:
    def test_a_square_of_the_right_size_keeps_its_pixels(self):
        image = random_image(0)
        np.testing.assert_array_equal(decode(encoded(image), 20), image)

    @pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (31, 33)])
    def test_the_shorter_side_is_scaled_and_the_centre_kept(self, height, width):
        """An image whose colours say where they were: bands along both axes."""
        rows, columns = np.mgrid[:height, :width]
        image = np.stack([rows * 2, columns * 2, rows * 0], -1).astype(np.uint8)
        small = decode(encoded(image), 16).astype(float)
        assert small.shape == (16, 16, 3)
        short = min(height, width)
        centres = (np.arange(16) + 0.5) * short / 16 - 0.5
        inner = slice(2, -2)  # the filter reaches over the edge at the outermost pixels
        expected_rows = 2 * ((height - short) / 2 + centres)
        expected_columns = 2 * ((width - short) / 2 + centres)
        assert np.abs(small[..., 0].mean(1) - expected_rows)[inner].max() < 1
        assert np.abs(small[..., 1].mean(0) - expected_columns)[inner].max() < 1

    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
    def test_other_colour_modes_become_rgb(self, mode):
        if mode == "I;16":
            image = Image.fromarray(random_image(0)[..., 0].astype(np.uint16) * 256)
        else:
            image = Image.fromarray(random_image(0)).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "jpeg" if mode in ("L", "CMYK") else "png")
        assert decode(buffer.getvalue(), 20).shape == (20, 20, 3)

    @pytest.mark.parametrize("kind", ["jpeg", "png"])
    def test_damage_is_an_error(self, kind):
        whole = encoded(random_image(0, 64, 64), kind)
        for data in (b"", b"not an image", whole[:100], whole[: len(whole) // 2]):
            with pytest.raises(DecodeError):
                decode(data, 16)

    @pytest.mark.parametrize("kind", ["jpeg", "png"])
    def test_an_image_without_measure_is_refused_before_it_is_decoded(self, kind, monkeypatch):
        data = encoded(random_image(0, 200, 300), kind)
        monkeypatch.setattr("flax_alexnet.data.decode.LARGEST_IMAGE", 200 * 300 - 1)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", (200 * 300 - 1) // 2)
        with pytest.raises(DecodeError, match=r"60,?000 pixels"):
            decode(data, 20)
