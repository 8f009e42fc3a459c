"""Equations become MathML when the site is built: a page needs no script and no network to show them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

# What latex2mathml makes of \sim and of a slash is not spaced as TeX spaces it.
_CORRECTIONS = {
    "<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>",
    "<mo>&#x0002F;</mo>": '<mo lspace="0" rspace="0">&#x0002F;</mo>',
}


def on_page_content(html: str, **_: Any) -> str:
    """Replace what the extension arithmatex marked."""
    return _EQUATION.sub(_as_mathml, html)


def _as_mathml(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    tag, latex = found.groups()
    display = "block" if tag == "div" else "inline"
    mathml = convert(unescape(latex).strip(), display=display)
    for written, meant in _CORRECTIONS.items():
        mathml = mathml.replace(written, meant)
    return f'<{tag} class="equation">{mathml}</{tag}>'
