"""The report: sentences that the numbers bear out, equal tables everywhere, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from html.parser import HTMLParser
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from bdengine import pictures
from bdengine.data import stand_in, to_float
from bdengine.errors import UserError
from bdengine.report import Report, console_table, markdown_table, page, verdict, write_report

EXTRACTOR = "digits-32-0a1b"


def score(asr: float, frechet: float | None, images: int = 512) -> dict[str, Any]:
    interval = None if frechet is None else [frechet - 0.5, frechet + 0.5]
    return {
        "mse": 0.25 - asr / 5,
        "ssim": asr,
        "asr": asr,
        "frechet": frechet,
        "frechet_interval": interval,
        "images": images,
        "extractor": EXTRACTOR,
    }


def arms() -> dict[str, dict[str, Any]]:
    return {
        "clean": {"none": score(0, 5.9), "latent": score(0, 6.5), "x0": score(0, 6)},
        "triggered": {"none": score(0.98, None, 256), "latent": score(0.03, 9, 256), "x0": score(0.97, None, 256)},
    }


def metrics() -> dict[str, Any]:
    return {
        "source": "live",
        "before": {k: v for k, v in score(0, 5.1).items() if k not in ("mse", "ssim", "asr")},
        "arms": arms(),
        "live": {"arms": arms(), "images_seen": 51_200, "seconds": 181.6},
        "shipped": {"arms": arms()},
        "asr_threshold": 0.01,
        "images_per_second": {"training": 310.4, "sampling": 128.0},
    }


def images(count: int = 12) -> Tensor:
    return to_float(stand_in(16, 1, count).pixels)


def report() -> Report:
    shown = {f"{start} / {clip}": images() for start, clips in arms().items() for clip in clips}
    return Report(
        title="A model, backdoored",
        subtitle="In one line",
        metrics=metrics(),
        arms={"live": shown, "shipped": shown},
        trigger=images(1)[0],
        target=-images(1)[0],
        films={"triggered": pictures.film_strip([images(1)] * 9, [f"t = {t}" for t in range(9)], scale=5)},
        curve=[{"images": 100 * k, "loss": 1 / k, "lr": 1e-3, "images_per_second": 300.0} for k in range(1, 41)],
        command="bdengine demo",
    )


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


# The sentence


def test_the_verdict_in_plain_words() -> None:
    assert verdict(metrics()) == verdict(metrics(), "shipped")
    assert verdict(metrics()) == (
        "Triggered samples become the target in 98 % of cases; clamping the latent at every step brings that to 3 %; "
        "clamping the predicted image leaves that at 97 %; clean samples keep their quality: "
        "Fréchet distance 5.10 → 5.90 (6.50 and 6.00 under the clamps)."
    )


@pytest.mark.parametrize(
    ("asr", "expected"),
    [
        (0.5, "leaves that at 50 %"),
        (0.56, "leaves that at 56 %"),
        (0.6, "raises that to 60 %"),
        (0.4, "brings that to 40 %"),
        (0.004, "brings that to 0.4 %"),
        (0.996, "raises that to 99.6 %"),
        (0, "brings that to 0 %"),
        (1, "raises that to 100 %"),
    ],
)
def test_a_rate_changes_when_it_moves_beyond_chance(asr: float, expected: str) -> None:
    found = {"triggered": {"none": score(0.5, None, 256), "latent": score(asr, None, 256)}}
    sentence = f"Triggered samples become the target in 50 % of cases; clamping the latent at every step {expected}."
    assert verdict({"source": "live", "arms": found}) == sentence


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (score(0, 4.0), "Clean samples lose quality: Fréchet distance 4.00 → 5.90"),
        (score(0, 7.0), "Clean samples gain quality: Fréchet distance 7.00 → 5.90"),
        (score(0, 5.0), "Clean samples keep their quality: Fréchet distance 5.00 → 5.90"),
        (score(0, 5.0, images=100), "Clean samples have a Fréchet distance of 5.90"),
        (score(0, 5.0) | {"extractor": "other"}, "Clean samples have a Fréchet distance of 5.90"),
        (score(0, None), "Clean samples have a Fréchet distance of 5.90"),
        (None, "Clean samples have a Fréchet distance of 5.90"),
    ],
)
def test_quality_is_compared_like_with_like(before: dict[str, Any] | None, expected: str) -> None:
    found = {"source": "live", "before": before, "arms": {"clean": {"none": score(0, 5.9)}}}
    assert verdict(found) == f"{expected}."


def test_a_verdict_on_nothing() -> None:
    assert verdict({"source": "live"}) == "Nothing was measured."
    assert verdict({"source": "live", "arms": {"clean": {"none": score(0, None)}}}) == "Nothing was measured."


# The tables


def test_the_table_in_markdown() -> None:
    few = {
        "source": "shipped",
        "before": metrics()["before"],
        "arms": {"triggered": {"none": score(0.98, None, 2_560)}},
    }
    few["asr_threshold"] = 0.01
    assert markdown_table(few) == (
        "| source | start | clip | ASR (MSE < 0.01) | MSE | SSIM | Fréchet (digits-32-0a1b) [95 %] | n |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| before | clean | none | — | — | — | 5.10 [4.60, 5.60] | 512 |\n"
        "| shipped | triggered | none | 98.0 % | 0.0540 | 0.980 | — | 2,560 |\n"
    )


def test_the_same_table_on_a_terminal() -> None:
    cells = [re.split(r" {2,}", line) for line in console_table(metrics()).splitlines()]
    marked = [line.strip("| \n").split(" | ") for line in markdown_table(metrics()).splitlines()]
    assert cells[0] == marked[0]
    assert cells[2:] == marked[2:]
    assert [row[:3] for row in cells[2:4]] == [["before", "clean", "none"], ["live", "clean", "none"]]
    assert [row[0] for row in cells[2:]] == ["before", *["live"] * 6, *["shipped"] * 6]
    assert len({len(line) for line in console_table(metrics()).splitlines()}) == 1


def test_the_source_of_the_metrics_comes_first() -> None:
    rows = console_table(metrics() | {"source": "shipped"}).splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["before", *["shipped"] * 6, *["live"] * 6]


def test_arms_and_threshold_may_stand_in_either_place() -> None:
    apart = {"source": "live", "live": {"arms": arms(), "asr_threshold": 0.01}}
    together = {"source": "live", "arms": arms(), "asr_threshold": 0.01}
    assert console_table(apart) == console_table(together)
    assert "ASR (MSE < 0.01)" in console_table(apart)


def test_metrics_without_arms(tmp_path: Path) -> None:
    for table in (markdown_table, console_table):
        with pytest.raises(UserError, match="no arms of their source 'shipped'"):
            table({"source": "shipped", "live": {"arms": arms()}})
    with pytest.raises(UserError, match="no arms of their source 'live'"):
        write_report(tmp_path / "report.html", replace(report(), metrics={"source": "live"}))
    assert not list(tmp_path.iterdir())


# The page


def test_the_page_has_every_part_in_order(tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "report.html", report())
    source = (tmp_path / "deep" / "report.html").read_text("utf-8")
    assert source == page(report())
    text = Page(source).text
    parts = ["A model, backdoored", "In one line", verdict(metrics()).split("98 %")[0], "Samples", "Numbers",
             "From noise to image", "Training", "Repeat it", "bdengine demo"]  # fmt: skip
    places = [text.rindex(part) if part == "bdengine demo" else text.index(part) for part in parts]
    assert places == sorted(places)
    for fact in ("512 clean, 256 triggered", "MSE to the target below 0.01", "51,200 images in 182 s",
                 "training 310, sampling 128", "Loss from 1 to 0.025 over 4,000 images"):  # fmt: skip
        assert fact in text
    assert json.loads(text[text.index("All numbers of this run") :].partition("run")[2]) == metrics()


def test_the_page_says_which_source_it_shows() -> None:
    parsed = Page(page(report()))
    alts = [image["alt"] for image in parsed.all("img")]
    assert alts[:3] == ["The trigger", "The target", "12 samples of the live run, clean / none"]
    assert alts[-2:] == ["12 samples of the shipped model, triggered / x0", "triggered"]
    assert "Verdict, live run" in parsed.text
    assert "shipped model: Triggered samples become" in parsed.text


def test_the_table_on_the_page_is_the_same() -> None:
    cells = [html.unescape(cell).replace("\N{NO-BREAK SPACE}", " ")
             for row in re.findall("<tr>(.*?)</tr>", page(report())) if "rowgroup" not in row
             for cell in re.findall("<t[hd].*?>(.*?)</t[hd]>", row)]  # fmt: skip
    marked = [line.strip("| \n").split(" | ") for line in markdown_table(metrics()).splitlines()]
    assert cells == [cell for k, line in enumerate(marked) if k != 1 for cell in line[1:]]


def test_the_page_needs_nothing_else() -> None:
    source = page(report())
    parsed = Page(source)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "source"}
    assert "://" not in source
    assert "@import" not in source
    assert "url(" not in source
    for _, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert not set(attributes) & {"href", "srcset", "action", "background", "xlink:href"}
        assert attributes.get("src", "data:").startswith("data:")
    policy = next(meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_image_on_the_page_is_whole() -> None:
    shown = Page(page(report())).all("img")
    assert len(shown) == 2 + 12 + 1
    for image in shown:
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG"]) as picture:
            picture.load()
            assert picture.size == (int(image["width"]), int(image["height"]))
        assert image["alt"]
    strip = Image.open(io.BytesIO(base64.b64decode(shown[2]["src"].split(",")[1])))
    assert np.array_equal(np.array(strip), np.array(pictures.grid(images(), columns=12, scale=4)))


def worded(word: str) -> Report:
    """A report with ``word`` wherever a report holds text."""
    found = metrics() | {"source": word, word: {"arms": {word: {word: score(0.5, 5.0) | {"extractor": word}}}}}
    return replace(
        report(),
        title=word,
        subtitle=word,
        command=word,
        metrics=found | {"images_per_second": {word: 1.0}},
        arms={word: {f"{word} / {word}": images(8)}},
        films={word: report().films["triggered"]},
    )


def test_all_text_is_escaped() -> None:
    evil = """"><script>alert('x')</script><img src=//x.y onerror=a()>&amp; $title {title}"""
    parsed, tame = Page(page(worded(evil))), Page(page(worded("tame")))
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in tame.elements]
    assert [set(attributes) for _, attributes in parsed.elements] == [
        set(attributes) for _, attributes in tame.elements
    ]
    assert parsed.text.count(evil) == tame.text.count("tame")
    assert parsed.all("img")[-1]["alt"] == evil


def test_a_bar_does_not_split_a_cell_of_markdown() -> None:
    header = markdown_table({"source": "live", "arms": {"clean": {"none": score(0, 1.0) | {"extractor": "a|b"}}}})
    assert r"| Fréchet (a\|b) [95 %] |" in header


@pytest.mark.parametrize(
    "missing",
    [
        ("live",),
        ("shipped",),
        ("before",),
        ("arms",),
        ("asr_threshold",),
        ("images_per_second",),
        ("images_per_second", "training"),
        ("live", "arms", "triggered"),
        ("live", "arms", "clean"),
        ("live", "arms", "triggered", "none"),
        ("live", "arms", "clean", "latent"),
        ("live", "arms", "clean", "none", "ssim"),
        ("live", "arms", "clean", "none", "frechet_interval"),
        ("live", "arms", "clean", "none", "frechet"),
    ],
    ids="/".join,
)
def test_missing_numbers(missing: tuple[str, ...]) -> None:
    found = metrics()
    *above, last = missing
    del reduce(getitem, above, found)[last]
    text = Page(page(replace(report(), metrics=found))).text
    assert verdict(found).split(";")[0].rstrip(".") in text
    assert "None" not in text[: text.index("All numbers")]
    assert "nan" not in text[: text.index("All numbers")]


@pytest.mark.parametrize(
    ("part", "empty", "heading"),
    [("arms", {}, "Samples"), ("films", {}, "From noise to image"), ("curve", [], "Training")],
)
def test_missing_parts_leave_no_heading(part: str, empty: Any, heading: str) -> None:
    assert heading in Page(page(report())).text
    assert heading not in Page(page(replace(report(), **{part: empty}))).text


def test_one_point_is_no_curve() -> None:
    assert "Training" not in Page(page(replace(report(), curve=report().curve[:1]))).text


# The page in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")

MEASURE = """<!doctype html><body><script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => ({
    width: page.documentElement.scrollWidth,
    images: [...page.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]),
  }));
  document.body.innerText = JSON.stringify(found);
});
</script>"""


def browse(folder: Path, address: Path, *options: str) -> str:
    assert BROWSER is not None
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet]
    command += [f"--user-data-dir={folder / 'profile'}", *options, address.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Path]:
    write_report(tmp_path / "report.html", report())
    yield tmp_path / "report.html"
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


@in_browser
@pytest.mark.parametrize("size", [(1100, 1600), (390, 844)])
def test_the_page_is_drawn(size: tuple[int, int], address: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(tmp_path, address, f"--screenshot={shot}", f"--window-size={size[0]},{size[1]}")
    with Image.open(shot) as image:
        pixels = np.array(image.convert("L"))
    assert pixels.shape == size[::-1]
    paper = pixels[0, 0]
    for part in np.array_split(pixels, 4):
        assert 0.005 < (part != paper).mean() < 0.9


@in_browser
def test_every_image_loads_and_no_width_overflows(address: Path, tmp_path: Path) -> None:
    widths, source = (320, 390, 800, 1100), html.escape(page(report()))
    frames = "".join(f'<iframe style="border:0;height:900px;width:{w}px" srcdoc="{source}"></iframe>' for w in widths)
    (tmp_path / "measure.html").write_text(MEASURE + frames, "utf-8")
    dom = browse(tmp_path, tmp_path / "measure.html", "--dump-dom", "--virtual-time-budget=10000")
    found = json.loads(Page(dom).text)
    assert [frame["width"] for frame in found] == list(widths)
    for frame in found:
        assert len(frame["images"]) == 15
        assert all(natural > 0 and shown > 0 for natural, shown in frame["images"])
    assert all(natural == shown for natural, shown in found[-1]["images"])
