"""What verification found: findings, each with its place, and counts."""

from dataclasses import asdict, dataclass, field
from typing import Any

_REPAIRED_BY_EXTRACTION = frozenset({"missing", "commit", "file", "record", "values", "changed", "deep"})
_REBUILT = "uncovered"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault, and where it is.

    Kinds: `header`, `dataset`, `source` (an image is gone, or another), `changed` (an image), `missing` (shard),
    `commit`, `file`, `record`, `values`, `deep` (the teacher says otherwise), `uncovered` (a file that is made again
    from others); notes, which are no damage: `partial`, `stray`.
    """

    kind: str
    message: str
    shard: int | None = None
    sample: int | None = None
    view: int | None = None
    file: str | None = None


@dataclass(slots=True)
class Report:
    """The outcome of `verify`. `sound` means no findings; notes don't count."""

    path: str
    level: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)  # of the deep level
    seconds: float = 0.0
    missing: list[int] = field(default_factory=list)  # shards without a commit record, ascending; findings name some

    @property
    def sound(self) -> bool:
        return not self.findings

    @property
    def unfinished(self) -> bool:
        """Whether nothing is wrong but that shards are still to be extracted."""
        return bool(self.missing) and all(finding.kind == "missing" for finding in self.findings)

    def add(self, kind: str, message: str, **place: Any) -> None:
        """Record damage; `place` are Finding's shard, sample, view, file."""
        self.findings.append(Finding(kind, message, **place))

    def note(self, kind: str, message: str, **place: Any) -> None:
        """Record what is unexpected and no damage."""
        self.notes.append(Finding(kind, message, **place))

    def merge(self, part: "Report") -> None:
        """Add what was found in one part of the cache."""
        self.findings += part.findings
        self.notes += part.notes
        for name, count in part.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def damaged_shards(self) -> list[int]:
        """Shards to extract again, ascending."""
        found = {f.shard for f in self.findings if f.shard is not None and f.kind in _REPAIRED_BY_EXTRACTION}
        return sorted(found.union(self.missing))

    def rebuilt_files(self) -> list[str]:
        """Files to make again from others, those of damaged shards left out."""
        damaged = set(self.damaged_shards())
        return [f.file for f in self.findings if f.kind == _REBUILT and f.file is not None and f.shard not in damaged]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sound": self.sound, "unfinished": self.unfinished}
