"""The walk over headers against tarfile, on whatever tarfile can write, and on what is damaged."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.tar_headers import Member, open_tar
from pipeline.errors import DataError


def without_slash(name: str) -> str:
    return name.rstrip("/") or "a"


def walk(path: Path) -> list[tuple[str, int, int, bytes]]:
    with open_tar(str(path)) as tar:
        files = [member for member in tar if isinstance(member, Member)]
        return [(os.fsdecode(file.name), file.offset, file.size, tar.read(file)) for file in files]


def by_tarfile(path: Path) -> list[tuple[str, int, int, bytes]]:
    with tarfile.open(path, "r:") as tar:
        files = [member for member in tar if member.isfile()]
        return [(file.name, file.offset_data, file.size, tar.extractfile(file).read()) for file in files]  # type: ignore[union-attr]


def write(path: Path, *members: tarfile.TarInfo, format: int = tarfile.PAX_FORMAT, content: bytes = b"x") -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


LETTERS = st.text(st.sampled_from("aB0 ._-/é漢\udce9=\n"), min_size=1, max_size=12)
LONG = st.builds(lambda part, times: "/".join([part] * times), LETTERS, st.integers(1, 40))
KINDS = [
    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
    tarfile.FIFOTYPE, tarfile.CHRTYPE, b"V",
]  # fmt: skip
MEMBERS = st.lists(
    st.tuples(
        st.one_of(LETTERS, LONG),
        st.sampled_from([0, 1, 511, 512, 513, 5000]),
        st.sampled_from(KINDS),
        st.one_of(st.just("target"), LONG),
        st.dictionaries(st.sampled_from(["comment", "mtime", "path", "X.é"]), LETTERS, max_size=3),
        st.sampled_from([0, 1.5, 2**40]),  # a time with a fraction, or too large for octal digits
    ),
    max_size=8,
)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(MEMBERS, st.sampled_from(FORMATS), st.sampled_from(["whole", "no end", "one block", "one member"]))
def test_equal_to_tarfile(tmp_path: Path, members: list, format: int, end: str) -> None:
    """Long names by prefix, by L and K, and by pax records; links and folders; files of any length; any end."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format, errors="surrogateescape", pax_headers={"comment": "of all"}) as tar:
        ends = [tar.offset]
        for number, (name, size, kind, link, records, mtime) in enumerate(members):
            if kind in KINDS[:3]:  # of a file with a slash at its end the kinds of headers make different things
                name, records = without_slash(name), {key: without_slash(value) for key, value in records.items()}
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mtime = kind, link, mtime
            if kind == tarfile.AREGTYPE and (name.endswith("/") or len(name) > 40):
                info.type = tarfile.REGTYPE  # a folder's for tarfile, behind a slash: also where a long name is cut off
            info.size = size if kind in (*KINDS[:3], b"V") else 0
            info.pax_headers = {keyword: value for keyword, value in records.items() if "\udce9" not in value}
            try:
                tar.addfile(info, io.BytesIO(bytes([number]) * size))
            except ValueError:
                continue  # ustar can't hold this name, link or time
            ends.append(tar.offset)
    whole = path.read_bytes()
    cut = {"whole": len(whole), "no end": ends[-1], "one block": ends[-1] + 512, "one member": ends[len(ends) // 2]}
    path.write_bytes(whole[: cut[end]])
    if path.stat().st_size:
        has_members = len(ends) > 1
        if end in ("no end", "one member"):
            with pytest.raises(DataError, match="it has no end mark, so it was cut off"):
                walk(path)
            return
        assert walk(path) == (by_tarfile(path) if has_members else [])  # tarfile wants a file behind a global header


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 2**40])
@pytest.mark.parametrize("format", FORMATS[1:])
def test_sizes_beyond_octal_digits(tmp_path: Path, size: int, format: int) -> None:
    """8 GiB and more: base 256 in GNU tars, a pax record elsewhere. The file has a hole in place of the bytes."""
    first, last = tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b.jpg")
    first.size = size
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(first.tobuf(format))
        start = file.tell()
        file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.write(last.tobuf(format) + bytes(1024))
    with open_tar(str(path)) as tar:
        assert [(m.name, m.offset, m.size) for m in tar if isinstance(m, Member)] == [
            (b"a.jpg", start, size),
            (b"b.jpg", start + -(-size // 512) * 512 + 512, 0),
        ]


def test_signed_checksums_and_unpadded_ends(tmp_path: Path) -> None:
    """As some old programs wrote them: a sum of signed bytes, and less than a block of zeros at the end."""
    path = write(tmp_path / "a.tar", tarfile.TarInfo("é.jpg"), format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    blank = data[:148] + b" " * 8 + data[156:512]
    data[148:156] = b"%06o\0 " % (sum(blank) - 256 * sum(byte > 127 for byte in blank))
    path.write_bytes(data[: 1024 + 100])
    assert walk(path) == by_tarfile(path) == [("é.jpg", 512, 1, b"x")]


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    """A tar that a copy cut off: between two files only the missing end mark shows it."""
    members = [tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b" * 200), tarfile.TarInfo("c.jpg")]
    for format in FORMATS[1:]:
        whole = write(tmp_path / "whole.tar", *members, format=format, content=bytes(700)).read_bytes()
        found = walk(tmp_path / "whole.tar")
        stops = [0, *(offset + 1024 for _, offset, _, _ in found)]
        path = tmp_path / "cut.tar"
        for cut in range(100, stops[-1], 100):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError, match=r"cut\.tar is not a sound WebDataset tar: it ends .*copy or pack"):
                walk(path)
        for stop in itertools.islice(stops, 1, None):
            path.write_bytes(whole[:stop])
            with pytest.raises(DataError, match=r"cut\.tar is not a sound WebDataset tar: it has no end mark"):
                walk(path)
        path.write_bytes(whole[: stops[-1]] + bytes(512))  # one block of zeros is enough for tar as well
        assert walk(path) == found


def test_what_follows_the_end_mark(tmp_path: Path) -> None:
    """tar itself reads nothing behind it: a second tar's files would be lost without a word."""
    whole = write(tmp_path / "a.tar", tarfile.TarInfo("a.jpg")).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole + whole)
    with pytest.raises(DataError, match=rf"another tar begins behind its end mark, at byte {len(whole)}, as `cat"):
        walk(tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(whole + b"a signature, or other bytes that are no header")
    assert walk(tmp_path / "c.tar") == walk(tmp_path / "a.tar")


@pytest.mark.parametrize("format", FORMATS[1:])
def test_links_have_their_targets(tmp_path: Path, format: int) -> None:
    """Short ones in the header, long ones before it, by L and K or by pax records."""
    links = [
        (kind, f"{n}.jpg", target) for n, (kind, target) in enumerate(itertools.product("12", ["a.jpg", "b" * 150]))
    ]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for kind, name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind.encode(), target
            tar.addfile(info)
    with open_tar(str(tmp_path / "a.tar")) as walked:
        found = [tuple(member) for member in walked]
    assert found == [(name.encode(), target.encode(), kind == "1") for kind, name, target in links]


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 511), st.integers(1, 255), st.integers(0, 2))
def test_a_header_that_changed_is_noticed(tmp_path: Path, at: int, change: int, member: int) -> None:
    """tarfile takes such a header for the end, and the files behind it for none."""
    path = write(tmp_path / "a.tar", *(tarfile.TarInfo(f"{number}.jpg") for number in range(3)))
    found = walk(path)
    data = bytearray(path.read_bytes())
    data[1024 * member + at] ^= change
    path.write_bytes(data)
    try:
        changed = walk(path)
    except DataError as error:
        message = str(error)
    else:  # the checksum's own bytes: a blank for a zero says the same
        message = f"no header at byte {1024 * member}:" if changed == found and 148 <= at < 156 else "nothing"
    assert f"no header at byte {1024 * member}:" in message


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 6143), st.integers(0, 255)), max_size=6), st.integers(0, 6144))
def test_damage_never_crashes_or_loops(tmp_path: Path, changes: list[tuple[int, int]], length: int) -> None:
    path = write(tmp_path / "a.tar", tarfile.TarInfo("d" * 150), tarfile.TarInfo("é.jpg"))
    data = bytearray(path.read_bytes()[:6144])
    for at, value in changes:
        data[at] = value
        head = at // 512 * 512
        total = sum(data[head : head + 148]) + 256 + sum(data[head + 156 : head + 512])
        data[head + 148 : head + 156] = b"%06o\0 " % total  # so that the checksum doesn't hide what stands in it
    path.write_bytes(data[:length])
    try:
        message = "" if all(size >= 0 for _, _, size, _ in walk(path)) else "a negative\nsize"
    except DataError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_called_so(tmp_path: Path, pack: object) -> None:
    path = write(tmp_path / "a.tar", tarfile.TarInfo("a.jpg"))
    path.write_bytes(pack(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"compressed .*: unpack it to a plain tar"):
        walk(path)


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_files_are_refused(tmp_path: Path, format: str) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    command = ["tar", "--sparse", f"--format={format}", "-cf", "a.tar", "a.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(DataError, match="is sparse: pack it without --sparse"):
        walk(tmp_path / "a.tar")
