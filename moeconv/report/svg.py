"""Small charts as inline SVG. Colours are classes of the page's style sheet, so that they follow light and dark.

Every function returns markup whose texts are escaped; coordinates are in CSS pixels.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

_MOST_CELLS = 2048  # above this a heat map is one image, without a tooltip a cell
_IMAGE_COLOURS = np.array([(47, 111, 222), (217, 98, 43)], np.uint8)  # readable on both backgrounds


def _svg(width: float, height: float, body: str, label: str) -> Markup:
    style = f"width:{width:.0f}px;min-width:min({width:.0f}px,380px)"  # narrow screens scroll rather than shrink text
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
    """A matrix: opacity grows with |value| up to `most` (default: the largest); negative ones in a second colour."""
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
    return _svg(left + cell * matrix.shape[1] + 8, bottom + 20, "".join(body), label)


def _png(matrix: np.ndarray, strength: np.ndarray) -> str:
    """A data URI of the matrix, a pixel a cell: two colours, opacity as strength."""
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


def lines(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, x_word: str, y_word: str, label: str,
    y_from: float | None = None, width: float = 520, height: float = 240,
) -> Markup:  # fmt: skip
    """Line charts over common axes: (name, xs, ys) each; values that are no numbers leave a gap."""
    xs = [x for _, at, _ in series for x in at]
    ys = [y for _, _, values in series for y in values if y is not None and math.isfinite(y)]
    if not xs or not ys:
        return Markup("")
    x_ticks = ticks(min(xs), max(xs), 6)
    y_ticks = ticks(min(ys) if y_from is None else y_from, max(ys), 5)
    left, right, top, bottom = 62, 16, 26, height - 38
    x0, x1 = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y0, y1 = y_ticks[0], max(y_ticks[-1], max(ys))

    def px(x: float) -> float:
        return left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)

    def py(y: float) -> float:
        return bottom - (y - y0) / ((y1 - y0) or 1) * (bottom - top)

    body = [f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" class="grid"/>' for y in y_ticks]
    body += [_text(left - 6, py(y) + 4, _short(y), anchor="end") for y in y_ticks]
    body += [_text(px(x), bottom + 16, _short(x)) for x in x_ticks]
    body.append(_text((left + width - right) / 2, height - 6, x_word, kind="axis"))
    body.append(_text(left, 12, y_word, anchor="start", kind="axis"))
    for i, (name, at, values) in enumerate(series):
        points = [(px(x), py(y), x, y) for x, y in zip(at, values) if y is not None and math.isfinite(y)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in points)
        body.append(f'<polyline points="{path}" class="line s{i % 4}"/>')
        for a, b, x, y in points:
            title = f"{name}: {_short(x)}, {y:.4g}"
            body.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" class="dot s{i % 4}"><title>{escape(title)}</title></circle>'
            )
        if len(series) > 1:
            body.append(_text(width - right, 12 + 13 * i, name, anchor="end", kind=f"key s{i % 4}"))
    return _svg(width, height, "".join(body), label)


def strip(rows: Sequence[tuple[object, Sequence[float], Sequence[bool]]], *, label: str, width: float = 720) -> Markup:
    """A row of dots each: values as shares of the row's largest, filled where the flag is set."""
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
    return _svg(width, 16 + step * len(rows), "".join(body), label)


def tree(dendrogram: dict, *, label: str, width: float = 260, height: float = 150) -> Markup:
    """A dendrogram of `figures.dendrogram`, root on top, leaves at distance 0 below."""
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
    every = math.ceil(len(order) * 14 / (width - left))
    body += [_text(px(i), bottom + 13, expert) for i, expert in enumerate(order) if i % every == 0]
    body += [_text(left - 3, py(most) + 8, f"{most:.2g}", anchor="end"), _text(left - 3, bottom + 2, "0", anchor="end")]
    return _svg(width, height, "".join(body), label)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from at most `low` on up to `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(f * unit for f in (1, 2, 2.5, 5, 10) if f * unit >= raw * 0.999)
    first = math.floor(low / step) * step
    return [round(first + i * step, 12) for i in range(math.ceil((high - first) / step - 1e-9) + 1)]


def _short(value: float) -> str:
    return f"{value:.4g}"
