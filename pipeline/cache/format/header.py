"""cache.json: what a cache holds, from which teacher, and how. Written once, before the first shard.

The file has one byte form (sorted keys, indented by one), so that any edit shows; `fingerprint` is the sha256 of the
canonical JSON of everything else, and every record's checksum starts from it.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.cache.files import read_whole
from pipeline.cache.format.quantiser import Quantiser
from pipeline.configs.cache import AttentionKind, StoreName, SummaryKind
from pipeline.errors import CacheDamage, CacheError, ConfigError, wanted

FILE = "cache.json"
# Bounds of what a header may ask for: tools make room by them before they have seen a byte of data.
MAX_SHARDS = 10**6  # the names of commit records have six digits
_MAX_SAMPLES = 10**9  # the names of tar members have nine
_MAX_VALUES = 1 << 28  # of one view's tokens, or of its attention


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _plain(value: Any) -> Any:
    """Tuples to lists, keys to strings: what the value is once it has been through a file."""
    try:
        return json.loads(canonical(value))
    except TypeError as error:
        raise ValueError(f"is no JSON: {error}") from error


JsonDict = Annotated[dict[str, Any], BeforeValidator(_plain)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class DatasetSection(_Section):
    """The images: where they were, how many, and the digest of their ordered keys and byte lengths."""

    source: str
    kind: str
    count: int = Field(ge=1, le=_MAX_SAMPLES)
    digest: str


class ViewSection(_Section):
    """How views were drawn: `count` of them for each sample, shown to the student at `image_size` pixels."""

    model_config = ConfigDict(extra="allow")

    count: int = Field(ge=1, le=1000)
    seed: int
    image_size: int = Field(ge=1, le=1 << 16)


class CacheHeader(_Section):
    """The typed content of cache.json.

    `teacher` is the teacher's own description; `grid` [h, w] and `dim` of it fix the shapes: L = h·w tokens of D = dim.
    `quantiser` is `Quantiser.to_json()`, with `calibration` beside it if wanted; `{"name": "int8"}` alone states a wish
    (see `match_header`) and can't be created, nor can `{"name": "codes", "clusters": 4096}`. `compression` stays in the
    file's form: earlier versions knew Blosc. `summary` is in the file only where each view has one: with "class", row 0
    of the stored tokens is the teacher's class token, and `quantiser` has channel statistics for it too, `summary_mean`
    and `summary_std`. `version` is the lowest that can say it: 2 for a summary, int4 or codes, else 1.
    """

    format: Literal["mrmae-cache"] = "mrmae-cache"
    version: Literal[1, 2] = 1
    store: StoreName
    dataset: DatasetSection
    teacher: JsonDict
    preprocessing: JsonDict
    view_policy: ViewSection = Field(alias="views")
    quantiser_state: JsonDict = Field(alias="quantiser")
    attention: AttentionKind = "mean"
    heads: int = Field(default=0, ge=0)
    summary: SummaryKind | None = None
    compression: None = None
    samples_per_shard: int = Field(ge=1, le=1 << 20)

    @model_validator(mode="before")
    @classmethod
    def _fill_version(cls, fields: Any) -> Any:
        """The lowest version that can say it: caches of before stay as they are, byte for byte."""
        if not isinstance(fields, dict):
            return fields
        return {"version": _version(fields.get("summary"), fields.get("quantiser")), **fields}

    @model_validator(mode="after")
    def _version_is_the_lowest(self) -> "CacheHeader":
        if self.version != _version(self.summary, self.quantiser_state):
            raise ValueError(f"version {self.version} doesn't fit what the cache holds")
        return self

    @model_validator(mode="after")
    def _shapes_are_known(self) -> "CacheHeader":
        grid, dim = self.teacher.get("grid"), self.teacher.get("dim")
        if not (isinstance(grid, list) and len(grid) == 2 and all(_positive(side) for side in grid)):
            raise ValueError("teacher.grid must be [height, width]")
        if not _positive(dim):
            raise ValueError("teacher.dim must be a positive integer")
        if max(self.tokens * self.dim, self.tokens * self.heads) > _MAX_VALUES:
            raise ValueError(f"a view of more than {_MAX_VALUES} values: grid, dim or heads are too large")
        if self.shards > MAX_SHARDS:
            raise ValueError(f"{self.shards} shards are more than the {MAX_SHARDS} allowed: raise samples_per_shard")
        if self.attention == "heads" and self.heads < 1:
            raise ValueError("attention per head needs heads >= 1")
        if len(self.quantiser.mean) not in (0, dim):
            raise ValueError(f"quantiser.mean has {len(self.quantiser.mean)} channels, teacher.dim is {dim}")
        self.quantiser.width(self.dim)
        if self.summary and self.quantiser.name == "codes":
            raise ValueError("quantiser codes keeps no class token")
        if self.summary and len(self.summary_quantiser.mean) != len(self.quantiser.mean):
            raise ValueError(f"quantiser.summary_mean has {len(self.summary_quantiser.mean)} channels, not {dim}")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns."""
        height, width = self.teacher["grid"]
        return height, width

    @property
    def tokens(self) -> int:
        """L, tokens a view."""
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        """R, stored rows of a view: L, and one before them where there is a summary."""
        return self.tokens + (self.summary is not None)

    @property
    def dim(self) -> int:
        """D, channels a token."""
        return int(self.teacher["dim"])

    @property
    def stored_dim(self) -> int:
        """Items of a stored token: D; for int4, which packs two channels in a byte, D/2; for codes 1."""
        return self.quantiser.width(self.dim)

    @property
    def count(self) -> int:
        """N, samples of the dataset, unreadable ones among them."""
        return self.dataset.count

    @property
    def views(self) -> int:
        """V, views of each sample."""
        return self.view_policy.count

    @property
    def shards(self) -> int:
        return -(-self.count // self.samples_per_shard)

    def shard_range(self, shard: int) -> range:
        """The sample indices of one shard."""
        if not 0 <= shard < self.shards:
            raise CacheError(f"shard {shard} is out of range: this cache has 0 to {self.shards - 1}")
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.count))

    @property
    def attention_shape(self) -> tuple[int, ...] | None:
        """Shape of one view's attention: (L,), (H, L) or None."""
        return {"mean": (self.tokens,), "heads": (self.heads, self.tokens), "none": None}[self.attention]

    @cached_property
    def quantiser(self) -> Quantiser:
        return Quantiser.from_json(self.quantiser_state)

    @cached_property
    def summary_quantiser(self) -> Quantiser:
        """The quantiser with the channel statistics of the summary, which are not those of the patches."""
        statistics = {key: self.quantiser_state.get(f"summary_{key}", []) for key in ("mean", "std")}
        return Quantiser.from_json(self.quantiser_state | statistics)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of every other field."""
        return hashlib.sha256(canonical(self._fields())).hexdigest()

    @property
    def short_name(self) -> str:
        """What a folder of this cache's files is called beside those of other caches."""
        return self.fingerprint[:32]

    def _fields(self) -> dict[str, Any]:
        absent = {"summary"} if self.summary is None else set()
        return self.model_dump(mode="python", by_alias=True, exclude=absent)

    def to_json(self) -> dict[str, Any]:
        return {**self._fields(), "fingerprint": self.fingerprint}

    def to_bytes(self) -> bytes:
        """The bytes of cache.json."""
        return (json.dumps(self.to_json(), sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def from_bytes(cls, content: bytes, where: str = FILE) -> "CacheHeader":
        """Parse cache.json.

        Raises:
            CacheDamage: not JSON, not of this format, or edited: the fingerprint or the byte form differs.
            CacheError: its tokens are compressed.
        """
        remedy = "restore cache.json from a backup, or extract into a new folder"
        try:
            fields = json.loads(content)
            stated = fields.pop("fingerprint")
            header = cls.model_validate(fields)
            unchanged = header.to_bytes() == content
        except CacheError as error:
            raise CacheDamage(f"{where}: {error}; {remedy}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            if key == "compression":
                raise CacheError(
                    f"{where}: this cache is compressed with Blosc, which only earlier versions of mrmae read: "
                    "extract again into a new folder, or use an earlier version"
                ) from error
            raise CacheDamage(": ".join(filter(None, (where, key, wanted(problem)))) + f"; {remedy}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CacheDamage(f"{where} is no cache.json of version 1 or 2; {remedy}") from error
        if stated != header.fingerprint or not unchanged:
            raise CacheDamage(f"{where} was edited: its fingerprint is not that of its content; {remedy}")
        return header


def read_header(path: Path) -> CacheHeader:
    """The header of the cache at `path`.

    Raises:
        CacheError: no cache there. CacheDamage: edited or damaged.
    """
    file = path / FILE
    if not file.is_file():
        raise CacheError(f"{path}: no cache.json: give the folder that `mrmae extract-teacher-features` wrote")
    return CacheHeader.from_bytes(read_whole(file), str(file))


def shard_span(header: CacheHeader, span: str | None, option: str) -> range:
    """The shards that an option's A:B names, A to B-1; all of them without it.

    Raises:
        ConfigError: no such range.
    """
    if span is None:
        return range(header.shards)
    first, colon, last = span.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last) <= header.shards):
        raise ConfigError(f"{option} {span}: give A:B with 0 <= A < B <= {header.shards}")
    return range(int(first), int(last))


def match_header(path: Path | str, found: CacheHeader, wanted: CacheHeader) -> None:
    """Check that the cache at `path` is the one that is wanted, wherever its images lie now.

    A wanted quantiser without statistics matches any calibration of that name.

    Raises:
        CacheError: naming the first key that differs, and the remedy.
    """
    ignored = ["dataset.source", "version"]
    if not wanted.quantiser.calibrated:
        ignored += [f"quantiser.{key}" for key in found.quantiser_state if key not in wanted.quantiser_state]
    present, wish = dict(_flat(found._fields())), dict(_flat(wanted._fields()))
    for key in [*wish, *(key for key in present if key not in wish)]:
        if present.get(key) != wish.get(key) and not any(key == i or key.startswith(f"{i}.") for i in ignored):
            raise CacheError(
                f"{path} holds another cache: {key} is {_short(present.get(key))} there, {_short(wish.get(key))} here; "
                "choose another folder, or remove that one"
            )


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix.removesuffix("."), value)]
    return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}{key}.")]


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _version(summary: Any, quantiser: Any) -> int:
    """The lowest version whose readers understand a header with these fields."""
    is_later = isinstance(quantiser, dict) and quantiser.get("name") in ("int4", "codes")
    return 2 if summary or is_later else 1


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
