"""A loss curve as inline SVG that fills its box, with text that keeps its size and colours that the page decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

X_TICKS = 6
"""Steps between the ticks under the curve, at most."""
Y_TICKS = 8
"""Ticks beside it, at most, unless these are powers of ten."""


def svg(points: Sequence[Mapping[str, float]], label: str) -> str:
    """The loss over the images seen, on a logarithmic scale.

    Lengths are percentages of the element, so it stretches with the page while its text does not; text stands outside
    the plot, in a margin that the page leaves. Lines have the classes ``rule`` and ``line``, for its style.

    Args:
        points: At least two, each with ``"images"`` (ascending, at least 0, the last above 0) and ``"loss"`` (above 0).
        label: What a reader who cannot see it is told.

    Returns:
        One ``<svg>`` element.
    """
    last = points[-1]["images"]
    losses = [point["loss"] for point in points]
    levels = _levels(min(losses), max(losses))

    def x(images: float) -> float:
        return 100 * images / last

    def y(loss: float) -> float:
        return 100 * math.log(levels[-1] / loss) / math.log(levels[-1] / levels[0])

    parts = []
    for level in levels:
        at = f"{y(level):.2f}%"
        parts.append(f'<line class="rule" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="-8" y="{at}" dy=".35em" text-anchor="end">{level:g}</text>')
    step = _round_step(last / X_TICKS)
    for tick in range(0, int(last) + 1, step):
        at = f"{x(tick):.2f}%"
        parts.append(f'<line class="rule" x1="{at}" x2="{at}" y1="0" y2="100%"/>')
        parts.append(f'<text x="{at}" y="100%" dy="20" text-anchor="middle">{_short(tick)}</text>')
    way = " ".join(f"{x(point['images']):.3f},{y(point['loss']):.3f}" for point in points)
    return (
        f'<svg class="curve" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        '<text x="50%" y="100%" dy="44" text-anchor="middle">images seen</text>'
        '<text x="-8" y="0" dy="-14" text-anchor="end">loss</text>'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">'
        f'<polyline class="line" vector-effect="non-scaling-stroke" points="{way}"/></svg></svg>'
    )


def _levels(low: float, high: float, digits: Sequence[int] = (1, 2, 5)) -> list[float]:
    """Powers of ten times ``digits`` from the last at or below ``low`` to the first at or above ``high``, a few."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    every = [float(f"{digit}e{power}") for power in powers for digit in digits]
    first = max(k for k, level in enumerate(every) if level <= low)
    last = min(k for k, level in enumerate(every) if level >= high and k > first)
    return every[first : last + 1] if last - first < Y_TICKS or digits == (1,) else _levels(low, high, (1,))


def _round_step(least: float) -> int:
    """The smallest 1, 2 or 5 times a power of ten that is whole and at least ``least``."""
    power = 10 ** math.floor(math.log10(max(least, 1)))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least)


def _short(count: int) -> str:
    return f"{count / 1e6:g} M" if count >= 1e6 else f"{count / 1e3:g} k" if count >= 1e3 else str(count)
