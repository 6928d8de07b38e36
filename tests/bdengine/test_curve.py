"""The loss curve: to scale, with round numbers along its axes, and never outside them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from bdengine import curve


def svg(points: list[tuple[float, float]]) -> tuple[list[str], list[tuple[float, float]]]:
    root = ET.fromstring(curve.svg([{"images": x, "loss": y} for x, y in points], 'a "label"'))
    assert root.get("aria-label") == 'a "label"'
    line = root.find("svg/polyline")
    assert line is not None
    way = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    return [text.text or "" for text in root.iter("text")], [(x, y) for x, y in way]


def test_the_curve_is_to_scale() -> None:
    texts, way = svg([(0, 1), (2_000, 0.1), (10_000, 0.01)])
    assert texts == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "0", "2 k", "4 k", "6 k", "8 k", "10 k",
                     "images seen", "loss"]  # fmt: skip
    assert way == [(0, 0), (20, 50), (100, 100)]


@pytest.mark.parametrize(
    ("points", "levels", "ticks"),
    [
        ([(1, 0.03), (2, 0.03)], ["0.02", "0.05"], ["0", "1", "2"]),
        ([(1, 0.02), (7, 0.02)], ["0.02", "0.05"], ["0", "2", "4", "6"]),
        ([(100, 3e-5), (3_000_000, 8)], ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1", "10"],
         ["0", "500 k", "1 M", "1.5 M", "2 M", "2.5 M", "3 M"]),
    ],
)  # fmt: skip
def test_round_numbers_along_the_axes(points: list[tuple[float, float]], levels: list[str], ticks: list[str]) -> None:
    texts, way = svg(points)
    assert texts == [*levels, *ticks, "images seen", "loss"]
    assert all(0 <= value <= 100 for point in way for value in point)
