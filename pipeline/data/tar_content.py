"""What a tar holds: one image a key, by WebDataset's rule, its class, and how many members are neither.

A key is all before the first dot of the base name (https://github.com/webdataset/webdataset). What could be meant in
two ways is refused by name.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from pipeline.data.naming import (
    HIDDEN,
    IMAGE_ENDINGS,
    companion,
    describe_ending,
    is_hidden_path,
    key_of,
)
from pipeline.data.tar_headers import Link, Member, TarWalk, open_tar, without_dot
from pipeline.errors import DataError

_LONGEST_NUMBER = 256  # bytes of a KEY.cls that is read


def read_content(tar: str) -> "TarContent":
    """Walk over a tar.

    Raises:
        DataError: as `open_tar`; an image or a class that is there twice, two images of one key, or a link to what
            isn't in the tar.
    """
    with open_tar(tar) as members:
        content = TarContent(tar, members)
        content.gather()
        content.leave_companions()
    return content


def check_names(tars: Sequence[str], keys: NDArray[np.bytes_]) -> None:
    """Samples are told apart by their tar's name: two tars of one name must not hold the same one."""
    if len({os.path.basename(tar) for tar in tars}) == len(tars):
        return
    names, counts = np.unique(keys, return_counts=True)
    if (counts > 1).any():
        name = os.fsdecode(bytes(names[int(counts.argmax())]))
        raise DataError(
            f"data.path: {name} is there twice, in tars of one name: name each tar once, and give tars of several "
            "folders different names"
        )


class TarContent:
    """The images of a tar, as they were packed.

    Attributes:
        text_class: where a class is no number, in words; empty where all are.
        passed_over: why → how many members are no image and no class.
        stamp: bytes and mtime in ns, as they were before the tar was read.
    """

    def __init__(self, tar: str, members: TarWalk) -> None:
        self._tar, self._members, self.stamp = tar, members, members.stamp
        self.text_class = ""
        self.passed_over: Counter[str] = Counter()
        self._images: dict[bytes, Member] = {}  # by their paths without the ending; a.seg.png by all of it
        self._dotted: list[bytes] = []  # paths such as a.seg.png
        self._labels: dict[bytes, int] = {}  # by the paths of .cls files without the ending

    def images(self) -> list[Member]:
        return list(self._images.values())

    def labels(self) -> list[int]:
        """The class of each image, -1 without one: that of KEY.cls or, of a.v2.jpg, of a.v2.cls."""
        found = {path: self._labels.get(path, -1) for path in self._images}
        for path in self._dotted:
            if path in found:
                found[path] = self._labels.get(path.rpartition(b".")[0], self._labels.get(key_of(path), -1))
        return list(found.values())

    def gather(self) -> None:
        """Sort every member into images, classes and the rest."""
        last_folder, prefix, in_hidden = b"", b"", False
        for member in self._members:
            folder, slash, base = member.name.rpartition(b"/")
            if folder != last_folder:
                last_folder, prefix, in_hidden = folder, without_dot(folder + slash), is_hidden_path(folder)
            stem, _, ending = base.rpartition(b".")
            ending = ending.lower()
            if in_hidden or base[:1] == b".":
                self.passed_over[HIDDEN] += 1
            elif not stem:
                self.passed_over[describe_ending(b"")] += 1
            elif ending == b"cls":
                self._add_label(member, prefix + stem)
            elif ending not in IMAGE_ENDINGS:
                self.passed_over[describe_ending(ending)] += 1
            elif b"." in stem:
                self._dotted.append(prefix + base)
                self._add_image(member, prefix + base)
            else:
                self._add_image(member, prefix + stem)

    def leave_companions(self) -> None:
        """Pass over images such as KEY.seg.png beside KEY.jpg. Where the latter is absent, the former is the image."""
        alone: dict[bytes, bytes] = {}
        for path in self._dotted:
            key = key_of(path)
            if key in self._images:
                self.passed_over[companion(path)] += 1
                del self._images[path]
            elif alone.setdefault(key, path) is not path:
                self._refuse_two(alone[key], path)

    def _add_image(self, member: Member | Link, path: bytes) -> None:
        former = self._images.get(path)
        if former is not None:
            self._refuse_two(former.name, member.name)
        self._images[path] = member if isinstance(member, Member) else self._follow(member)

    def _add_label(self, member: Member | Link, stem: bytes) -> None:
        if stem in self._labels:
            self._refuse_two(member.name, member.name)
        label = _class_number(self._members, member if isinstance(member, Member) else self._follow(member))
        self._labels[stem] = -1 if label is None else label
        if label is None and not self.text_class:
            self.text_class = f"{os.path.basename(self._tar)}/{os.fsdecode(member.name)}"

    def _follow(self, link: Link) -> Member:
        """The file that a link means, under the link's own name. Hard links start at the root, others don't."""
        beside = posixpath.dirname(without_dot(link.name))
        target = link.target if link.is_hard else posixpath.normpath(posixpath.join(beside, link.target))
        file = self._members.files.get(without_dot(target))
        if file is None:
            raise DataError(
                f"data.path: {self._tar}: {_show(link.name)} is a {'hard' if link.is_hard else 'symbolic'} link to "
                f"{_show(link.target)}, no file in this tar: pack the files themselves (tar -h follows links)"
            )
        return file._replace(name=link.name)

    def _refuse_two(self, former: bytes, name: bytes) -> NoReturn:
        if without_dot(former) == without_dot(name):
            problem = f"holds {_show(name)} twice: pack it again, each sample under a key of its own"
        else:
            problem = (
                f"has {_show(former)} and {_show(name)}, two images of one key (all before the first dot): pack it "
                "again with one image a key, and masks as KEY.seg.png beside KEY.jpg"
            )
        raise DataError(f"data.path: {self._tar} {problem}")


def _class_number(tar: TarWalk, member: Member) -> int | None:
    """None: the class is no number, or one that no label can hold."""
    if member.size > _LONGEST_NUMBER:
        return None
    try:
        number = int(tar.read(member))
    except ValueError:
        return None
    return number if abs(number) < 2**63 else None


def _show(name: bytes) -> str:
    return name.decode(errors="replace")
