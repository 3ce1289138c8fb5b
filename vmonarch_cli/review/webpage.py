"""Pages that open from a file: one HTML file, styles and pictures inside it, nothing fetched and no script.

The templates beside this module escape every value (jinja2's autoescape), and `clean` takes out what would still steer
a reader's eye or break the file. Pages carry a policy that forbids scripts and requests.
"""

from __future__ import annotations

import base64
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

COLOURS = 6
"""How many lines of a chart have colours of their own (.k0 to .k5 in style.css)."""
_UNWANTED = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def clean(value: Any) -> Any:
    """A text with \ufffd for control characters, lone surrogates and marks that reverse the direction of writing."""
    return _UNWANTED.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


PAGES = Environment(
    loader=PackageLoader("vmonarch_cli.review"),
    autoescape=select_autoescape(["html"], default_for_string=True),
    finalize=clean,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
"""Every value that a template shows goes through `clean` and is escaped."""


def render(template: str, **values: Any) -> str:
    """The page that a template of this package makes of values."""
    return PAGES.get_template(template).render(**values)


def colour(number: int) -> str:
    """The class of a chart's line."""
    return f"k{number % COLOURS}"


def data_uri(content: bytes, kind: str) -> str:
    """A file inside the page; `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
