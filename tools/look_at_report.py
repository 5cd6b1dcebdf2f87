"""Open a report's page in a real browser: pictures to look at, and clicks that must do their part.

    packlight profile hf:llama --method default --html report.html
    python tools/look_at_report.py report.html --out pictures

Needs Chromium (`apt-get install chromium`). Writes pictures in light and dark, zoomed in and in a
narrow window, and fails where a click, a key or the filter does not do what it should
(`look_at_report.js`, which runs in a copy of the page).
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKS = Path(__file__).with_suffix(".js")

# Width, height, the place to look at, and whether light is preferred.
PICTURES = {
    "light": (1300, 1200, "", 1),
    "dark": (1300, 1200, "", 0),
    "zoomed": (1300, 1200, "zoomed", 1),
    "narrow": (420, 1400, "", 1),
}


def chromium(*arguments: str) -> str:
    command = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if command is None:
        sys.exit("chromium is not there; apt-get install chromium")
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    answer = subprocess.run([command, *fixed, *arguments], capture_output=True, text=True)
    if answer.returncode:
        sys.exit(answer.stderr)
    return answer.stdout


def check(page: Path) -> list[str]:
    """What the checks found, a line each."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checked.html"
        script = f"<script>{CHECKS.read_text(encoding='utf-8')}</script></body>"
        text = page.read_text(encoding="utf-8").replace("</body>", script)
        copy.write_text(text, encoding="utf-8")
        # Time runs as fast as the page allows, and stops after so many milliseconds.
        fast = "--virtual-time-budget=20000"
        shown = chromium(fast, "--window-size=420,900", "--dump-dom", copy.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)
    if found is None:
        title = re.search(r"<title>(.*?)</title>", shown)
        sys.exit(f"the checks did not end: {title and title[1]}")
    return html.unescape(found[1]).splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="for the pictures")
    parser.add_argument("--zoom", default="", metavar="PATH", help="module of the zoomed picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, (width, height, zoom, colours) in PICTURES.items():
        path = arguments.out / f"{name}.png"
        place = f"#{arguments.zoom}" if zoom else ""
        chromium(
            f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={colours}",
            f"--screenshot={path}",
            arguments.page.resolve().as_uri() + place,
        )
        print(f"{path} written")
    found = check(arguments.page)
    print("\n".join(found))
    if any(line.startswith("WRONG") for line in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
