"""The page: one file, nothing fetched, everything escaped."""

import base64
import re

from pipeline.evaluation.page import Listing, Page, Table, embed_curve, embed_png, render_page

EVIL = '<script>alert("&")</script>'


def test_everything_is_escaped() -> None:
    page = Page(
        title=EVIL,
        note=EVIL,
        tables=[Table(EVIL, [EVIL], [[EVIL]]), Table("t", ["a"], [], empty=EVIL)],
        pictures=[embed_png(b"x", EVIL)],
        curves=[embed_curve(EVIL, {EVIL: [{"step": 1, EVIL: 2.0}]})],
        configs=[Listing(EVIL, EVIL)],
    )
    text = render_page(page)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 10


def test_nothing_is_fetched() -> None:
    curve = embed_curve(
        "loss", {"a": [{"step": 1, "loss": 2.0}, {"step": 2}], "b": [{"step": 2, "loss": float("nan")}]}
    )
    text = render_page(Page(title="run", curves=[curve], pictures=[embed_png(b"x", "p")]))
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert b"<svg" in base64.b64decode(curve.source.partition(",")[2])


def test_an_empty_run_says_so() -> None:
    text = render_page(Page(title="run"))
    for said in ("No metrics yet", "No pictures", "No config.yaml"):
        assert said in text


def test_names_that_look_like_formulas_are_drawn_as_they_are() -> None:
    rows = {"$a_{$": [{"step": 1, "x$^$": 1.0}], "$b$": [{"step": 1, "x$^$": 2.0}]}
    assert embed_curve("x$^$", rows).source.startswith("data:image/svg+xml;base64,")
