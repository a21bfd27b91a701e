"""Where images come from: class folders, a flat folder, WebDataset tars or parquet, all addressed by one integer index.

    images = open_images("/data/imagenet/train")            # train/<class>/*.jpg
    images = open_images("/data/train-{000000..001281}.tar") # KEY.jpg beside KEY.cls
    images.key(7), images.label(7), images.read(7)

Folders are sorted by key; tars and parquet files keep their own order, and come as the pattern names them. So index 7
is the same sample in every stage and on every machine.
"""

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from glob import escape, glob
from pathlib import Path
from typing import NoReturn

import braceexpand
import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.listing import Kind, Listing, first_image
from pipeline.data.listing_index import is_noted_readable, note_readable, open_listing
from pipeline.data.naming import EXTENSIONS, show_counts
from pipeline.data.parquet.encoding import Damage
from pipeline.data.parquet.pages import Page, no_blocks, no_pages, read_value
from pipeline.errors import DataError, StorageError
from pipeline.locations import is_url

log = logging.getLogger(__name__)

# A file that is gone, forbidden or none at all stays so; EIO, ESTALE, ETIMEDOUT and the like may pass.
_LASTING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
)
_KINDS = (".tar", ".parquet")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_SPLIT = re.compile(r"(train|val|valid|validation|test)(?![a-z])", re.IGNORECASE)  # how folders and tars begin
_DIGEST_ROWS = 8192  # keys that are hashed at once
_PAUSES = (0.1, 0.4, 1.6)  # seconds before each further attempt


@dataclass(frozen=True)
class ImageSource:
    """A list of encoded images. `key(i)` is the path inside the folder, or `<file name>/<member or row>`."""

    kind: Kind
    root: str
    files: tuple[str, ...]  # the tars or parquet files; empty for folders
    keys: NDArray[np.bytes_]  # UTF-8, fixed width: a million keys in one block instead of a million objects
    lengths: NDArray[np.int64]  # bytes of each encoded image
    labels: NDArray[np.int64]  # -1 without a class
    offsets: NDArray[np.int64]  # (tar number, offset) or (page, offset in it) rows; empty for folders
    classes: tuple[str, ...]  # names, by label; empty if unknown
    text_class: str = ""  # a KEY.cls that holds no number, and so gives no label; empty if all do
    index: str = ""  # the file that the whole list is kept in; empty if in none
    listed: int = 0  # images of the whole list
    pages: NDArray[np.int64] = field(default_factory=no_pages)  # of parquet files, as the listing has them
    blocks: NDArray[np.int64] = field(default_factory=no_blocks)

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
                data = self._read(index)
                break
            except OSError as error:
                problem = f"image {self.key(index)}: {error.strerror or error}"
                if error.errno == errno.ENOENT and self._is_gone():
                    raise StorageError(f"{problem}: {self.root} is gone or empty; mount it, then run again") from error
                if error.errno in _LASTING:
                    raise DataError(problem) from error
                if pause is None:
                    short = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
                    mend = "raise `ulimit -n` or free memory" if short else "mend the disk or network"
                    raise StorageError(f"{problem}, {len(_PAUSES) + 1} times: {mend}, then run again") from error
                time.sleep(pause)
        if self.index and len(data) != self.lengths[index]:
            self._forget(index, len(data))
        return data

    def _forget(self, index: int, length: int) -> NoReturn:
        """The list is of another time than the images: take it away, and stop before a cache is made of both."""
        with contextlib.suppress(OSError):
            os.unlink(self.index)
        raise StorageError(
            f"image {self.key(index)} has {length} bytes and had {self.lengths[index]} when it was listed: run again, "
            f"which lists the images anew (remove {self.index} if it is still there)"
        )

    def _read(self, index: int) -> bytes:
        if self.kind == "parquet":
            return self._read_parquet(index)
        if self.kind != "tar":
            return (Path(self.root) / self.key(index)).read_bytes()
        number, offset = self.offsets[index]
        with open(self.files[number], "rb") as tar:
            return os.pread(tar.fileno(), int(self.lengths[index]), int(offset))

    def _read_parquet(self, index: int) -> bytes:
        number, offset = self.offsets[index].tolist()
        page = Page(*self.pages[number].tolist())
        try:
            return read_value(self.files[page.file], page, self.blocks, offset, int(self.lengths[index]))
        except Damage as error:
            raise DataError(f"image {self.key(index)}: {error}: fetch {self.files[page.file]} again") from error

    def ends(self, index: int, size: int) -> tuple[int, bytes, bytes]:
        """The bytes of an image, and its first and last `size`: a look that costs less than to read it.

        Raises:
            DataError, StorageError: as `read`, which is asked where the look fails.
        """
        if self.kind == "parquet":
            data = self.read(index)
            return len(data), data[:size], data[-size:]
        file, start = self._place(index)
        length = int(self.lengths[index])
        try:
            with open(file, "rb", buffering=0) as opened:
                descriptor = opened.fileno()
                head = os.pread(descriptor, size, start)
                return length, head, os.pread(descriptor, min(size, length), start + max(0, length - size))
        except OSError:
            data = self.read(index)
            return len(data), data[:size], data[-size:]

    @property
    def is_noted_readable(self) -> bool:
        """Whether an earlier look found every image of the whole list readable."""
        return is_noted_readable(self.index)

    def note_readable(self) -> None:
        """Note for later starts that every image is readable, if these are all of a kept list."""
        if len(self) == self.listed:
            note_readable(self.index)

    def _place(self, index: int) -> tuple[str, int]:
        """The file that holds an image, and where the image begins in it."""
        if self.kind != "tar":
            return f"{self.root}/{self.key(index)}", 0
        number, offset = self.offsets[index]
        return self.files[number], int(offset)

    def _is_gone(self) -> bool:
        """Whether nothing at all is left of the dataset, as when a disk was unmounted."""
        if self.files:
            return not any(map(os.path.exists, self.files))
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            return next(entries, None) is None
        return True

    def digest(self) -> str:
        """xxh3-128 of the ordered keys and byte lengths: tells whether this is the dataset that a cache was made of."""
        hasher = xxhash.xxh3_128()
        for start in range(0, len(self), _DIGEST_ROWS):
            keys, lengths = self.keys[start : start + _DIGEST_ROWS], self.lengths[start : start + _DIGEST_ROWS]
            hasher.update(_digest_input(keys, lengths))
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
        DataError: nothing there, no images in it, or images beside tars.
    """
    if is_url(path):
        raise DataError(f"data.path={path}: images are read from local paths alone: copy them to a disk, or mount them")
    expanded = os.path.abspath(os.path.expanduser(path))
    files = _find_files(expanded)
    listing, index = open_listing(expanded, files)
    source = ImageSource(
        kind=listing.kind,
        root=expanded,
        files=files,
        keys=listing.keys,
        lengths=listing.lengths,
        labels=listing.labels,
        offsets=listing.offsets,
        classes=listing.classes,
        text_class=listing.text_class,
        index=index,
        listed=len(listing),
        pages=listing.pages,
        blocks=listing.blocks,
    )
    if not len(source):
        found = f", which holds {show_counts(listing.passed_over)}" if listing.passed_over else ""
        raise DataError(f"data.path={path}: no images in it{found} (looked for .{', .'.join(sorted(EXTENSIONS))})")
    _say_what_is_left(path, listing, files)
    if limit is not None and limit < len(source):
        source = source.select(np.arange(limit, dtype=np.int64) * len(source) // limit)
    return source


def _digest_input(keys: NDArray[np.bytes_], lengths: NDArray[np.int64]) -> bytes:
    """Each key, a zero byte and the length as eight bytes, little-endian, one behind the other."""
    rows, width = len(keys), keys.dtype.itemsize
    table = np.zeros((rows, width + 9), np.uint8)
    table[:, :width] = np.ascontiguousarray(keys).view(np.uint8).reshape(rows, width)
    table[:, width + 1 :] = lengths.astype("<i8").view(np.uint8).reshape(rows, 8)
    used = np.ones(table.shape, bool)
    used[:, :width] = np.arange(width) < np.char.str_len(keys)[:, None]
    return table[used].tobytes()


def _say_what_is_left(path: str, listing: Listing, files: tuple[str, ...]) -> None:
    """One line about files that are there and not among the images, and one where two sets are taken for one."""
    if listing.passed_over:
        log.info("data.path=%s: %d images; passed over: %s", path, len(listing), show_counts(listing.passed_over))
    names = map(os.path.basename, files) if files else listing.classes
    splits = {match[0].lower() for name in names if (match := _SPLIT.match(name))}
    if "train" in splits and len(splits) > 1:
        log.warning(
            "data.path=%s holds %s, and all of it is taken: name one part if validation images should stay out",
            *(path, " and ".join(sorted(splits))),
        )


def _find_files(path: str) -> tuple[str, ...]:
    """The tars or parquet files that a folder, a file, a glob or a brace pattern names; () for a folder of images."""
    if os.path.isdir(path):
        tars, tables = (sorted(glob(os.path.join(escape(path), f"*{kind}"))) for kind in _KINDS)
        stray = first_image(path) if tars or tables else None
        if tars and stray:
            raise DataError(
                f"data.path={path}: tars ({os.path.basename(tars[0])}) and images ({stray}) side by side: name the "
                "tars by a pattern such as '*.tar', or move one kind away"
            )
        # Tables beside tars or images describe them: those of img2dataset, or a metadata.parquet.
        return tuple(tars or ([] if stray else tables))
    try:
        patterns = [path] if os.path.isfile(path) else list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise DataError(f"data.path={path}: its braces don't pair") from error
    found = [name for pattern in patterns for name in (sorted(glob(pattern)) or [pattern])]
    folder = next(filter(os.path.isdir, found), None)
    if folder is not None:
        raise DataError(
            f"data.path={path}: a pattern names tars, and {folder} is a folder: give one folder (those inside it are "
            "read), or a pattern that ends in .tar"
        )
    missing = [name for name in found if not os.path.isfile(name)]
    if missing:
        raise DataError(f"data.path: no such file or folder: {missing[0]}")
    odd = next((name for name in found if not name.endswith(_KINDS)), None)
    if odd is not None:
        unpack = ": unpack it to a plain tar" if odd.endswith(_COMPRESSED) else ""
        raise DataError(f"data.path={path}: expected a folder of images, .tar or .parquet files, not {odd}{unpack}")
    return _of_one_kind(path, found)


def _of_one_kind(path: str, files: Sequence[str]) -> tuple[str, ...]:
    kinds = {os.path.splitext(file)[1] for file in files}
    if len(kinds) > 1:
        raise DataError(f"data.path={path}: .tar and .parquet files side by side: name one kind by a pattern")
    return tuple(files)
