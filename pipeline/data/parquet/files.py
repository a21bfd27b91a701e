"""The images of parquet files, as the Hugging Face hub hands them out: a column of bytes, and one of classes.

The schema's own metadata name both columns and the classes; without them, columns `image` and `label` are taken.
"""

import importlib.util
import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.listing import Listing, spread
from pipeline.data.naming import join, pack
from pipeline.data.parquet.encoding import Compact, Damage
from pipeline.data.parquet.pages import DAMAGES, Chunk, Column, no_blocks, no_pages, pread, walk_column
from pipeline.data.tar_content import check_names
from pipeline.errors import DataError

# The numbers of fields in a footer: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
_GROUPS = 4  # of FileMetaData
_COLUMNS, _ROWS = 1, 3  # of RowGroup
_FACTS = 3  # of ColumnChunk
_CODEC, _COMPRESSED, _DATA_OFFSET, _DICTIONARY_OFFSET = 4, 7, 9, 11  # of ColumnMetaData
_CODECS = dict(enumerate(("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")))
_FOOTER_END = 8  # bytes behind a footer: its length, and the magic number


class _Columns(NamedTuple):
    """What is read of a file; paths in the schema have dots."""

    image: str  # the column of bytes
    path: str  # of names; empty where there is none
    label: str  # empty where there is none
    classes: tuple[str, ...]


class _File(NamedTuple):
    keys: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    text_class: str
    classes: tuple[str, ...]
    column: Column  # of all row groups
    stamp: tuple[int, int]


def list_parquet(files: Sequence[str]) -> Listing:
    """The images of parquet files in their order. A key is FILE/ROW, and the image's own name where it has one.

    Every byte is read once: nothing else says how long an image is.

    Raises:
        DataError: pyarrow is missing; a file that can't be read, has no column of images, or other classes than the
            first one; a row without an image; two files of one name.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"data.path: {files[0]}: parquet files need pyarrow: pip install -e '.[parquet]'")
    parts = spread(_list_file, files, "file")
    for file, part in zip(files, parts, strict=True):
        if part.classes != parts[0].classes:
            raise DataError(f"data.path: {file} has other classes than {files[0]}: name files of one data set")
    keys = join([part.keys for part in parts])
    check_names(files, keys)
    column = _one_column([part.column for part in parts], range(len(parts)))
    return Listing(
        kind="parquet",
        classes=parts[0].classes,
        text_class=next((part.text_class for part in parts if part.text_class), ""),
        keys=keys,
        lengths=column.values[:, 2].copy(),
        labels=np.concatenate([part.labels for part in parts]),
        offsets=column.values[:, :2].copy(),
        watched=pack([os.fsencode(file) for file in files]),
        stamps=np.array([part.stamp for part in parts], dtype=np.int64),
        passed_over={},
        pages=column.pages,
        blocks=column.blocks,
    )


def _one_column(parts: Sequence[Column], files: Sequence[int]) -> Column:
    """Several columns one behind the other, each of the file with this number."""
    pages, blocks, values = list[Any](), list[Any](), list[Any]()
    page_count = block_count = 0
    for part, file in zip(parts, files, strict=True):
        numbered = part.pages.copy()
        numbered[:, 0] = file
        numbered[numbered[:, 5] >= 0, 5] += block_count
        pages.append(numbered)
        blocks.append(part.blocks)
        values.append(part.values + np.array([page_count, 0, 0]))
        page_count, block_count = page_count + len(part.pages), block_count + len(part.blocks)
    return Column(np.concatenate(pages), np.concatenate(blocks), np.concatenate(values))


def _list_file(path: str) -> _File:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open(path, "rb", buffering=0) as opened, ParquetFile(path) as file:
            facts = os.fstat(opened.fileno())
            columns = _columns(file.schema_arrow)
            parts = [walk_column(chunk) for chunk in _chunks(file, columns.image, opened.fileno())]
            rows = sum(len(part.values) for part in parts)
            labels, text_class = _labels(file, columns.label, os.path.basename(path), rows)
            keys = _keys(file, columns.path, os.path.basename(path), rows)
    except (OSError, Damage, pyarrow.ArrowException, *DAMAGES) as error:
        reason = "its footer is damaged"
        if isinstance(error, OSError | Damage | pyarrow.ArrowException):
            reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise DataError(f"data.path: {path} is not a parquet file of images that can be read: {reason}") from error
    nothing = Column(no_pages(), no_blocks(), np.empty((0, 3), np.int64))
    column = _one_column([nothing, *parts], [0] * (1 + len(parts)))
    return _File(keys, labels, text_class, columns.classes, column, (facts.st_size, facts.st_mtime_ns))


def _columns(schema: Any) -> _Columns:
    """Raises Damage: no column of images."""
    features = _features(schema.metadata or {})
    image = _choose("image", schema.names, [name for name, facts in features.items() if facts["_type"] == "Image"])
    label = _choose("label", schema.names, [name for name, facts in features.items() if facts["_type"] == "ClassLabel"])
    if not image:
        raise Damage(f"it has columns {', '.join(schema.names)}, and none of images called `image`")
    kind = schema.field(image).type
    children = {kind.field(number).name for number in range(kind.num_fields)}
    if kind.num_fields and "bytes" not in children:
        raise Damage(f"column {image} is {kind}, and no bytes of images")
    return _Columns(
        image=f"{image}.bytes" if children else image,
        path=f"{image}.path" if "path" in children else "",
        label=label,
        classes=tuple(features.get(label, {}).get("names") or ()),
    )


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What Hugging Face's metadata say of plain columns; nested features, which are structs or lists, are left out."""
    try:
        described = json.loads(metadata.get(b"huggingface", b"{}"))
    except ValueError as error:
        raise Damage("its Hugging Face metadata are no JSON") from error
    features = ((described or {}).get("info") or {}).get("features") or {}
    return {name: facts for name, facts in features.items() if isinstance(facts, dict) and "_type" in facts}


def _choose(name: str, present: Sequence[str], described: Sequence[str]) -> str:
    """The column of this name, or else the first one that the metadata describe so; empty where there is none."""
    return name if name in present else next((other for other in described if other in present), "")


def _chunks(file: Any, column: str, descriptor: int) -> list[Chunk]:
    """Where the values of a column lie, row group by row group."""
    number = [file.schema.column(place).path for place in range(len(file.schema))].index(column)
    described = file.schema.column(number)
    if described.max_repetition_level or described.physical_type != "BYTE_ARRAY":
        raise Damage(f"column {column} is {described.physical_type}, and no bytes of one image a row")
    chunks = []
    for group in _footer(descriptor)[_GROUPS]:
        facts = group[_COLUMNS][number][_FACTS]
        start = min(facts[field] for field in (_DICTIONARY_OFFSET, _DATA_OFFSET) if facts.get(field))
        codec, size = _CODECS[facts[_CODEC]], facts[_COMPRESSED]
        chunks.append(Chunk(descriptor, start, size, codec, group[_ROWS], described.max_definition_level))
    return chunks


def _footer(descriptor: int) -> dict[int, Any]:
    """What an open file says of itself, by the numbers of its fields.

    pyarrow has read it too. But where a codec or statistics are damaged, its accessors end the process.
    """
    end = os.fstat(descriptor).st_size - _FOOTER_END
    length = int.from_bytes(pread(descriptor, end, 4), "little")
    return Compact(pread(descriptor, end - length, length)).struct()


def _labels(file: Any, column: str, name: str, rows: int) -> tuple[NDArray[np.int64], str]:
    """The class of each row, -1 without one; and where a class is text, in words."""
    import pyarrow

    if not column:
        return np.full(rows, -1, np.int64), ""
    values = _read_column(file, column, rows).column(column)
    if pyarrow.types.is_integer(values.type):
        return values.cast(pyarrow.int64()).fill_null(-1).to_numpy(), ""
    return np.full(rows, -1, np.int64), f"column {column} of {name}"


def _keys(file: Any, column: str, name: str, rows: int) -> NDArray[np.bytes_]:
    if not column:
        return pack([os.fsencode(f"{name}/{row}") for row in range(rows)])
    image, _, child = column.rpartition(".")
    paths = _read_column(file, column, rows).column(image).combine_chunks().field(child).to_pylist()
    bases = [posixpath.basename(path or "").replace("\0", "") for path in paths]
    return pack([os.fsencode(f"{name}/{row}" + (f"/{base}" if base else "")) for row, base in enumerate(bases)])


def _read_column(file: Any, column: str, rows: int) -> Any:
    """A table of one column. Raises Damage: it has another number of rows."""
    table = file.read(columns=[column], use_threads=False)
    if len(table) != rows:
        raise Damage(f"it has {rows} images, and {len(table)} rows of column {column}")
    return table
