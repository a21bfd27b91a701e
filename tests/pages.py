"""What a reader finds on a page of `report`, parsed from its HTML."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

Line = tuple[str, str]  # a run's colour and dashes


@dataclass
class ParsedTable:
    """The texts of its cells; of each row also the group that it stands in and its line, ("", "") without one."""

    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def column(self, name: str) -> list[str]:
        return [row[self.columns.index(name)] for row in self.rows]


class ParsedPage(HTMLParser):
    """Tables by the heading above them, pictures as (alt, src), lists of the legend's kind, and commands."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tables: dict[str, ParsedTable] = {}
        self.headings: list[str] = []
        self.pictures: dict[str, str] = {}
        self.items: list[tuple[str, Line]] = []  # of lists: of the legend and of what commands made
        self.commands: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []  # every src and href
        self.text = ""
        self._collected: list[str] | None = None
        self._line: Line = ("", "")
        self._group = ""
        self._row: list[str] = []
        self._in_head = self._is_group = self._is_command = False
        self.feed(file.read_text(encoding="utf-8"))

    @property
    def _table(self) -> ParsedTable:
        return self.tables[self.headings[-1]]

    def curves(self) -> list[str]:
        return [alt for alt in self.pictures if " by step" in alt]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        if tag == "img":
            self.pictures[given["alt"]] = given["src"]
        elif tag == "line":
            self._line = (given["stroke"], given.get("stroke-dasharray", ""))
        elif tag == "table":
            self.tables[self.headings[-1]] = ParsedTable()
            self._group = ""
        elif tag == "thead":
            self._in_head = True
        elif tag == "tr":
            self._row, self._line, self._is_group = [], ("", ""), given.get("class") == "group"
        elif tag in ("h1", "h2", "h3", "summary", "th", "td", "li", "pre"):
            self._is_command = given.get("class") == "command"
            self._collected = []
            if tag == "li":
                self._line = ("", "")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._collected is not None:
            self._collected.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "thead":
            self._in_head = False
        if tag == "tr" and not self._in_head:
            if self._is_group:
                self._group = self._row[0]
            else:
                self._table.rows.append(self._row)
                self._table.groups.append(self._group)
                self._table.lines.append(self._line)
        if tag not in ("h1", "h2", "h3", "summary", "th", "td", "li", "pre") or self._collected is None:
            return
        text, self._collected = " ".join("".join(self._collected).split()), None
        if tag in ("th", "td"):
            (self._table.columns if self._in_head else self._row).append(text)
        elif tag == "li":
            self.items.append((text, self._line))
        elif tag == "pre":
            if self._is_command:
                self.commands.append(text)
        else:
            self.headings.append(text)
