"""Pieces of a page that needs nothing else: text, pictures as data, and what scrolls."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Final

from PIL import Image
from torch import Tensor

from . import pictures

_ASSETS: Final = Path(__file__).with_name("assets")
MARK_WIDTH: Final = 96
"""CSS pixels of the trigger and of the target, at most."""


def page(template: str, title: str, **parts: str) -> str:
    """A whole page: a template of the package filled with ``parts``, under one head and style; only the title is escaped."""
    shown = text(title)
    body = _template(template).substitute(parts, title=shown)
    return _template("page.html").substitute(title=shown, style=(_ASSETS / "page.css").read_text("utf-8"), body=body)


def _template(name: str) -> Template:
    return Template((_ASSETS / name).read_text("utf-8"))


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Entries of a definition list."""
    return "".join(f"<div><dt>{text(term)}</dt><dd>{text(fact)}</dd></div>" for term, fact in pairs)


def scroll(label: str, body: str) -> str:
    """``body`` in a region that scrolls sideways by itself."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{body}</div>'


def mark(one: Tensor, name: str) -> str:
    """A small figure of float [C, S, S] in [-1, 1]."""
    picture = pictures.grid(one[None], scale=max(1, MARK_WIDTH // one.shape[-1]))
    return f"<figure>{image(picture, f'The {name}')}<figcaption>{name}</figcaption></figure>"


def image(picture: Image.Image, alt: str) -> str:
    """A picture inside of the page."""
    data = base64.b64encode(pictures.png_bytes(picture)).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:image/png;base64,{data}" {size} alt="{escape(alt)}">'


def text(words: str) -> str:
    """Words, whose percent signs and arrows stay on their line."""
    return escape(words).replace(" %", "\N{NO-BREAK SPACE}%").replace(" → ", "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}")
