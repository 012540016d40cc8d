"""Line charts as inline SVG: a frame, what is drawn in it, numbers at its axes, a legend.

    frame = frame_of(xs, ys)
    body = [frame.line(points, "line"), frame.dot(x, y, "step 3: 0.5", "dot")]
    html = figure("Loss", "nats per token", chart(frame, body, "Loss"), [("line", "training")])

Colours are CSS classes of core/page.html, so that a chart follows light and dark.
"""

import math
from html import escape
from typing import NamedTuple

import numpy as np

MOST_POINTS = 300  # of a line; more are averaged
WIDTH = 420  # of a chart, in its own units
HEIGHT = 180
LEFT = 44  # margins
RIGHT = 10
TOP = 10
BOTTOM = 22


class Frame(NamedTuple):
    """The part of the plane that a chart shows."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        height = HEIGHT - TOP - BOTTOM
        return TOP + height - (value - self.y0) / (self.y1 - self.y0) * height

    def path(self, points) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def line(self, points, style: str) -> str:
        return f'<polyline class="{style}" points="{self.path(points)}"/>'

    def band(self, xs, low, high, style: str) -> str:
        outline = [*zip(xs, low), *zip(xs[::-1], high[::-1])]
        return f'<polygon class="{style}" points="{self.path(outline)}"/>'

    def dot(self, x: float, y: float, words: str, style: str) -> str:
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"'
        return f'<circle class="{style}" {place} r="3"><title>{escape(words)}</title></circle>'


def frame_of(xs, ys, floor: float | None = None) -> Frame:
    """A frame around these values with a little room, down to floor where that is given."""
    low = min(ys) if floor is None else min(floor, min(ys))
    room = (max(ys) - low) * 0.06 or abs(low) * 0.1 or 1.0
    bottom = low if low == floor else low - room
    return Frame(min(xs), max(max(xs), min(xs) + 1), bottom, max(ys) + room)


def ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [step * n for n in range(first, math.floor(high / step) + 1)]


def chart(frame: Frame, body: list[str], label: str, x_label: str = "step") -> str:
    """A chart: grid, numbers at the axes, and what the caller drew."""
    grid = []
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        grid.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        grid.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(frame.x0, frame.x1):
        place = f'x="{frame.x(value):.1f}" y="{HEIGHT - 6}"'
        grid.append(f'<text {place} text-anchor="middle">{value:g}</text>')
    grid.append(f'<text x="2" y="{HEIGHT - 6}">{x_label}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(grid + body)}</svg>'


def figure(title: str, note: str, drawing: str, legend=()) -> str:
    """A chart with its title, what it says, and a legend of (style, word)."""
    marks = "".join(f'<span><i class="{style}"></i>{escape(word)}</span>' for style, word in legend)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}"
        f'<span class="legend">{marks}</span></figcaption>{drawing}</figure>'
    )


def thin(points: list) -> list:
    """At most about MOST_POINTS points: means of neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [tuple(np.mean(part, axis=0)) for part in parts]


def dots(frame: Frame, rows: list[dict], xs: list[float], key: str, style: str) -> list[str]:
    """A dot per row with its standard error, where there is one; a mouse shows its words."""
    body = []
    for x, row in zip(xs, rows):
        y = row[key]
        error = row.get(f"{key}_se") or 0.0
        body.append(frame.line([(x, y - error), (x, y + error)], style))
        words = f"step {row['step']}: {y:.4g}" + (f", standard error {error:.2g}" if error else "")
        body.append(frame.dot(x, min(y, frame.y1), words, style))
    return body


def curve(points: list[tuple], title: str, note: str) -> str:
    """A chart of one line over steps, its last value in the title; "" without a point."""
    if not points:
        return ""
    shown = thin(points)
    frame = frame_of([x for x, _ in shown], [y for _, y in shown], floor=0.0)
    x, y = shown[-1]
    body = [frame.line(shown, "line"), frame.dot(x, y, f"step {x:g}: {y:.4g}", "dot")]
    return figure(f"{title} {points[-1][1]:.3g}", note, chart(frame, body, title))
