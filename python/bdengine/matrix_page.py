"""The tables of a matrix: ``matrix.json``, ``matrix.md``, and ``matrix.html`` with the picture of every cell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from bdkernels import env

from . import __version__, markup
from .cells import MatrixConfig
from .config import command, to_json
from .defenses import Finding
from .files import write_atomic, write_json

MISSING: Final = "—"
LABELS: Final = 3
"""Columns that say which cell it is; the rest are numbers."""
NOTE: Final = (
    "Fréchet distance of clean samples to the data; MSE, SSIM and ASR of triggered samples to the target (of a class: the share"
    " that a classifier takes for it), after a repair under the clip that the attack was made for. A detector examines with the"
    " model's own sampler, marked *, and decides where it has a calibration; of a model that was trained otherwise than the"
    " calibration's its p-value is a rank among them, and bounds no rate. Seconds: of both arms' samples, of an examination,"
    " of a repair with its samples."
)


Names = tuple[str, str, str]
"""Attack, defense and sampler."""


@dataclass(frozen=True)
class Row:
    """One cell. Where ``statistic`` is None samples were scored, else the model was examined."""

    attack: str
    defense: str
    sampler: str
    own: bool
    """Whether the model was made for the sampler."""
    picture: str | None
    """Its file in the matrix's folder; None where a detector made no images."""
    seconds: float
    frechet: float | None = None
    mse: float | None = None
    ssim: float | None = None
    asr: float | None = None
    asr_class: int | None = None
    under: str | None = None
    """The clip of the triggered samples, where clean ones are of another."""
    verdict: str | None = None
    statistic: float | None = None
    p_value: float | None = None

    @classmethod
    def of_scores(
        cls, scores: dict[str, Any], clips: tuple[str, str], names: Names, picture: Path, own: bool, spent: float
    ) -> Row:
        """Of what ``scores.json`` holds under the ``clips`` of clean and of triggered samples, after ``spent`` seconds."""
        clean, triggered = (
            scores["arms"][start][clip] for start, clip in zip(("clean", "triggered"), clips, strict=True)
        )
        under = None if clips[0] == clips[1] else clips[1]
        seconds = spent + (clean["images"] + triggered["images"]) / scores["images_per_second"]["sampling"]
        told = {what: triggered.get(what) for what in ("mse", "ssim", "asr")}
        label = scores.get("asr_class")
        return cls(*names, own, str(picture), seconds, frechet=clean["frechet"], **told, asr_class=label, under=under)

    @classmethod
    def of_finding(cls, finding: Finding, names: Names, picture: Path | None) -> Row:
        """Of a detector's finding, with the model's own sampler."""
        told = {what: getattr(finding, what) for what in ("verdict", "statistic", "p_value")}
        return cls(*names, True, None if picture is None else str(picture), finding.seconds, **told)

    @property
    def success(self) -> str:
        """Its ASR."""
        if self.asr is None:
            return MISSING
        notes = (
            "" if self.asr_class is None else f"class {self.asr_class}",
            f"{self.under} clip" if self.under else "",
        )
        told = ", ".join(filter(None, notes))
        return f"{100 * self.asr:.1f} %" + (f" ({told})" if told else "")

    @property
    def found(self) -> str:
        """Its verdict with what that stands on."""
        if self.statistic is None:
            return MISSING
        return f"{self.verdict}, {self.statistic:.4g}" + ("" if self.p_value is None else f", p = {self.p_value:.2g}")


COLUMNS: Final[dict[str, Callable[[Row], str]]] = {
    "attack": lambda row: row.attack,
    "defense": lambda row: row.defense,
    "sampler": lambda row: row.sampler + " *" * row.own,
    "Fréchet": lambda row: _number(row.frechet, 2),
    "MSE": lambda row: _number(row.mse, 4),
    "SSIM": lambda row: _number(row.ssim, 3),
    "ASR": lambda row: row.success,
    "detected, statistic": lambda row: row.found,
    "seconds": lambda row: f"{row.seconds:.1f}",
}


def write_tables(config: MatrixConfig, rows: Sequence[Row]) -> None:
    """The module's files."""
    told = {"command": command("matrix", config), "version": __version__, "cpu": env.found()["cpu"]}
    write_json(config.out / "matrix.json", told | {"run": to_json(config), "rows": to_json(rows)})
    write_atomic(config.out / "matrix.md", markdown(rows))
    write_atomic(config.out / "matrix.html", page(config, rows))


def console(rows: Sequence[Row]) -> str:
    """Every cell in aligned columns; no final newline."""
    lines = [[*COLUMNS], *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k < LABELS else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(rows: Sequence[Row]) -> str:
    """The overview, then every cell."""
    tables = [(*overview(rows), 1), ([*COLUMNS], list(map(cells, rows)), LABELS)]
    parts = []
    for header, lines, labels in tables:
        marks = ["---"] * labels + ["---:"] * (len(header) - labels)
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in (header, marks, *lines)))
    return "\n".join([*parts, f"{NOTE}\n"])


def cells(row: Row) -> list[str]:
    """A row's text."""
    return [text(row) for text in COLUMNS.values()]


def overview(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of attacks x defenses: the ASR with the model's own sampler (the first where it is not there)."""
    attacks, defenses = (
        list(dict.fromkeys(names)) for names in zip(*((r.attack, r.defense) for r in rows), strict=True)
    )
    best: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda r: not r.own):
        best.setdefault((row.attack, row.defense), row)
    lines = [[attack, *(_told(best[attack, defense]) for defense in defenses)] for attack in attacks]
    return ["attack", *defenses], lines


def page(config: MatrixConfig, rows: Sequence[Row]) -> str:
    """One HTML file that needs nothing else."""
    groups = [(attack, list(group)) for attack, group in itertools.groupby(rows, key=lambda row: row.attack)]
    header, lines = overview(rows)
    return markup.page(
        "matrix.html",
        "Attacks, defenses and samplers",
        overview=_table("Overview", header, [("", lines)], 1),
        table=_table(
            "Cells", [*COLUMNS][1:], [(a, [cells(row)[1:] for row in group]) for a, group in groups], LABELS - 1
        ),
        note=markup.text(NOTE),
        pictures="".join(_pictures(config.out, attack, group) for attack, group in groups),
        run=markup.text(command("matrix", config)),
    )


def _told(row: Row) -> str:
    if row.statistic is None:
        return row.success
    return f"{row.statistic:.4g}" if row.verdict == "undecided" else row.found


def _table(name: str, header: Sequence[str], groups: Sequence[tuple[str, Sequence[Sequence[str]]]], labels: int) -> str:
    head = "".join(f'<th scope="col">{markup.text(one)}</th>' for one in header)
    body = ""
    for title, lines in groups:
        body += "<tbody>"
        if title:
            body += f'<tr><th class="source" scope="rowgroup" colspan="{len(header)}">{markup.text(title)}</th></tr>'
        body += "".join(f"<tr>{''.join(_cell(k, one, labels) for k, one in enumerate(line))}</tr>" for line in lines)
        body += "</tbody>"
    return markup.scroll(name, f"<table><thead><tr>{head}</tr></thead>{body}</table>")


def _cell(column: int, cell: str, labels: int) -> str:
    if column < labels:
        return f'<th scope="row">{markup.text(cell)}</th>'
    share = cell.partition(" %")[0] if " %" in cell else ""
    bar = f' class="share" style="--part:{share}%"' if share else ""
    return f"<td{bar}>{markup.text(cell)}</td>"


def _pictures(out: Path, attack: str, rows: Sequence[Row]) -> str:
    figures = "".join(
        f"<figure>{markup.image(Image.open(out / row.picture), f'{attack}, {row.defense}, {row.sampler}')}"
        f"<figcaption><b>{markup.text(row.defense)}</b> {markup.text(row.sampler)}</figcaption></figure>"
        for row in rows
        if row.picture is not None
    )
    return f'<h3>{markup.text(attack)}</h3><div class="cells">{figures}</div>'


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"
