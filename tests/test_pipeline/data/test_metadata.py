"""Texts, profiles and EXIF but for the orientation decide over no pixels. Grey values of more than eight bits."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data.decoding import decode, decode_array
from pipeline.errors import DataError
from tests.pictures import smooth_picture
from tests.test_pipeline.data.test_images import encode

PHOTO = smooth_picture(0, 16, 24)
GPS_WITHOUT_PLACE = (
    b"Exif\0\0II*\0"
    + struct.pack("<IH", 8, 2)
    + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    + struct.pack("<HHIII", 0x8825, 4, 1, 38, 0)
    + struct.pack("<HHHI4s", 2, 1, 2, 2, b"N\0\0\0")
    + struct.pack("<HHIII", 2, 5, 3, 68, 0)
    + bytes(24)
)


def png(*chunks: tuple[bytes, bytes], spoil: bool = False) -> bytes:
    """PHOTO as PNG with chunks behind its header; `spoil`: with wrong checksums."""
    data = encode(PHOTO, "PNG")
    extra = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ spoil)
        for kind, content in chunks
    )
    return data[:33] + extra + data[33:]


LARGE = zlib.compress(b"layer " * 400_000)  # more than the megabyte that Pillow unpacks


@pytest.mark.parametrize(
    "data",
    [
        png((b"zTXt", b"history\0\0" + LARGE)),
        png((b"iTXt", b"history\0\1\0\0\0" + LARGE)),
        png((b"iCCP", b"profile\0\0" + LARGE)),
        png(*[(b"tEXt", b"note\0" + bytes(900_000))] * 80),  # 64 MB and more in all
        png((b"tEXt", b"note\0text"), spoil=True),
        png((b"eXIf", b"no EXIF at all")),
    ],
    ids=["text", "international text", "profile", "many texts", "a text of a wrong checksum", "EXIF that is none"],
)
def test_metadata_of_a_png_decide_over_no_pixels(data: bytes) -> None:
    np.testing.assert_array_equal(decode_array(data), np.asarray(PHOTO))


def test_a_png_that_is_torn_or_changed_stays_unreadable() -> None:
    data = png((b"tEXt", b"note\0text"))
    for spoilt in (data[: data.index(b"IDAT") + 40], data[:23] + b"\xff" + data[24:]):  # cut off; another height
        with pytest.raises(DataError, match="not a readable image"):
            decode(spoilt)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_turned_as_pillow_turns(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTO, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert decode(data).size == (PHOTO.size[::-1] if 5 <= orientation <= 8 else PHOTO.size)
    np.testing.assert_array_equal(decode_array(data), np.asarray(expected))


def test_the_orientation_is_taken_and_exif_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phones write 0/0 for a place that they don't know, and old Pillows fail to write that."""

    def refuse(*_: object) -> bytes:
        raise ZeroDivisionError("division by zero")

    data = encode(PHOTO, "JPEG", exif=GPS_WITHOUT_PLACE)
    monkeypatch.setattr(Image.Exif, "tobytes", refuse)
    assert decode(data).size == PHOTO.size[::-1]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM"])
def test_exif_that_can_not_be_read_turns_nothing(exif: bytes) -> None:
    data = encode(PHOTO, "JPEG", exif=exif, quality=95)
    assert decode(data).size == PHOTO.size
    np.testing.assert_array_equal(decode_array(data), decode_array(encode(PHOTO, "JPEG", quality=95)))


RAMP = np.linspace(0, 1, 24 * 16, dtype=np.float32).reshape(24, 16)


def tiff(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels), "TIFF")


def test_greys_of_more_than_eight_bits() -> None:
    """Floats from 0 to 1 are scaled, those up to 255 taken as they are; of 16 bits the high byte is kept."""
    np.testing.assert_array_equal(decode_array(tiff(RAMP))[..., 0], (RAMP * 255 + 0.5).astype(np.uint8))
    np.testing.assert_array_equal(decode_array(tiff(RAMP * 255))[..., 1], (RAMP * 255).astype(np.uint8))
    np.testing.assert_array_equal(decode_array(tiff((RAMP * 65535).astype(np.uint16)))[..., 2], (RAMP * 65535) // 256)
    np.testing.assert_array_equal(decode_array(tiff((RAMP * 65535).astype(np.int32)))[..., 2], (RAMP * 65535) // 256)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP * 4096, "floats from 0 to 4096: scale them to 0 to 1, or 0 to 255"),
        (RAMP - 0.5, r"floats from -0\.5 to 0\.5"),
        (np.where(RAMP > 0.5, np.float32("nan"), RAMP), "floats from nan to nan"),
        (RAMP / 0.001 + np.float32("inf"), "floats from inf to inf"),
        ((RAMP * 1e6).astype(np.int32), r"whole numbers from 0 to .*: scale them to 0 to 65535"),
        ((RAMP * -9).astype(np.int32), "whole numbers from -9 to 0"),
    ],
)
def test_greys_out_of_range_are_a_tombstone_with_the_reason(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(tiff(pixels))
