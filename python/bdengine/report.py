"""What an experiment showed, for people: one sentence, one table for a terminal or a README, one page.

``metrics`` is what ``metrics.json`` holds::

    {"source": "live" | "shipped", "asr_threshold": float, "images_per_second": {"training": float, "sampling": float},
     "before": score, "live": {"arms": arms, "images_seen": int, "seconds": float}, "shipped": {"arms": arms}}

with ``arms[start][clip]`` a score for the starts "clean" and "triggered" and the clips "none", "latent" and "x0", and
a score ``{"asr", "mse", "ssim", "frechet": float, "frechet_interval": [low, high], "images": int, "extractor": str}``.
The arms of ``source`` may stand at the top level instead, and the threshold and the rates beside its arms. Every part
may be missing or None but ``source``, its arms and, in a score, ``images``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from PIL import Image
from torch import Tensor

from bdengine import curve, markup, pictures
from bdengine.errors import UserError
from bdengine.files import write_atomic

SOURCES: Final = {"before": "before the attack", "live": "live run", "shipped": "shipped model"}
CLAMPED: Final = {"latent": "the latent at every step", "x0": "the predicted image"}
MISSING: Final = "—"
LABELS: Final = 3
"""Columns of the table that say which arm it is; the rest are numbers."""
STRIP_WIDTH: Final = 840
"""CSS pixels that a row of images takes beside its name, at most, where twice its own width fits."""
SAMPLES_NOTE: Final = (
    "Every column starts from one seed, so its samples share their noise. Clip says what is clamped to [-1, 1] at "
    "every step: <i>latent</i> the sample on its way, <i>x0</i> the image predicted from it, <i>none</i> nothing."
)
FILMS_NOTE: Final = "The sample on its way, from the first step to the image."
CURVE_NOTE: Final = "The loss of the live run, on a logarithmic scale."

Metrics = Mapping[str, Any]
Clips = Mapping[str, Metrics]


@dataclass(frozen=True, eq=False)
class Report:
    """What the page shows.

    Attributes:
        title: The headline.
        subtitle: What was done, in a line.
        metrics: The numbers, as the module describes them.
        arms: By source ("live", "shipped") and arm ("triggered / latent"): float [N,C,S,S] in [-1,1], the same seeds in
            every arm.
        trigger: float [C,S,S] in [-1,1].
        target: float [C,S,S] in [-1,1].
        films: Film strips by what they show.
        curve: The lines of ``stats.jsonl``: "images", "loss" and "images_per_second" are read.
        command: What a terminal needs to repeat it.
    """

    title: str
    subtitle: str
    metrics: Metrics
    arms: Mapping[str, Mapping[str, Tensor]]
    trigger: Tensor
    target: Tensor
    films: Mapping[str, Image.Image]
    curve: Sequence[Mapping[str, float]]
    command: str


def write_report(path: Path, report: Report) -> None:
    """Writes one HTML file that needs nothing else: no script, no font, no network; parts without content are left out.

    Raises:
        UserError: Metrics without arms, images that are none (:func:`bdengine.pictures.grid`), or a refused write.
    """
    write_atomic(path, page(report))


def verdict(metrics: Metrics, source: str | None = None) -> str:
    """What the numbers of a source (by default ``metrics["source"]``) say, in one sentence.

    A success rate counts as changed when it moves by more than two standard errors of the difference, clean quality
    when the intervals of the Fréchet distances are apart; distances of unequal extractor or number of images are not
    compared. Says so where nothing was measured.
    """
    arms = _arms(metrics, source or metrics["source"])
    clean, triggered = arms.get("clean", {}), arms.get("triggered", {})
    parts = []
    if attack := triggered.get("none"):
        parts.append(f"triggered samples become the target in {_percent(attack['asr'])} of cases")
        parts += [
            f"clamping {name} {_verb(attack, triggered[clip])} {_percent(triggered[clip]['asr'])}"
            for clip, name in CLAMPED.items()
            if clip in triggered
        ]
    if "none" in clean and clean["none"].get("frechet") is not None:
        parts.append(_quality(metrics.get("before"), clean))
    sentence = "; ".join(parts) or "nothing was measured"
    return sentence[0].upper() + sentence[1:] + "."


def markdown_table(metrics: Metrics) -> str:
    """The numbers of every source as a table in Markdown, a row an arm; ends with a newline.

    Raises:
        UserError: Metrics without arms.
    """
    header, rows = _table(metrics)
    marks = ["---"] * LABELS + ["---:"] * (len(header) - LABELS)
    lines = [" | ".join(cell.replace("|", r"\|") for cell in cells) for cells in (header, marks, *rows)]
    return "".join(f"| {line} |\n" for line in lines)


def console_table(metrics: Metrics) -> str:
    """The table of :func:`markdown_table` in aligned columns; no final newline.

    Raises:
        UserError: Metrics without arms.
    """
    header, rows = _table(metrics)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["─" * width for width in widths]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if k < LABELS else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, (header, rule, *rows)))


def page(report: Report) -> str:
    """The HTML that :func:`write_report` writes.

    Raises:
        UserError: As :func:`write_report`.
    """
    metrics = report.metrics
    first, *others = _sources(metrics)
    points = [point for point in report.curve if point["loss"] > 0]
    samples = "".join(_samples(metrics, source, arms) for source, arms in report.arms.items())
    films = "".join(
        f"<h3>{markup.text(name)}</h3>{markup.scroll(name, markup.image(film, name))}"
        for name, film in report.films.items()
    )
    return markup.page(
        "report.html",
        report.title,
        subtitle=markup.text(report.subtitle),
        source=markup.text(_named(first)),
        verdict=re.sub(r"[0-9.]+\s%", r"<b>\g<0></b>", markup.text(verdict(metrics, first))),
        others="".join(
            f"<p><b>{markup.text(_named(other))}:</b> {markup.text(verdict(metrics, other))}</p>" for other in others
        ),
        trigger=markup.mark(report.trigger, "trigger"),
        target=markup.mark(report.target, "target"),
        facts=markup.facts(_facts(metrics)),
        samples=_section("samples", "Samples", SAMPLES_NOTE, samples),
        table=_html_table(metrics),
        films=_section("films", "From noise to image", FILMS_NOTE, films),
        curve=_section("training", "Training", CURVE_NOTE, _curve(points) if len(points) > 1 else ""),
        command=escape(report.command),
        numbers=escape(json.dumps(metrics, indent=2, ensure_ascii=False)),
    )


def _sources(metrics: Metrics) -> list[str]:
    main = metrics["source"]
    found = [source for source in dict.fromkeys((main, "live", "shipped")) if _arms(metrics, source)]
    if main not in found:
        raise UserError(f"the metrics hold no arms of their source {main!r}: expected scores of at least one arm")
    return found


def _arms(metrics: Metrics, source: str) -> Mapping[str, Clips]:
    own = (metrics.get(source) or {}).get("arms")
    return own or (metrics.get("arms") if source == metrics["source"] else None) or {}


def _settings(metrics: Metrics) -> Metrics:
    return {**(metrics.get(metrics["source"]) or {}), **metrics}


def _named(source: str) -> str:
    return SOURCES.get(source, source)


def _verb(before: Metrics, after: Metrics) -> str:
    n, m = before["images"], after["images"]
    pooled = (n * before["asr"] + m * after["asr"]) / (n + m)
    change = after["asr"] - before["asr"]
    if abs(change) <= 2 * math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m)):
        return "leaves that at"
    return "brings that to" if change < 0 else "raises that to"


def _quality(before: Metrics | None, clean: Clips) -> str:
    after = clean["none"]
    text = f"clean samples have a Fréchet distance of {_number(after['frechet'], 2)}"
    if before and before.get("frechet") is not None and _conditions(before) == _conditions(after):
        (low, high), (new_low, new_high) = _interval(before), _interval(after)
        change = "lose" if new_low > high else "gain" if new_high < low else "keep their"
        text = (
            f"clean samples {change} quality: "
            f"Fréchet distance {_number(before['frechet'], 2)} → {_number(after['frechet'], 2)}"
        )
    clamped = [_number(clean[clip]["frechet"], 2) for clip in CLAMPED if clean.get(clip, {}).get("frechet") is not None]
    return f"{text} ({' and '.join(clamped)} under the clamps)" if clamped else text


def _conditions(score: Metrics) -> tuple[int, str]:
    return score["images"], score["extractor"]


def _interval(score: Metrics) -> tuple[float, float]:
    low, high = score.get("frechet_interval") or (score["frechet"], score["frechet"])
    return low, high


def _table(metrics: Metrics) -> tuple[list[str], list[list[str]]]:
    settings = _settings(metrics)
    threshold, label = settings.get("asr_threshold"), settings.get("asr_class")
    named = [("before", "clean", "none", metrics["before"])] if metrics.get("before") else []
    for source in _sources(metrics):
        for start, clips in _arms(metrics, source).items():
            named += [(source, start, clip, score) for clip, score in clips.items()]
    extractors = sorted({score["extractor"] for *_, score in named if score.get("extractor")})
    header = [
        "source",
        "start",
        "clip",
        f"ASR (MSE < {threshold:g})" if threshold else "ASR" if label is None else f"ASR (class {label})",
        "MSE",
        "SSIM",
        f"Fréchet ({', '.join(extractors)}) [95 %]" if extractors else "Fréchet [95 %]",
        "n",
    ]
    return header, [[source, start, clip, *_cells(score)] for source, start, clip, score in named]


def _cells(score: Metrics) -> list[str]:
    asr, distance = score.get("asr"), _number(score.get("frechet"), 2)
    if score.get("frechet_interval"):
        distance += " [{:.2f}, {:.2f}]".format(*score["frechet_interval"])
    return [
        MISSING if asr is None else f"{100 * asr:.1f} %",
        _number(score.get("mse"), 4),
        _number(score.get("ssim"), 3),
        distance,
        f"{score['images']:,}",
    ]


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _percent(share: float) -> str:
    # 99.6 % of cases are not all of them
    digits = 0 if share in (0, 1) or 0.01 <= share <= 0.99 else 1
    return f"{100 * share:.{digits}f} %"


def _facts(metrics: Metrics) -> list[tuple[str, str]]:
    facts = []
    arms, run = _arms(metrics, metrics["source"]), metrics.get("live") or {}
    counts = [f"{score['images']:,} {start}" for start, clips in arms.items() for score in [*clips.values()][:1]]
    facts.append(("samples an arm", ", ".join(counts)))
    if threshold := _settings(metrics).get("asr_threshold"):
        facts.append(("success", f"MSE to the target below {threshold:g}"))
    if "images_seen" in run:
        facts.append(("implanted live", f"{run['images_seen']:,} images in {run['seconds']:,.0f} s"))
    if rates := _settings(metrics).get("images_per_second"):
        facts.append(("images per second", ", ".join(f"{kind} {rate:,.0f}" for kind, rate in rates.items())))
    return facts


def _samples(metrics: Metrics, source: str, arms: Mapping[str, Tensor]) -> str:
    rows = []
    for name, images in arms.items():
        start, _, clip = name.partition(" / ")
        score = _arms(metrics, source).get(start, {}).get(clip)
        scale = max(2, STRIP_WIDTH // (len(images) * (images.shape[-1] + 1)))
        strip = markup.image(
            pictures.grid(images, columns=len(images), scale=scale),
            f"{len(images)} samples of the {_named(source)}, {name}",
        )
        asr = f"<small>ASR {markup.text(_percent(score['asr']))}</small>" if score else ""
        rows.append(
            f'<figure style="--n:{len(images)}"><figcaption><b>{markup.text(start)}</b> {markup.text(clip)}{asr}</figcaption>'
            f"{strip}</figure>"
        )
    return f"<h3>{markup.text(_named(source))}</h3>{markup.scroll(f'Samples of the {_named(source)}', ''.join(rows))}"


def _html_table(metrics: Metrics) -> str:
    header, rows = _table(metrics)
    head = "".join(f'<th scope="col">{markup.text(cell)}</th>' for cell in header[1:])
    bodies = []
    for source, members in itertools.groupby(rows, key=lambda row: row[0]):
        lines = "".join(f"<tr>{''.join(map(_html_cell, range(1, len(row)), row[1:]))}</tr>" for row in members)
        title = f'<tr><th class="source" scope="rowgroup" colspan="{len(header) - 1}">{markup.text(_named(source))}</th></tr>'
        bodies.append(f"<tbody>{title}{lines}</tbody>")
    return markup.scroll("Numbers", f"<table><thead><tr>{head}</tr></thead>{''.join(bodies)}</table>")


def _html_cell(column: int, cell: str) -> str:
    if column < LABELS:
        return f'<th scope="row">{markup.text(cell)}</th>'
    bar = f' class="share" style="--part:{cell.replace(" ", "")}"' if cell.endswith("%") else ""
    return f"<td{bar}>{markup.text(cell)}</td>"


def _curve(points: Sequence[Mapping[str, float]]) -> str:
    first, last = points[0], points[-1]
    label = f"Loss from {first['loss']:.3g} to {last['loss']:.3g} over {last['images']:,} images"
    return f"<figure>{curve.svg(points, label)}<figcaption>{markup.text(label)}</figcaption></figure>"


def _section(name: str, heading: str, note: str, body: str) -> str:
    return f'<section class="{name}"><h2>{heading}</h2><p>{note}</p>{body}</section>' if body else ""
