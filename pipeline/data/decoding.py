"""Encoded images → RGB pixels, upright; what is no readable image is an error in the same words each time."""

import contextlib
import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.errors import DataError, StorageError

_BOMB_PIXELS = 178_956_970  # Pillow's own refusal: an image that would unpack to half a gigabyte
_LONGEST_SIDE = (2**31 - 1) // 64 - 8  # pixels of a row that Pillow's decoders can count in bits

_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what makes an image of this orientation upright

_PNG = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"})  # of a PNG; eXIf: its orientation
_XMP = b"XML:com.adobe.xmp\0"  # an iTXt chunk that may hold the orientation too
_LARGEST_XMP = 1 << 20  # bytes that Pillow reads

# Pillow opens nothing else. Its EPS plugin starts Ghostscript, its WMF plugin asks the system, IPTC opens any other.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_REFUSED = {
    b"%!PS": "EPS",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"\x01\0\0\0": "EMF",
}  # by first bytes

# What Pillow's decoders raise on bytes that are no image, or only the beginning of one.
_DECODE_ERRORS = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, RuntimeError,
    AssertionError, BufferError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_NUMBER_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of Pillow
_SPARE = 64 << 20  # bytes that a decoder may need beside the pixels


def decode(data: bytes) -> Image.Image:
    """Encoded bytes → RGB image, upright (the EXIF rotation is applied).

    Greyscale, palette and CMYK become RGB, transparency is dropped, 16-bit greyscale keeps its high byte, floats from
    0 to 1 are scaled to 0 to 255. Files that are truncated, damaged or would unpack to more than 179 million pixels
    raise DataError, and so do greyscale values out of these ranges. Metadata but the orientation decide nothing.
    """
    decoded = _decode(data)
    return Image.fromarray(decoded) if isinstance(decoded, np.ndarray) else decoded


def decode_array(data: bytes) -> NDArray[np.uint8]:
    """Decode as `decode` does, to pixels [H, W, 3], C-contiguous: of a plain JPEG no image object is made."""
    decoded = _decode(data)
    return decoded if isinstance(decoded, np.ndarray) else np.array(decoded)


def decode_pixels(data: bytes, out: NDArray[np.uint8]) -> None:
    """Decode as `decode` does, into `out` uint8 [H, W, 3], C-contiguous: no image object and no copy.

    Raises:
        DataError, StorageError: as `decode`, or the image isn't H × W.
    """
    try:
        if _is_plain_jpeg(data, out.shape[:2]):
            simplejpeg.decode_jpeg(data, "RGB", buffer=out)
            return
    except ValueError:
        pass  # irregular: Pillow decides below
    image = decode(data)
    if (image.height, image.width) != out.shape[:2]:
        raise DataError(f"an image of {image.height}x{image.width} pixels where {out.shape[0]}x{out.shape[1]} belong")
    out[...] = np.asarray(image)


def decode_numbers(data: bytes) -> NDArray[np.int32]:
    """A picture of numbers, as label files are → [H, W]: its palette's indices, or its grey values of 1 to 16 bits.

    Raises:
        DataError: no readable image, or one of colours. StorageError: as `decode`.
    """
    try:
        with open_image(data) as image:
            if image.mode not in _NUMBER_MODES:
                raise DataError(f"its pixels are {image.mode}, not one number each: give a grey or palette PNG")
            return np.asarray(image).astype(np.int32)
    except MemoryError as error:
        raise _memory_is_full() from error
    except _DECODE_ERRORS as error:
        raise _explain(error, 0) from error


def _decode(data: bytes) -> NDArray[np.uint8] | Image.Image:
    try:
        return _decode_all(data)
    except DataError:
        without_metadata = _without_metadata(data)
        if without_metadata is not None:
            with contextlib.suppress(DataError):  # the first one says it better
                return _decode_all(without_metadata)
        raise


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG without texts, colour profile and the like, which Pillow limits in size; None where there is none."""
    if not data.startswith(_PNG):
        return None
    chunks, at = [_PNG], len(_PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : end - 4]
        is_xmp = kind == b"iTXt" and content.startswith(_XMP) and len(content) < _LARGEST_XMP
        if kind in _PIXEL_CHUNKS or is_xmp:
            chunks.append(data[at:end])
        at = end
    kept = b"".join(chunks)
    return kept if len(kept) < len(data) else None


def _decode_all(data: bytes) -> NDArray[np.uint8] | Image.Image:
    pixels = 0
    try:
        decoded = _plain_jpeg(data)
        if decoded is not None:
            return decoded
        with open_image(data) as image:
            pixels = image.width * image.height
            if pixels > _BOMB_PIXELS or max(image.size) > _LONGEST_SIDE:
                raise DataError(f"{image.width}x{image.height} pixels are more than the {_BOMB_PIXELS} allowed")
            return _convert(image)
    except MemoryError as error:
        raise _memory_is_full() from error
    except _DECODE_ERRORS as error:
        raise _explain(error, pixels) from error


def _explain(error: Exception, pixels: int) -> DataError:
    """What a decoder's error means. StorageError: it says nothing about the image."""
    if isinstance(error, OSError) and error.errno is not None:  # the system's word; a decoder's has no number
        raise StorageError(f"an image can't be decoded: {error.strerror}; mend that, then run again") from error
    _check_memory(pixels)
    # Without Pillow's "<_io.BytesIO object at 0x7f...>": a tombstone must say the same whoever meets the image.
    reason = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "", str(error)).split())
    return DataError(f"not a readable image: {reason or type(error).__name__}")


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Encoded bytes → Pillow's image, not yet decoded. The only place that asks Pillow: it starts no other program.

    Raises:
        DataError: EPS, PostScript, WMF or EMF. UnidentifiedImageError, OSError, ...: what Pillow raises.
    """
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        refused = _REFUSED.get(data[:4])
        if refused is None:
            raise
        raise DataError(f"not a readable image: {refused} is no raster format and is never opened") from error


def _check_memory(pixels: int) -> None:
    """StorageError where memory is short: libjpeg and others call their lack of it a broken stream.

    The memory that the decoder needed is asked for and given back untouched.
    """
    try:
        np.empty(8 * min(pixels, _BOMB_PIXELS) + _SPARE, np.uint8)
    except MemoryError as error:
        raise _memory_is_full() from error


def _memory_is_full() -> StorageError:
    return StorageError(
        "memory is full where an image is decoded, which says nothing about the image: lower data.workers or "
        "batch_size, or give the job more memory, then run again"
    )


def _plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """An upright colour JPEG through libjpeg-turbo directly: Pillow's pixels, faster. None for all else.

    What simplejpeg finds irregular, such as stray bytes between segments, is left to Pillow's judgement.
    """
    try:
        if not _is_plain_jpeg(data):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def _is_plain_jpeg(data: bytes, size: tuple[int, ...] | None = None) -> bool:
    """Whether these are an upright colour JPEG's bytes, of height and width `size` if given. ValueError: irregular."""
    if not data.startswith(b"\xff\xd8") or _is_turned(data):
        return False
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    return space == "YCbCr" and height * width <= _BOMB_PIXELS and size in (None, (height, width))


def _is_turned(data: bytes) -> bool:
    """Whether EXIF or XMP ask for a rotation. Most files have neither, and looking is cheaper than parsing."""
    at = 2
    while data[at : at + 2] != b"\xff\xe1":  # APP1, where both live, before the scan begins
        if data[at : at + 2] == b"\xff\xff":  # markers may be padded
            at += 1
            continue
        if data[at : at + 1] != b"\xff" or data[at + 1 : at + 2] == b"\xda":
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    with open_image(data) as image:
        return _orientation(image) != 1


def _orientation(image: Image.Image) -> int:
    """EXIF's or XMP's number, 1 to 8; 1, which is upright, where it can't be read. All else of EXIF is left alone."""
    try:
        number = image.getexif().get(_ORIENTATION, 1)
    except _DECODE_ERRORS:
        return 1
    return number if number in _TURNS else 1


def _convert(image: Image.Image) -> Image.Image:
    image.load()  # a TIFF turns itself here
    method = _TURNS.get(_orientation(image))
    upright = image if method is None else image.transpose(method)
    if upright.mode.startswith(("I", "F")):
        upright = Image.fromarray(_grey_bytes(np.asarray(upright), is_float=upright.mode == "F"))
    return upright.convert("RGB")


def _grey_bytes(pixels: NDArray[Any], *, is_float: bool) -> NDArray[np.uint8]:
    """Grey values of more than eight bits [H, W] → uint8.

    Raises:
        DataError: they are out of the range that a rule is given for; cut off, they would be a blank square.
    """
    low, high, highest = pixels.min(), pixels.max(), 255 if is_float else 65535
    if not (low >= 0 and high <= highest):  # nor NaN
        kind = "floats" if is_float else "whole numbers"
        unit = "0 to 1, or 0 to 255" if is_float else "0 to 65535"
        raise DataError(f"its pixels are {kind} from {low:g} to {high:g}: scale them to {unit}")
    if not is_float:
        return (pixels >> 8).astype(np.uint8)
    return (pixels * 255 + 0.5 if high <= 1 else pixels).astype(np.uint8)
