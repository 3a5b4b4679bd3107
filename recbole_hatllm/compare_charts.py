"""The figures of a comparison's page as plain SVG: learning curves, bars with intervals, cost against quality.

Runs differ by colour, dash and marker at once, so that they can be told apart in grey. Numbers are those of the summary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from recbole_hatllm.colours import BLUE, GREEN, ORANGE, PINK, RED, SKY
from recbole_hatllm.run_folder import metric_name

WIDTH = 480
COSTS = {"seconds": "seconds of a run", "trainable_parameters": "trainable parameters"}
_COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, "#000000")
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_LETTER = 7.4  # pixels of a letter of 12 pixels, in a wide font
# Around the origin, 5 pixels wide.
_MARKERS = (
    '<circle r="4.5"/>',
    '<rect x="-4" y="-4" width="8" height="8"/>',
    '<path d="M0-5.5 5 4-5 4z"/>',
    '<path d="M0-5.8 5.8 0 0 5.8-5.8 0z"/>',
    '<path d="M0 5.5 5-4-5-4z"/>',
)


@dataclass(frozen=True)
class Look:
    """What the run of this number looks like in every figure."""

    number: int

    @property
    def colour(self) -> str:
        return _COLOURS[self.number % len(_COLOURS)]

    @property
    def dash(self) -> str:
        return _DASHES[self.number % len(_DASHES)]

    def marker(self, x: float, y: float) -> str:
        """It at a place, in pixels."""
        shape = _MARKERS[self.number % len(_MARKERS)]
        return f'<g transform="translate({x:.1f} {y:.1f})" fill="{self.colour}">{shape}</g>'


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`; `log` takes log10(value + shift)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    shift: float = 0.0

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(value) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values on it."""
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            return [step * n for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(max(self.low, self.shift))), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1,), (1, 3), (1, 2, 5)):
            found = [part * 10.0**power for power in powers for part in parts]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                break
        return [0.0, *found] if self.low == 0 else found

    def _scaled(self, value: float) -> float:
        return math.log10(value + self.shift) if self.log else value


def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... with any power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next((part * power for part in (1, 2, 5) if step <= part * power * (1 + 1e-9)), 10 * power)


def curves(rows: Sequence[dict], name: str) -> str:
    """A metric in validation over the steps: a line for each run and seed; empty where there is none."""
    lines = [
        (number, row["name"], curve["seed"], curve["steps"], curve["valid"][name])
        for number, row in enumerate(rows)
        for curve in row["curves"]
        if name in curve["valid"]
    ]
    if not lines:
        return ""
    ends = [steps[-1] for *_, steps, _ in lines]
    log = max(ends) > 10 * max(min(ends), 1)  # epochs of small models are thousands of steps
    values = [value for *_, found in lines for value in found]
    legend = list({number: run for number, run, *_ in lines}.items())
    low, high = _padded(min(values), max(values))
    x = Axis(0, max(*ends, 1), 56, WIDTH - 16, log, 1.0)
    y = Axis(low, high, 250, 12)
    parts = _frame(x, y, "steps, logarithmic" if log else "steps", f"{metric_name(name)} in validation", _count)
    for number, run, seed, steps, found in lines:
        look, title = Look(number), f"<title>{escape(run)}, seed {seed}</title>"
        points = " ".join(f"{x.at(step):.1f},{y.at(value):.1f}" for step, value in zip(steps, found))
        dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
        parts.append(
            f'<g>{title}<polyline points="{points}" fill="none" stroke="{look.colour}" stroke-width="1.6"{dash}/>'
        )
        parts.append(look.marker(x.at(steps[-1]), y.at(found[-1])) + "</g>")
    for place, (number, run) in enumerate(legend):
        left, top = 20 + 230 * (place % 2), 304 + 18 * (place // 2)
        parts += [_swatch(left, top, Look(number)), _text(left + 40, top + 4, run, limit=28)]
    height = 304 + 18 * math.ceil(len(legend) / 2)
    return _svg(height, f"{metric_name(name)} in validation over the steps, a line for each run and seed", parts)


def bars(rows: Sequence[dict], name: str) -> str:
    """A metric in the test with its interval: a bar for each run; empty where there is none."""
    known = [(number, row) for number, row in enumerate(rows) if row["metrics"][name]["mean"] is not None]
    if not known:
        return ""
    longest = max(min(len(row["name"]), 24) for _, row in known)
    left, bottom = 16 + _LETTER * longest, 12 + 26 * len(known)
    ends = [
        end for _, row in known for end in [row["metrics"][name]["mean"], *(row["metrics"][name]["interval"] or [])]
    ]
    ends += [paper for _, row in known if (paper := row["metrics"][name]["paper"]) is not None]
    x = Axis(min(0.0, *ends), max(*ends, 1e-9), left, WIDTH - 24)
    parts = [_across(x, bottom, metric_name(name), _fine(x))]
    for place, (number, row) in enumerate(known):
        metric, middle = row["metrics"][name], 12 + 26 * place + 13
        said = f"{row['name']}: {metric['mean']:.4f}"
        width = x.at(metric["mean"]) - x.at(0)
        drawn = [f'<rect x="{x.at(0):.1f}" y="{middle - 8}" width="{max(width, 0):.1f}" height="16" '
                 f'fill="{Look(number).colour}" fill-opacity=".55"/>']  # fmt: skip
        if metric["interval"]:
            low, high = map(x.at, metric["interval"])
            said += ", 95 % interval {:.4f} to {:.4f}".format(*metric["interval"])
            drawn.append(
                f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8" '
                'stroke="#000" stroke-width="1.3"/>'
            )
        if metric["paper"] is not None:
            at = x.at(metric["paper"])
            said += f", the paper's {metric['paper']:.4f}"
            drawn.append(
                f'<path d="M{at:.1f} {middle - 6}l5 6-5 6-5-6z" fill="#fff" stroke="#000" stroke-width="1.2"/>'
            )
        parts.append(f"<g><title>{escape(said)}</title>{''.join(drawn)}</g>")
        parts.append(_text(left - 6, middle + 4, row["name"], "end", 24))
    height = bottom + 44
    if any(row["metrics"][name]["paper"] is not None for _, row in known):
        parts.append(f'<path d="M{left:.1f} {height}l5-6 5 6-5 6z" fill="#fff" stroke="#000" stroke-width="1.2"/>')
        parts.append(_text(left + 16, height + 4, "the paper's"))
        height += 10
    return _svg(height, f"{metric_name(name)} of each run in the test, with its 95 % interval", parts)


def costs(rows: Sequence[dict], name: str, cost: str) -> str:
    """A metric in the test over what a run costs, on a logarithmic axis; runs that cost nothing stand at its left end.

    Where markers crowd, names that would stand on others are left out: the marker is the table's, and the mouse shows the name.

    Args:
        cost: one of `COSTS`.
    """
    known = [(number, row) for number, row in enumerate(rows) if row["metrics"][name]["mean"] is not None]
    if not known:
        return ""
    paid = [row[cost] for _, row in known if row[cost] > 0]
    free = len(paid) < len(known)
    left = 92 if free else 56
    low, high = (min(paid) / 1.6, max(paid) * 1.6) if paid else (1.0, 10.0)
    x = Axis(low, high, left, WIDTH - 16, True)
    values = [end for _, row in known for end in (row["metrics"][name]["interval"] or [row["metrics"][name]["mean"]])]
    y = Axis(*_padded(min(values), max(values)), 250, 12)
    parts = _frame(x, y, f"{COSTS[cost]}, logarithmic", f"{metric_name(name)} in the test", _count, 56)
    if free:
        parts.append(_text(68, 266, "0", "middle"))
        parts.append(f'<path d="M{left - 8} 12V250" stroke="#999" stroke-dasharray="2 3"/>')
    places, markers, names = {}, [], []
    for number, row in known:
        at = (x.at(row[cost]) if row[cost] > 0 else 68.0, y.at(row["metrics"][name]["mean"]))
        places[number] = at
        markers.append((at[0] - 6, at[1] - 6, at[0] + 6, at[1] + 6))
    for number, row in known:
        metric, (across, down) = row["metrics"][name], places[number]
        shown = f"{row[cost]:,.1f}" if cost == "seconds" else f"{row[cost]:,}"
        said = f"{row['name']}: {metric['mean']:.4f}, {COSTS[cost]} {shown}"
        line = ""
        if metric["interval"]:
            low, high = map(y.at, metric["interval"])
            line = f'<path d="M{across:.1f} {low:.1f}V{high:.1f}" stroke="{Look(number).colour}" stroke-opacity=".6"/>'
        parts.append(f"<g><title>{escape(said)}</title>{line}{Look(number).marker(across, down)}</g>")
    for number, row in known:
        parts.append(_label(row["name"], *places[number], markers, names))
    return _svg(296, f"{metric_name(name)} of each run in the test over its {COSTS[cost]}", parts)


def swatch(number: int) -> str:
    """The look of a run beside its name in a table."""
    return f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true">{_swatch(0, 6, Look(number))}</svg>'


def _swatch(left: float, middle: float, look: Look) -> str:
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    line = f'<path d="M{left} {middle}h34" stroke="{look.colour}" stroke-width="1.6"{dash}/>'
    return line + look.marker(left + 17, middle)


def _label(name: str, x: float, y: float, markers: Sequence[tuple], names: list[tuple]) -> str:
    """A name beside its marker, where it covers least of the `markers`; nothing where it would stand on one of the `names`.

    All are boxes (left, top, right, bottom); `names` gets its own.
    """
    name = _cut(name, 24)
    width = _LETTER * len(name)

    def box(side: str, down: float) -> tuple:
        left = {"start": x + 9, "end": x - 9 - width, "middle": x - width / 2}[side]
        return (left, y + down - 10, left + width, y + down + 3)

    def cost(found: tuple) -> float:
        beyond = max(0.0, 56 - found[0]) + max(0.0, found[2] - WIDTH) + max(0.0, -found[1]) + max(0.0, found[3] - 250)
        return 1e3 * beyond + sum(_shared(found, marker) for marker in markers)

    sides = [
        ("start", 4),
        ("end", 4),
        ("start", -9),
        ("start", 16),
        ("middle", -10),
        ("middle", 19),
        ("end", -9),
        ("end", 16),
    ]
    places = [place for place in sides if not any(_shared(box(*place), other) for other in names)]
    if not places:
        return ""
    side, down = min(places, key=lambda place: cost(box(*place)))
    names.append(box(side, down))
    return _text({"start": x + 9, "end": x - 9, "middle": x}[side], y + down, name, side)


def _shared(box: tuple, other: tuple) -> float:
    """The area that two boxes have in common."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    return max(0.0, across) * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))


def _frame(x: Axis, y: Axis, across: str, up: str, show, left: float | None = None) -> list[str]:
    """Both axes with their ticks, and what they are."""
    left = x.start if left is None else left
    fine = _fine(y)
    parts = [_across(x, y.start, across, show, left)]
    for value in y.ticks():
        at = y.at(value)
        parts.append(
            f'<path d="M{left} {at:.1f}H{x.end}" stroke="#ddd"/>' + _text(left - 5, at + 4, fine(value), "end")
        )
    middle = (y.start + y.end) / 2
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(up)}</text>')
    return parts


def _across(x: Axis, bottom: float, name: str, show, left: float | None = None) -> str:
    """The lower axis."""
    left = x.start if left is None else left
    parts, free = [f'<path d="M{left} {bottom}H{x.end}" stroke="#000"/>'], -math.inf
    for value in x.ticks():
        at, shown = x.at(value), show(value)
        parts.append(f'<path d="M{at:.1f} {bottom}v4" stroke="#000"/>')
        if at - _LETTER * len(shown) / 2 > free:
            parts.append(_text(at, bottom + 17, shown, "middle"))
            free = at + _LETTER * len(shown) / 2 + 6
    parts.append(_text((left + x.end) / 2, bottom + 36, name, "middle"))
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str = "start", limit: int = 99) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(_cut(words, limit))}</text>'


def _cut(words: str, limit: int) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little more than the range, and never below 0 where it was not."""
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _fine(axis: Axis):
    """Writes the ticks of an axis with as many places as they need."""
    ticks = axis.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else max(abs(axis.high), 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return lambda value: f"{value:.{places}f}"


def _count(value: float) -> str:
    """100, 2k, 1.5M, 3G."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _svg(height: float, said: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(said)}">'
        f"{''.join(parts)}</svg>"
    )
