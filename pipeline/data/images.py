"""Where images come from: a class-folder tree, a flat folder or WebDataset tars, all addressed by one integer index.

    images = open_images("/data/imagenet/train")            # train/<class>/*.jpg
    images = open_images("/data/train-{000000..001281}.tar") # KEY.jpg beside KEY.cls
    images.key(7), images.label(7), images.read(7)

Folders are sorted by key, tars keep their members' order and come as the pattern names them; so index 7 is the same
sample in every stage and on every machine.
"""

import contextlib
import errno
import io
import os
import re
import struct
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path
from typing import Any, Literal

import braceexpand
import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import DataError, StorageError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
_BOMB_PIXELS = 178_956_970  # Pillow's own refusal: an image that would unpack to half a gigabyte

_ORIENTATION = 0x0112  # EXIF's tag

# A file that is gone, forbidden or none at all stays so; EIO, ESTALE, ETIMEDOUT and the like may pass.
_LASTING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
)
_PAUSES = (0.1, 0.4, 1.6)  # seconds before each further attempt

# What Pillow's decoders raise on bytes that are no image, or only the beginning of one.
_DECODE_ERRORS = (
    OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
    ZeroDivisionError, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class DataConfig(Config):
    """Which images."""

    path: str = Field(min_length=1)  # a folder (tree or flat) or tars (a glob or brace pattern)
    limit: int | None = Field(None, gt=0)  # at most so many, evenly spread over the whole
    workers: int = Field(2, ge=0, le=256)  # decoding processes per training process


@dataclass(frozen=True)
class ImageSource:
    """A list of encoded images. `key(i)` is the path inside the folder, or `<tar name>/<member>`."""

    kind: Literal["tree", "flat", "tar"]
    root: str
    files: tuple[str, ...]  # the tars; empty for folders
    keys: NDArray[np.bytes_]  # UTF-8, fixed width: a million keys in one block instead of a million objects
    lengths: NDArray[np.int64]  # bytes of each encoded image
    labels: NDArray[np.int64]  # -1 without a class
    offsets: NDArray[np.int64]  # (tar number, offset) rows; empty for folders
    classes: tuple[str, ...]  # names, by label; empty if unknown

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return bytes(self.keys[index]).decode()

    def label(self, index: int) -> int:
        return int(self.labels[index])

    @property
    def num_classes(self) -> int:
        return len(self.classes) or int(self.labels.max(initial=-1)) + 1

    def read(self, index: int) -> bytes:
        """The encoded bytes. What fails for a reason that may pass is tried again, for about two seconds.

        Raises:
            DataError: the file is gone, or may not be read.
            StorageError: the disk doesn't answer, or all of it is gone; no reason to hold the image for lost.
        """
        for pause in (*_PAUSES, None):
            try:
                return self._read(index)
            except OSError as error:
                problem = f"image {self.key(index)}: {error.strerror or error}"
                if error.errno == errno.ENOENT and self._is_gone():
                    raise StorageError(f"{problem}: {self.root} is gone or empty; mount it, then run again") from error
                if error.errno in _LASTING:
                    raise DataError(problem) from error
                if pause is None:
                    times = len(_PAUSES) + 1
                    raise StorageError(f"{problem}, {times} times: mend the disk or network, then run again") from error
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _read(self, index: int) -> bytes:
        if self.kind != "tar":
            return (Path(self.root) / self.key(index)).read_bytes()
        number, offset = self.offsets[index]
        with open(self.files[number], "rb") as tar:
            return os.pread(tar.fileno(), int(self.lengths[index]), int(offset))

    def _is_gone(self) -> bool:
        """Whether nothing at all is left of the dataset, as when a disk was unmounted."""
        if self.kind == "tar":
            return not any(map(os.path.exists, self.files))
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            return next(entries, None) is None
        return True

    def digest(self) -> str:
        """xxh3-128 of the ordered keys and byte lengths: tells whether this is the dataset that a cache was made of."""
        hasher = xxhash.xxh3_128()
        for key, length in zip(self.keys, self.lengths, strict=True):
            hasher.update(bytes(key) + b"\0" + int(length).to_bytes(8, "little"))
        return hasher.hexdigest()

    def select(self, indices: NDArray[np.int64]) -> "ImageSource":
        """The same source with only these samples, in this order."""
        offsets = self.offsets[indices] if len(self.offsets) else self.offsets
        return replace(
            self, keys=self.keys[indices], lengths=self.lengths[indices], labels=self.labels[indices], offsets=offsets
        )


def open_images(path: str, limit: int | None = None) -> ImageSource:
    """List the images at `path`; with `limit`, that many of them, evenly spread.

    Raises:
        DataError: nothing there, no images in it, or images both beside and inside class folders, or beside tars.
    """
    expanded = os.path.abspath(os.path.expanduser(path))
    tars = _find_tars(expanded)
    source = _list_tars(expanded, tars) if tars else _list_folder(Path(expanded))
    if not len(source):
        raise DataError(f"data.path={path}: no images in it (looked for {', '.join(sorted(EXTENSIONS))})")
    if limit is not None and limit < len(source):
        source = source.select(np.arange(limit, dtype=np.int64) * len(source) // limit)
    return source


def decode(data: bytes) -> Image.Image:
    """Encoded bytes → RGB image, upright (the EXIF rotation is applied).

    Greyscale, palette and CMYK become RGB, transparency is dropped, 16-bit greyscale keeps its high byte. Files that
    are truncated, damaged or would unpack to more than 179 million pixels raise DataError.
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
        DataError: as `decode`, or the image isn't H × W.
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


def _decode(data: bytes) -> NDArray[np.uint8] | Image.Image:
    try:
        pixels = _plain_jpeg(data)
        if pixels is not None:
            return pixels
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _BOMB_PIXELS:
                raise DataError(f"{image.width}x{image.height} pixels are more than the {_BOMB_PIXELS} allowed")
            return _convert(image)
    except _DECODE_ERRORS as error:
        # Without Pillow's "<_io.BytesIO object at 0x7f...>": a tombstone must say the same whoever meets the image.
        reason = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "", str(error)).split())
        raise DataError(f"not a readable image: {reason or type(error).__name__}") from error


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
    with Image.open(io.BytesIO(data)) as image:
        return bool(image.getexif().get(_ORIENTATION, 1) != 1)


def _convert(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def _find_tars(path: str) -> tuple[str, ...]:
    """The tars that a folder, a file, a glob or a brace pattern names; () when it is a folder of images."""
    if os.path.isdir(path):
        tars = tuple(sorted(glob(os.path.join(escape(path), "*.tar"))))
        if tars and (stray := next(_walk(Path(path), ""), None)):
            raise DataError(
                f"data.path={path}: tars ({os.path.basename(tars[0])}) and images ({stray[0]}) side by side: name the "
                "tars by a pattern such as '*.tar', or move one kind away"
            )
        return tars
    patterns = list(braceexpand.braceexpand(path))
    found = [name for pattern in patterns for name in (sorted(glob(pattern)) or [pattern])]
    missing = [name for name in found if not os.path.isfile(name)]
    if missing:
        raise DataError(f"data.path: no such file or folder: {missing[0]}")
    if not all(name.endswith(".tar") for name in found):
        raise DataError(f"data.path={path}: expected a folder of images or .tar files")
    return tuple(found)


def _list_folder(root: Path) -> ImageSource:
    entries = sorted(_walk(root, ""), key=lambda entry: entry[0])
    nested = [("/" in key) for key, _ in entries]
    if any(nested) and not all(nested):
        stray = entries[nested.index(False)][0]
        raise DataError(f"data.path={root}: images both in class folders and beside them ({stray}); move one kind away")
    tree = bool(nested) and nested[0]
    names = [key.split("/", 1)[0] for key, _ in entries] if tree else []
    classes = tuple(sorted(set(names)))
    number = {name: label for label, name in enumerate(classes)}
    return ImageSource(
        kind="tree" if tree else "flat",
        root=str(root),
        files=(),
        keys=_pack([key for key, _ in entries]),
        lengths=np.array([length for _, length in entries], dtype=np.int64),
        labels=np.array([number[n] for n in names] if tree else [-1] * len(entries), dtype=np.int64),
        offsets=np.empty((0, 2), np.int64),
        classes=classes,
    )


def _walk(root: Path, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue  # .ipynb_checkpoints is no class
            key = prefix + entry.name
            if entry.is_dir():
                yield from _walk(root, key + "/")
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:
                    size = 0  # a link to nowhere: an image that can't be read
                yield key, size


def _list_tars(path: str, tars: tuple[str, ...]) -> ImageSource:
    rows: list[tuple[str, int, int, int, int]] = []
    for number, tar in enumerate(tars):
        rows.extend(_list_tar(number, tar))
    return ImageSource(
        kind="tar",
        root=path,
        files=tars,
        keys=_pack([row[0] for row in rows]),
        lengths=np.array([row[1] for row in rows], dtype=np.int64),
        labels=np.array([row[2] for row in rows], dtype=np.int64),
        offsets=np.array([row[3:] for row in rows], dtype=np.int64).reshape(-1, 2),
        classes=(),
    )


def _list_tar(number: int, tar: str) -> list[tuple[str, int, int, int, int]]:
    """(key, length, label, tar number, offset) of each image; its class is the text of KEY.cls, if there is one."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                if not member.isfile():
                    continue
                stem, _, extension = member.name.rpartition(".")
                if "." + extension.lower() in EXTENSIONS:
                    images[stem] = (member.name, member.size, member.offset_data)
                elif extension == "cls":
                    labels[stem] = int(_member_bytes(members, member))
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(f"data.path: {tar} is not a sound WebDataset tar: {error}") from error
    shard = os.path.basename(tar)
    return [(f"{shard}/{name}", size, labels.get(stem, -1), number, at) for stem, (name, size, at) in images.items()]


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: Any = tar.extractfile(member)
    return bytes(file.read())


def _pack(keys: list[str]) -> NDArray[np.bytes_]:
    try:
        return np.array([key.encode() for key in keys], dtype=np.bytes_)
    except UnicodeEncodeError as error:
        name = ascii(error.object)
        raise DataError(
            f"data.path: the file name {name} is no UTF-8, as keys are: rename it, then run again"
        ) from error
