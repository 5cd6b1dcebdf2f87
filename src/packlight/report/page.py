"""The page that shows reports in a browser: `report.html` with the numbers written into it."""

import html
import json
import os
from importlib import resources
from typing import Any

from packlight._files import write_text

_TEMPLATE = "report.html"


def write_page(
    path: str | os.PathLike[str],
    title: str,
    reports: dict[str, Any],
    about: dict[str, str],
    further: str = "",
) -> None:
    """Write one file that needs no other and no network; `about` says what was measured.

    `further` is HTML that follows.
    """
    data = {**reports, "about": about}
    template = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    page = template.replace("{{further}}", further).replace("{{title}}", html.escape(title))
    write_text(path, page.replace("{{data}}", _embedded(data)))


def _embedded(data: dict[str, Any]) -> str:
    """JSON that a script element can hold: nothing in it can end the element or open a comment."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
