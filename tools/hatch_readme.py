"""A hook of hatchling: the README as an index shows it, its relative links as addresses."""

import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

sys.path.insert(0, str(Path(__file__).parent))
from site_links import ROOT, absolute, address


class Readme(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        text = absolute(text, "", address())
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
