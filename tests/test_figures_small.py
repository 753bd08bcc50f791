"""A figure that is made small is the same picture."""

from __future__ import annotations

import io

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from PIL import Image

from mechlens.results.small_svg import MANY, shrink


def pixels(svg: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(vl_convert.svg_to_png(svg))).convert("RGB")).astype(int)


def test_a_small_figure_is_the_same_picture() -> None:
    numbers = np.arange(3 * MANY)
    frame = pd.DataFrame({"x": np.sin(numbers), "y": np.cos(2.1 * numbers), "group": numbers % 2})
    base = alt.Chart(frame)
    points = base.mark_point(filled=True, opacity=0.7).encode(x="x", y="y", color="group:N", shape="group:N")
    lines = base.mark_rule(strokeWidth=2.5, strokeDash=[4, 3]).encode(x="x", y="y", y2=alt.datum(0))
    hidden = base.mark_text(opacity=0.5).encode(x="x", text=alt.value("<a & b>"))
    drawn = vl_convert.vegalite_to_svg((points + lines + hidden).to_json())
    small = shrink(drawn)
    assert len(small) < len(drawn) / 2 and "<use " in small and "aria-" not in small
    before, after = pixels(drawn), pixels(small)
    assert before.shape == after.shape
    different = np.abs(before - after).max(2)
    assert different.mean() < 1 and (different > 128).mean() < 0.001
    assert shrink(drawn) == small
