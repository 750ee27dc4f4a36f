"""Line charts as SVG: axes with units, ticks at round numbers, a legend, and nothing to install.

Problem: a plot is wanted on whatever machine the question was asked on, and a plotting library is
fifty times as large as this program. A chart of curves needs two scales, some lines and some text.
The file is the same for the same curves. Colours are those of Okabe and Ito, which people tell
apart who see fewer; who comes after the eighth is dashed. Curves may be equal for hours, and who is
drawn last would be alone there: so it is drawn with gaps, through which the others are seen.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 460
LEFT, RIGHT, TOP, BOTTOM = 76, 230, 48, 58
TICKS: Final = 6
LEGEND_LINE: Final = 20
LEGEND_X: Final = WIDTH - RIGHT + 16
# A character is so wide at most, on average, in the legend and in the title; fonts differ.
LEGEND_PX: Final = 8.0
TITLE_PX: Final = 11.0
COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b0a000",
)  # fmt: skip
BAND_COLOUR: Final = "#56b4e9"
BAND_OPACITY: Final = 0.3
DASHES: Final = ("none", "6 3", "2 3", "9 3 2 3")
LINE_PX: Final = 1.8
# A curve hides another if it lies on it for so long, the width of a sample in the legend. Then it
# is drawn in strokes, with a wider gap for each that is below it.
HIDES_PX: Final = 26
STROKE_PX: Final = 7
GAP_PX: Final = 6
BELOW_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class Curve:
    """`points` are in the order of x. `steps`: y holds until the next point. `parts`, where there
    are any, are drawn instead, with a hole between them. `look`: a place in COLOURS, and beyond
    them in DASHES, for one that means the same in several charts; else its place in the chart."""

    name: str
    points: Sequence[tuple[float, float]]
    steps: bool = False
    parts: Sequence[Sequence[tuple[float, float]]] = ()
    look: int | None = None

    @property
    def lines(self) -> list[Sequence[tuple[float, float]]]:
        return list(self.parts) or [self.points]


@dataclass(frozen=True, slots=True)
class Band:
    """What lies between two curves: x, low and high, in the order of x. The narrower stands later,
    and is drawn darker by lying over the wider."""

    name: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Labels say their unit. `log_x`: a decade is as wide as the next. `y_max`: where y ends, if
    that is known; it begins at 0. `mark_x`: a thin line there."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    y_max: float | None = None
    mark_x: float | None = None
    bands: Sequence[Band] = ()


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    begin_px: float
    end_px: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(v, self.low)) for v in (value, low, high))
        part = (value - low) / (high - low)
        return self.begin_px + min(1.0, max(0.0, part)) * (self.end_px - self.begin_px)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            firsts = (1,) if last - first > 4 else (1, 2, 5)
            every = [m * 10.0**power for power in range(first, last + 1) for m in firsts]
        else:
            step = round_step((self.high - self.low) / TICKS)
            begin = math.ceil(self.low / step - 1e-9)
            count = math.floor((self.high - self.low) / step + 1e-9) + 1
            every = [(begin + number) * step for number in range(count)]
        return [tick for tick in every if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


def round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, ... that is not less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def draw(chart: Chart) -> str:
    """The text of an SVG file."""
    height, width = _height(chart), _width(chart)
    points = [point for curve in chart.curves for line in curve.lines for point in line]
    points += [(x, high) for band in chart.bands for x, _, high in band.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_scale = _scale_x(xs, chart.log_x)
    y_high = chart.y_max or max(ys, default=0.0) * 1.05 or 1.0
    y_scale = _Scale(0.0, y_high, height - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 28, chart.title, "start", 'font-size="16" font-weight="bold"'),
        *_axes(chart, x_scale, y_scale, height),
    ]
    for number, band in enumerate(chart.bands):
        lines = _band(band, len(chart.curves) + number, x_scale, y_scale)
        parts += [*lines[:-1], *lines[-2:-1] * number, lines[-1]]
    if chart.mark_x is not None and x_scale.low < chart.mark_x < x_scale.high:
        x = x_scale.at(chart.mark_x)
        parts.append(_line(x, TOP, x, height - BOTTOM, "#888888"))
    hides = _hides(chart.curves, x_scale, y_scale)
    for number, (curve, below) in enumerate(zip(chart.curves, hides, strict=True)):
        parts += _curve(curve, number, below, x_scale, y_scale)
    return "\n".join([*parts, "</svg>", ""])


def stack(charts: Sequence[Chart]) -> str:
    """The text of an SVG file with charts below one another."""
    parts, top = [], 0
    width = max(map(_width, charts), default=WIDTH)
    for chart in charts:
        parts.append(f'<g transform="translate(0 {top})">{draw(chart)}</g>')
        top += _height(chart)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}"'
        f' viewBox="0 0 {width} {top}">\n' + "\n".join(parts) + "</svg>\n"
    )


def _height(chart: Chart) -> int:
    """As much as the legend needs, at least."""
    return max(HEIGHT, TOP + BOTTOM + LEGEND_LINE * (len(chart.curves) + len(chart.bands)))


def _width(chart: Chart) -> int:
    """As much as the longest word of the legend and the title need, at least."""
    names = [curve.name for curve in chart.curves] + [band.name for band in chart.bands]
    legend = LEGEND_X + 33 + LEGEND_PX * max(map(len, names), default=0)
    return max(WIDTH, math.ceil(legend), math.ceil(LEFT + TITLE_PX * len(chart.title)))


def _scale_x(xs: Sequence[float], log: bool) -> _Scale:
    low, high = min(xs, default=0.0), max(xs, default=1.0)
    if log:
        low = max(low, high / 1e6, 1e-9)
        return _Scale(low / 1.05, max(high, low * 1.1) * 1.05, LEFT, WIDTH - RIGHT, log=True)
    low = min(0.0, low)
    return _Scale(low, high if high > low else low + 1.0, LEFT, WIDTH - RIGHT)


def _axes(chart: Chart, x_scale: _Scale, y_scale: _Scale, height: int) -> list[str]:
    bottom, right = height - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in x_scale.ticks():
        x = x_scale.at(tick)
        parts.append(_line(x, TOP, x, bottom, "#e4e4e4"))
        parts.append(_text(x, bottom + 19, number(tick), "middle"))
    for tick in y_scale.ticks():
        y = y_scale.at(tick)
        parts.append(_line(LEFT, y, right, y, "#e4e4e4"))
        parts.append(_text(LEFT - 8, y + 4.5, number(tick), "end"))
    parts.append(_line(LEFT, bottom, right, bottom, "#333333"))
    parts.append(_line(LEFT, TOP, LEFT, bottom, "#333333"))
    parts.append(_text((LEFT + right) / 2, height - 14, chart.x_label, "middle"))
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 18 {middle:g})"'
    parts.append(_text(18, middle, chart.y_label, "middle", turned))
    return parts


def _hides(curves: Sequence[Curve], x_scale: _Scale, y_scale: _Scale) -> list[int]:
    """How many of those before it each curve lies on for a while."""
    drawn = [_columns(curve, x_scale, y_scale) for curve in curves]

    def lies_on(over: Mapping[int, float], under: Mapping[int, float]) -> bool:
        on = sum(abs(y - under[x]) < LINE_PX for x, y in over.items() if x in under)
        return on >= HIDES_PX

    return [
        sum(lies_on(over, under) for under in drawn[:number]) for number, over in enumerate(drawn)
    ]


def _columns(curve: Curve, x_scale: _Scale, y_scale: _Scale) -> dict[int, float]:
    """Where it is in each column of pixels."""
    found: dict[int, float] = {}
    for line in curve.lines:
        points = _points(line, curve.steps, x_scale, y_scale)
        for (x1, y1), (x2, y2) in itertools.pairwise(points):
            for x in range(math.ceil(x1), math.floor(x2) + 1):
                found[x] = y1 + (y2 - y1) * ((x - x1) / (x2 - x1) if x2 > x1 else 1.0)
    return found


def _curve(curve: Curve, index: int, below: int, x_scale: _Scale, y_scale: _Scale) -> list[str]:
    look = index if curve.look is None else curve.look
    dash = DASHES[look // len(COLOURS) % len(DASHES)]
    if below and look < len(COLOURS):  # the others have gaps already
        dash = f"{STROKE_PX} {GAP_PX * min(below, BELOW_MAX)}"
    style = (
        f'fill="none" stroke="{COLOURS[look % len(COLOURS)]}" stroke-width="{LINE_PX}"'
        f' stroke-dasharray="{dash}" stroke-linejoin="round"'
    )
    x, y = LEGEND_X, TOP + 8 + LEGEND_LINE * index
    drawn = [
        f'<polyline points="{_path(line, curve.steps, x_scale, y_scale)}" {style}/>'
        for line in curve.lines
    ]
    return [
        *drawn,
        f'<polyline points="{x},{y} {x + 26},{y}" {style}/>',
        _text(x + 33, y + 4.5, curve.name, "start"),
    ]


def _points(
    line: Sequence[tuple[float, float]], steps: bool, x_scale: _Scale, y_scale: _Scale
) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for x, y in line:
        if steps and points:
            points.append((x_scale.at(x), points[-1][1]))
        points.append((x_scale.at(x), y_scale.at(y)))
    return points


def _path(
    line: Sequence[tuple[float, float]], steps: bool, x_scale: _Scale, y_scale: _Scale
) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in _points(line, steps, x_scale, y_scale))


def _band(band: Band, index: int, x_scale: _Scale, y_scale: _Scale) -> list[str]:
    upper = [(x, high) for x, _, high in band.points]
    lower = [(x, low) for x, low, _ in reversed(band.points)]
    style = f'fill="{BAND_COLOUR}" fill-opacity="{BAND_OPACITY}" stroke="none"'
    x, y = LEGEND_X, TOP + 8 + LEGEND_LINE * index
    return [
        f'<polygon points="{_path([*upper, *lower], False, x_scale, y_scale)}" {style}/>',
        f'<rect x="{x}" y="{y - 6}" width="26" height="12" {style}/>',
        _text(x + 33, y + 4.5, band.name, "start"),
    ]


def number(value: float) -> str:
    """As a tick says it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" fill="none"/>'


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'
