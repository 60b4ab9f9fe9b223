# SPDX-License-Identifier: Apache-2.0
"""Pictures for reports: charts in the page's own colours, and slices with contours, clicks and maps.

Everything comes back as SVG text that goes into an HTML page as it is: no files, no scripts, no fonts.
Charts are drawn by matplotlib; a slice is SVG around a small PNG, so that contours stay sharp at any size.
"""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

__all__ = [
    "CLASS_COLOURS",
    "METHOD_COLOURS",
    "Click",
    "Contour",
    "Series",
    "draws_chart",
    "heat_css",
    "line_chart",
    "panel",
    "slice_axis",
    "take_slice",
]

# Told apart with the common colour blindnesses, and against white and near-black alike.
METHOD_COLOURS = ("#d9712b", "#3f8fd4", "#8b8f99", "#2f9e73", "#a874c9", "#b59b1d", "#c7567a", "#4aa3a8")
CLASS_COLOURS = ("#ffb000", "#37c8ff", "#ff5fa2", "#7ddf64", "#c59bff", "#ff7a45", "#f4f065", "#5ff0d0")
INK = "#010203"  # stands for the page's text colour until the SVG is written
MAX_SIDE = 320  # pixels of a slice's longer side

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "semisam",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
}


@dataclass
class Series:
    """One line of a chart: `x` ascending, `y` of the same length (NaN: a gap); `faint` stands behind.

    >>> from semisam.engine.pictures import Series
    >>> Series("mean teacher", [0, 10], [1.0, 0.5]).faint
    False
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = METHOD_COLOURS[0]
    faint: bool = False


@dataclass(frozen=True)
class Contour:
    """The outline of a 2-D mask; `width` in CSS pixels.

    >>> import numpy as np
    >>> from semisam.engine.pictures import Contour
    >>> Contour(np.eye(3) > 0, "#ffffff").dashed
    False
    """

    mask: Any
    colour: str
    dashed: bool = False
    width: float = 1.7


@dataclass(frozen=True)
class Click:
    """A click at (row, column) of a slice; `away` is its distance from that slice in voxels.

    >>> from semisam.engine.pictures import Click
    >>> Click(3, 4, positive=True).away
    0.0
    """

    row: float
    column: float
    positive: bool
    away: float = 0.0


# ---- charts -----------------------------------------------------------------------------------------


def line_chart(
    title: str, series: Sequence[Series], *, alt: str, xlabel: str = "step", zero: bool = False
) -> str:
    """Return lines over a common x axis as SVG; the legend is the page's business.

    `zero` starts the y axis at 0 where all values are at least 0. Lines of more than 400 points are thinned.

    >>> from semisam.engine.pictures import Series, line_chart
    >>> svg = line_chart("loss", [Series("a", [0, 1, 2], [3.0, 2.0, 1.5])], alt="Falls from 3 to 1.5.")
    >>> svg.startswith("<svg"), "currentColor" in svg
    (True, True)
    """

    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    def draw(axes: Any) -> None:
        for one in series:
            x, y = _thinned(np.asarray(one.x, float), np.asarray(one.y, float))
            axes.plot(
                x,
                y,
                color=one.colour,
                alpha=0.32 if one.faint else 1.0,
                linewidth=0.9 if one.faint else 1.9,
                marker="o" if len(x) == 1 else None,
                zorder=2 if one.faint else 3,
            )
        axes.set_xlabel(xlabel)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")  # no factor above the axis
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.01)
        low, high = axes.get_ylim()
        if zero and low > -0.05 * (high - low):
            axes.set_ylim(0, high)

    return _chart(draw, title, (4.2, 2.7), alt)


def draws_chart(
    title: str,
    columns: Sequence[tuple[str, str]],
    values: Sequence[Sequence[float]],
    *,
    alt: str,
    names: Sequence[str] = (),
) -> str:
    """Return one dot per column and row, a line along each row, and each column's mean: paired results.

    `columns` are (name, colour) of methods; `values[row][column]` with NaN for what is missing; `names` of
    the rows stand at their right ends.

    >>> from semisam.engine.pictures import draws_chart
    >>> svg = draws_chart("Dice", [("MT", "#3f8fd4"), ("SemiSAM", "#d9712b")], [[0.7, 0.8]], alt="One draw.")
    >>> "MT" in svg
    True
    """
    table = np.asarray(values, float).reshape(len(values), len(columns))

    def draw(axes: Any) -> None:
        x = np.arange(len(columns))
        for row in table:
            there = np.isfinite(row)
            axes.plot(x[there], row[there], color=INK, alpha=0.35, linewidth=0.9, zorder=1)
        for i, (_, colour) in enumerate(columns):
            column = table[:, i][np.isfinite(table[:, i])]
            axes.scatter(np.full(len(column), i), column, s=34, color=colour, zorder=3)
            if len(column):
                axes.hlines(column.mean(), i - 0.22, i + 0.22, color=colour, linewidth=2.4, zorder=2)
        ends = [(row[-1], name) for row, name in zip(table, names, strict=False) if np.isfinite(row[-1])]
        low, high = axes.get_ylim()
        for y, name in _spread(ends, (high - low) * 0.07):
            axes.annotate(name, (len(columns) - 1 + 0.28, y), va="center", fontsize=9)
        axes.set_xticks(x, [name for name, _ in columns])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.5, len(columns) - 0.5 + (0.35 if ends else 0))

    return _chart(draw, title, (max(3.4, 1.35 * len(columns) + 1.2), 3.1), alt)


def _spread(labels: list[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Labels at least `gap` apart, in the order of their heights."""
    placed: list[tuple[float, str]] = []
    for y, text in sorted(labels):
        placed.append((y if not placed else max(y, placed[-1][0] + gap), text))
    return placed


def _thinned(x: Any, y: Any, most: int = 400) -> tuple[Any, Any]:
    """At most `most` points: means of equal groups."""
    size = -(-len(x) // most) if len(x) else 1
    if size <= 1:
        return x, y
    edges = np.arange(0, len(x), size)
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _chart(draw: Callable[[Any], None], title: str, size: tuple[float, float], alt: str) -> str:
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    prefix = f"c{zlib.crc32((title + text).encode()):08x}-"  # figures share a page: ids must not meet
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text).replace(INK, "currentColor")
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height|xmlns|version)="[^"]*"', "", head)
    return (
        f'{head} class="chart" style="max-width:{87 * size[0]:.0f}px" role="img" aria-label="{escape(alt)}">'
        f"<title>{escape(alt)}</title>{body}"
    )


# ---- slices -----------------------------------------------------------------------------------------


def slice_axis(shape: Sequence[int], spacing: Sequence[float] | None = None) -> int:
    """Return the axis across which a volume was scanned: coarsest, else much shortest, else last.

    >>> from semisam.engine.pictures import slice_axis
    >>> slice_axis((10, 256, 216)), slice_axis((36, 50, 35), (1, 1, 1)), slice_axis((64, 64, 64), (3, 1, 1))
    (0, 2, 0)
    """
    last = len(shape) - 1
    if spacing is not None:
        order = np.argsort(spacing)
        if spacing[order[-1]] > 1.5 * spacing[order[-2]]:
            return int(order[-1])
    order = np.argsort(shape)
    return int(order[0]) if shape[order[0]] < 0.6 * shape[order[1]] else last


def take_slice(array: Any, axis: int | None, index: int | None) -> Any:
    """Return a volume's slice as it is looked at, second axis upwards; an image (axis None) as it is.

    >>> import numpy as np
    >>> from semisam.engine.pictures import take_slice
    >>> take_slice(np.arange(24).reshape(2, 3, 4), 2, 0).tolist()
    [[8, 20], [4, 16], [0, 12]]
    """
    if axis is None or index is None:
        return np.asarray(array)
    return np.take(array, index, axis=axis).T[::-1]


def panel(
    base: Any,
    *,
    alt: str,
    window: tuple[float, float] | None = None,
    heat: bool = False,
    contours: Sequence[Contour] = (),
    clicks: Sequence[Click] = (),
    aspect: float = 1.0,
) -> str:
    """Return a slice as SVG: a grey image or a `heat` map, with outlines and clicks on it.

    `base` is [rows, columns], or [rows, columns, 3] in 0..1; `window` the values of black and white (None:
    1st and 99.5th percentile). `aspect` is the height of a voxel over its width. Clicks are a green plus
    or a red minus, smaller the farther they lie from the slice.

    >>> import numpy as np
    >>> from semisam.engine.pictures import Click, Contour, panel
    >>> disc = np.hypot(*np.mgrid[-8:8, -8:8]) < 5
    >>> svg = panel(disc * 1.0, alt="a disc", contours=[Contour(disc, "#ffb000")], clicks=[Click(8, 8, True)])
    >>> svg.count("<path"), "data:image/png;base64" in svg
    (3, True)
    """
    pixels = np.asarray(base, float)
    rows, columns = pixels.shape[:2]
    height = rows * aspect
    low, high = window or _window(pixels)
    shade = np.clip((np.nan_to_num(pixels) - low) / max(high - low, 1e-12), 0, 1)
    parts = [
        f'<svg class="slice" viewBox="0 0 {columns} {_number(height)}" role="img" aria-label="{escape(alt)}">'
        f"<title>{escape(alt)}</title>"
        f'<image width="{columns}" height="{_number(height)}" preserveAspectRatio="none" '
        f'href="{_png(shade, heat)}"/>'
    ]
    for contour in contours:
        path = _outline(np.asarray(contour.mask), aspect)
        if path:
            dash = ' stroke-dasharray="4 3"' if contour.dashed else ""
            parts.append(
                f'<path d="{path}" fill="none" stroke="{contour.colour}" '
                f'stroke-width="{contour.width}"{dash} '
                'stroke-linejoin="round" vector-effect="non-scaling-stroke"/>'
            )
    parts += [_mark(click, max(columns, height), aspect) for click in clicks]
    return "".join(parts) + "</svg>"


def heat_css() -> str:
    """Return the heat map's colours, from 0 to 1, as a CSS gradient for its legend.

    >>> from semisam.engine.pictures import heat_css
    >>> heat_css().startswith("linear-gradient(")
    True
    """
    stops = (_heat(np.linspace(0, 1, 9)) * 255).round().astype(int)
    return "linear-gradient(90deg," + ",".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in stops) + ")"


def _heat(shade: Any) -> Any:
    import matplotlib as mpl  # noqa: PLC0415

    return mpl.colormaps["magma"](shade)[..., :3]


def _window(pixels: Any) -> tuple[float, float]:
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, [1, 99.5])
    return (float(low), float(high)) if high > low else (float(finite.min()), float(finite.max()))


def _png(shade: Any, heat: bool) -> str:
    from PIL import Image  # noqa: PLC0415

    colour = _heat(shade) if heat else shade
    image = Image.fromarray((colour * 255).round().astype(np.uint8))
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _outline(mask: Any, aspect: float) -> str:
    """The half-way line around a mask as an SVG path; a mask at the border is closed along it."""
    from contourpy import contour_generator  # noqa: PLC0415

    if not mask.any():
        return ""
    padded = np.pad(mask.astype(float), 1)
    lines: Any = contour_generator(z=padded).lines(0.5)
    pieces = []
    for line in lines:
        x = np.clip(line[:, 0] - 0.5, 0, mask.shape[1])
        y = np.clip(line[:, 1] - 0.5, 0, mask.shape[0]) * aspect
        points = " ".join(f"{_number(a)} {_number(b)}" for a, b in zip(x[:-1], y[:-1], strict=True))
        pieces.append(f"M{points}Z")
    return "".join(pieces)


def _mark(click: Click, side: float, aspect: float) -> str:
    x, y = click.column + 0.5, (click.row + 0.5) * aspect
    arm = side * 0.028 / (1 + 0.12 * click.away)
    path = f"M{_number(x - arm)} {_number(y)}h{_number(2 * arm)}"
    if click.positive:
        path += f"M{_number(x)} {_number(y - arm)}v{_number(2 * arm)}"
    colour = "#3df07c" if click.positive else "#ff5050"
    opacity = 1 if click.away <= 2 else 0.7
    common = f'd="{path}" fill="none" stroke-linecap="round" opacity="{opacity}" '
    common += 'vector-effect="non-scaling-stroke"'
    return (
        f'<path {common} stroke="#000" stroke-width="4.5"/>'
        f'<path {common} stroke="{colour}" stroke-width="2.4"/>'
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
