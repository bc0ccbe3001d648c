"""The parts of image files, counted before a library decodes them."""

import io

import numpy as np
import pytest
from PIL import Image

from flax_alexnet.data.image_files import (
    SCAN,
    DecodeError,
    check_decodable,
    count_scans,
    jpeg_orientation,
    jpeg_segments,
    plain_jpeg,
)
from tests.images import encoded, random_image


def jpeg(**options):
    return encoded(random_image(0), "jpeg", **options)


def test_segments_end_with_the_first_scan():
    segments = jpeg_segments(jpeg())
    assert [segment.kind for segment in segments].count(SCAN) == 1
    assert segments[-1].kind == SCAN
    with pytest.raises(DecodeError, match="ends before its pixels begin"):
        jpeg_segments(jpeg()[:20])


def test_scans_are_counted():
    for options, several in (({}, False), ({"progressive": True}, True)):
        content = jpeg(**options)
        assert (count_scans(content, jpeg_segments(content)[-1]) > 1) is several


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_that_of_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg(exif=exif)
    assert jpeg_orientation(content, jpeg_segments(content)) == orientation


def test_without_comments_and_profiles_the_pixels_are_the_same():
    content = jpeg(comment=b"x" * 1000, icc_profile=b"y" * 1000)
    plain = plain_jpeg(content, jpeg_segments(content))
    assert len(plain) < len(content) - 2000
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in (content, plain)]
    np.testing.assert_array_equal(*pixels)


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "bmp", "gif", "ppm"])
def test_what_programs_write_is_decodable(kind):
    check_decodable(encoded(random_image(0), kind))


def test_a_png_of_chunks_alone_is_refused():
    chunk = b"\0\0\0\0teXt" + b"\0" * 4
    with pytest.raises(DecodeError, match="chunks: too many"):
        check_decodable(b"\x89PNG\r\n\x1a\n" + chunk * (2**17 + 1))
