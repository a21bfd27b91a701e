"""Curves: a run's line, and texts that are drawn as they are."""

import base64

from pipeline.evaluation.curves import Curve, draw_curves, line_style


def svg(*numbers: int, title: str = "loss", note: str = "") -> str:
    curves = [Curve(line_style(number), [(1, 2.0), (2, 1.0 + number)]) for number in numbers]
    return base64.b64decode(draw_curves(curves, title, note).removeprefix("data:image/svg+xml;base64,")).decode()


def test_colours_repeat_with_other_dashes() -> None:
    styles = [line_style(number) for number in range(32)]
    assert len(set(styles)) == 32
    assert len({style.colour for style in styles}) == 8
    assert styles[8].colour == styles[0].colour
    assert line_style(32) == styles[0]
    solid, dashed = svg(0), svg(8)
    assert all(f"stroke: {styles[0].colour}" in drawn for drawn in (solid, dashed))
    assert "stroke-dasharray: 5.6,2.24" in dashed  # 4 and 1.6 widths of 1.4
    assert "stroke-dasharray: 5.6" not in solid


def test_names_that_look_like_formulas_are_drawn_as_they_are() -> None:
    assert "<svg" in svg(0, title="x$^$", note="$a_{$")
