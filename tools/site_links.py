"""A hook of mkdocs: links of pages to files outside of `docs` lead to the repository.

On a checkout such links are relative, so that they work there as well. `address` is the one in
pyproject.toml.
"""

import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent
# [text](target), where the target is no address and no anchor of the page itself.
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s]+)(\))")


def address(root: Path = ROOT) -> str:
    """Where the repository is to be read."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: str = project["urls"]["Repository"]
    return found.rstrip("/")


def absolute(text: str, folder: str, base: str, inside: str = "") -> str:
    """`text` of a page in `folder` of the repository, its relative links as addresses.

    Links to what is below `inside`, where that is given, stay as they are.
    """

    def changed(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        parts: list[str] = []
        for part in (PurePosixPath(folder) / path).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        if inside and parts[:1] == [inside]:
            return match[0]
        kind = "tree" if (ROOT / Path(*parts)).is_dir() else "blob"
        if PurePosixPath(path).suffix in (".png", ".svg"):
            kind = "raw"
        target = "/".join((base, kind, "main", *parts)) + (f"#{anchor}" if anchor else "")
        return f"{match[1]}{target}{match[3]}"

    return LINK.sub(changed, text)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """mkdocs calls this with the text of each page."""
    folder = PurePosixPath("docs") / PurePosixPath(page.file.src_uri).parent
    return absolute(markdown, str(folder), address(), inside="docs")
