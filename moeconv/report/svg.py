"""Small charts as inline SVG. Colours are classes of the page's style sheet, so that they follow light and dark.

Every function returns markup whose texts are escaped; coordinates are in CSS pixels.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from moeconv.report.types import Dendrogram

_MOST_CELLS = 2048  # a heat map with more cells is drawn as one image, without one tooltip per cell
_IMAGE_COLOURS = np.array([(47, 111, 222), (217, 98, 43)], np.uint8)  # readable on both backgrounds


def _svg(width: float, height: float, body: str, label: str, *, dense: bool = False) -> Markup:
    least = 640 if dense else 380  # narrow screens scroll rather than shrink text
    style = f"width:{width:.0f}px;min-width:min({width:.0f}px,{least}px)"
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="{style}" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


def _text(x: float, y: float, text: object, *, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(str(text))}</text>'


def heatmap(
    values: Sequence[Sequence[float]], *, rows: Sequence[object], columns: Sequence[object], label: str,
    most: float | None = None, row_word: str = "", column_word: str = "", width: float = 720,
) -> Markup:  # fmt: skip
    """A matrix of cells. Opacity grows with |value| up to `most` (default: the largest); negative values have a second
    colour."""
    matrix = np.nan_to_num(np.asarray(values, np.float64))
    if matrix.size == 0:
        return Markup("")
    most = most or float(np.abs(matrix).max()) or 1.0
    strength = np.clip(np.abs(matrix) / most, 0.0, 1.0)
    left, top = 10 + 7 * max(len(str(r)) for r in rows) + (14 if row_word else 0), 18 if column_word else 4
    cell = max(2.0, min(26.0, (width - left) / matrix.shape[1]))
    tall = max(cell, min(18.0, 360 / matrix.shape[0])) if matrix.shape[0] < matrix.shape[1] else cell
    body = [
        f'<rect x="{left}" y="{top}" width="{cell * matrix.shape[1]:.1f}" height="{tall * matrix.shape[0]:.1f}" '
        'class="plate"/>'
    ]
    if matrix.size <= _MOST_CELLS:
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                kind = "warm" if value < 0 else "accent"
                words = f"{row_word} {rows[i]}, {column_word} {columns[j]}: {value:.4g}".strip()
                body.append(
                    f'<rect x="{left + j * cell:.1f}" y="{top + i * tall:.1f}" width="{cell - 0.6:.1f}" '
                    f'height="{tall - 0.6:.1f}" class="{kind}" fill-opacity="{strength[i, j]:.3f}">'
                    f"<title>{escape(words)}</title></rect>"
                )
    else:
        body.append(
            f'<image x="{left}" y="{top}" width="{cell * matrix.shape[1]:.1f}" height="{tall * matrix.shape[0]:.1f}" '
            f'preserveAspectRatio="none" style="image-rendering:pixelated" href="{_png(matrix, strength)}"/>'
        )
    step_y, step_x = math.ceil(12 / tall), math.ceil((8 * max(len(str(c)) for c in columns) + 4) / cell)
    body += [_text(left - 5, top + (i + 0.5) * tall + 4, rows[i], anchor="end") for i in range(0, len(rows), step_y)]
    bottom = top + tall * matrix.shape[0]
    body += [_text(left + (j + 0.5) * cell, bottom + 14, columns[j]) for j in range(0, len(columns), step_x)]
    if column_word:
        body.append(_text(left, 12, f"{row_word} down, {column_word} across", anchor="start", kind="axis"))
    body += _legend(left, bottom + 26, most, negative=bool((matrix < 0).any()))
    wide = max(left + cell * matrix.shape[1] + 8, left + 190)
    return _svg(wide, bottom + 46, "".join(body), label, dense=matrix.size > _MOST_CELLS)


def _legend(left: float, top: float, most: float, *, negative: bool) -> list[str]:
    """The scale of a heat map: its colours from the lowest value to the highest."""
    steps = range(-5 if negative else 0, 6)
    cells = [
        f'<rect x="{left + 14 * i}" y="{top}" width="14" height="9" class="{"warm" if step < 0 else "accent"}" '
        f'fill-opacity="{abs(step) / 5:.1f}"/>'
        for i, step in enumerate(steps)
    ]
    low, high = (f"{-most:.3g}" if negative else "0"), f"{most:.3g}"
    ends = [_text(left, top + 20, low, anchor="start"), _text(left + 14 * len(steps), top + 20, high, anchor="end")]
    return [*cells, *ends]


def _png(matrix: np.ndarray, strength: np.ndarray) -> str:
    """A data URI of the matrix with one pixel per cell: the colour shows the sign, the opacity the strength."""
    pixels = np.empty((*matrix.shape, 4), np.uint8)
    pixels[..., :3] = np.where((matrix < 0)[..., None], _IMAGE_COLOURS[1], _IMAGE_COLOURS[0])
    pixels[..., 3] = np.round(255 * strength)
    height, width = matrix.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


Series = tuple[str, Sequence[float], Sequence[float | None]]  # name, xs, ys


@dataclass(frozen=True)
class _Axes:
    """Common axes of a line chart: the plotting area in pixels, and the values at its edges."""

    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        low, high = self.x
        return self.left + (x - low) / ((high - low) or 1) * (self.right - self.left)

    def py(self, y: float) -> float:
        low, high = self.y
        return self.bottom - (y - low) / ((high - low) or 1) * (self.bottom - self.top)

    def drawn(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
        """The grid, with the numbers at its lines."""
        body = [
            f'<line x1="{self.left}" x2="{self.right}" y1="{self.py(y):.1f}" y2="{self.py(y):.1f}" class="grid"/>'
            for y in y_ticks
        ]
        body += [_text(self.left - 6, self.py(y) + 4, _short(y), anchor="end") for y in y_ticks]
        return body + [_text(self.px(x), self.bottom + 16, _short(x)) for x in x_ticks]


def lines(
    series: Sequence[Series], *, x_word: str, y_word: str, label: str,
    y_from: float | None = None, mark: tuple[float, str] | None = None, width: float = 520, height: float = 240,
) -> Markup:  # fmt: skip
    """A chart of lines over common axes. Values that are not finite leave a gap. Empty if there is nothing to draw.
    `mark` is an x with a word, drawn as a vertical line."""
    xs = [x for _, at, _ in series for x in at]
    ys = [y for _, at, values in series for _, y in _finite_points(at, values)]
    if not xs or not ys:
        return Markup("")
    x_ticks = ticks(min(xs), max(xs), 6)
    y_ticks = ticks(min(ys) if y_from is None else y_from, max(ys), 5)
    axes = _Axes(
        left=62, right=width - 16, top=26, bottom=height - 38,
        x=(min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])), y=(y_ticks[0], max(y_ticks[-1], max(ys))),
    )  # fmt: skip
    body = axes.drawn(x_ticks, y_ticks)
    body.append(_text((axes.left + axes.right) / 2, height - 6, x_word, kind="axis"))
    body.append(_text(axes.left, 12, y_word, anchor="start", kind="axis"))
    for i, (name, at, values) in enumerate(series):
        body += _line(axes, name, _finite_points(at, values), colour=f"s{i % 4}")
        if len(series) > 1:
            body.append(_text(axes.right, 12 + 13 * i, name, anchor="end", kind=f"key s{i % 4}"))
    if mark is not None:
        x, word = axes.px(mark[0]), mark[1]
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{axes.top}" y2="{axes.bottom}" class="mark"/>')
        body.append(_text(x + 4, axes.top + 10, word, anchor="start", kind="axis"))
    return _svg(width, height, "".join(body), label)


def _finite_points(xs: Sequence[float], ys: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(xs, ys) if y is not None and math.isfinite(y)]


def _line(axes: _Axes, name: str, points: Sequence[tuple[float, float]], *, colour: str) -> list[str]:
    """A line and its dots; each dot shows its values as a tooltip."""
    path = " ".join(f"{axes.px(x):.1f},{axes.py(y):.1f}" for x, y in points)
    body = [f'<polyline points="{path}" class="line {colour}"/>']
    for x, y in points:
        title = escape(f"{name}: {_short(x)}, {y:.4g}")
        body.append(
            f'<circle cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="3" class="dot {colour}"><title>{title}</title>'
            "</circle>"
        )
    return body


def strip(rows: Sequence[tuple[object, Sequence[float], Sequence[bool]]], *, label: str, width: float = 720) -> Markup:
    """One row of dots per (name, values, flags): values relative to the largest of the row; a dot is filled where its
    flag is set."""
    left, right, step = 46, 12, 18
    body = []
    for i, (name, values, flags) in enumerate(rows):
        y = 10 + i * step
        low, high = min([0.0, *values]), max([0.0, *values])
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" class="grid"/>')
        body.append(_text(left - 8, y + 4, name, anchor="end"))
        for j, (value, flag) in enumerate(zip(values, flags)):
            x = left + (value - low) / ((high - low) or 1) * (width - left - right)
            state = "kept" if flag else "removed"
            body.append(
                f'<circle cx="{x:.1f}" cy="{y}" r="4.5" class="{state}"><title>'
                f"{escape(f'layer {name}, expert {j}: {value:.4g}, {state}')}</title></circle>"
            )
    return _svg(width, 16 + step * len(rows), "".join(body), label, dense=True)


def tree(dendrogram: Dendrogram, *, label: str, width: float = 260, height: float = 150) -> Markup:
    """A dendrogram of `figures.dendrogram`, with the root at the top and the leaves at distance 0 at the bottom."""
    order, joins = dendrogram["order"], dendrogram["joins"]
    most = max((max(ys) for _, ys in joins), default=0.0) or 1.0
    left, top, bottom = 40, 8, height - 18
    step = (width - left - 8) / len(order)

    def px(x: float) -> float:
        return left + (x + 0.5) * step

    def py(y: float) -> float:
        return bottom - y / most * (bottom - top)

    body = [
        f'<polyline points="{" ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(xs, ys))}" class="line s0"/>'
        for xs, ys in joins
    ]
    longest = max(len(str(leaf)) for leaf in order)
    every = math.ceil(len(order) * (7 * longest + 4) / (width - left))
    body += [_text(px(i), bottom + 13, expert) for i, expert in enumerate(order) if i % every == 0]
    body += [_text(left - 3, py(most) + 8, f"{most:.2g}", anchor="end"), _text(left - 3, bottom + 2, "0", anchor="end")]
    return _svg(width, height, "".join(body), label)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, the first at most `low` and the last at least `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(f * unit for f in (1, 2, 2.5, 5, 10) if f * unit >= raw * 0.999)
    first = math.floor(low / step) * step
    return [round(first + i * step, 12) for i in range(math.ceil((high - first) / step - 1e-9) + 1)]


def _short(value: float) -> str:
    return f"{value:.4g}"
