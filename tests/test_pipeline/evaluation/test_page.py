"""The page: one file, nothing fetched, everything escaped."""

from pathlib import Path

from pipeline.evaluation.curves import Curve, draw_curves, line_style
from pipeline.evaluation.page import (
    Listing,
    Name,
    Origin,
    Page,
    Picture,
    Row,
    Section,
    Table,
    embed_png,
    render_page,
)
from tests.pages import ParsedPage

EVIL = '<script>alert("&")</script>'


def test_everything_is_escaped() -> None:
    table = Table(EVIL, [EVIL], [Row([EVIL, EVIL], line_style(0), EVIL)], note=EVIL)
    name = Name(EVIL, line_style(0))
    page = Page(
        title=EVIL,
        note=EVIL,
        tables=[table, Table("t", ["a"], [], empty=EVIL), Table(EVIL, [EVIL], [], folded=True)],
        legend=[name, name],
        curves=[Section(EVIL, [Picture(draw_curves([], EVIL, EVIL), EVIL)], table)],
        curves_note=EVIL,
        pictures=[embed_png(b"x", EVIL)],
        origins=[Origin([name], EVIL, EVIL)],
        configs=[Listing(EVIL, EVIL)],
    )
    text = render_page(page)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 25


def test_nothing_is_fetched(tmp_path: Path) -> None:
    curves = [Curve(line_style(0), [(1, 2.0), (2, 1.0)]), Curve(line_style(9), [(2, float("nan"))])]
    plot = Picture(draw_curves(curves, "loss"), "loss")
    text = render_page(Page(title="run", curves=[Section("Losses", [plot])], pictures=[embed_png(b"x", "p")]))
    (tmp_path / "page.html").write_text(text)
    page = ParsedPage(tmp_path / "page.html")
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_an_empty_run_says_so() -> None:
    text = render_page(Page(title="run"))
    for notice in ("No metrics yet", "No pictures", "No config.yaml", "No command is recorded"):
        assert notice in text
