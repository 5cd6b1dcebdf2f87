"""Rebuilds the shipped codebooks: every function of `activations.CONTINUOUS`, 1 to 8 bits.

    python tools/build_codebooks.py            writes src/packlight/fewbit/codebook/codebooks.json
    python tools/build_codebooks.py --check    exits 1, naming what differs, if the file is stale

Run it after a change to `codebook.defaults.DEFAULT_RULE`, to the table of activations, or to the
solver.
"""

import argparse
import json
import sys
from pathlib import Path

from packlight.fewbit.activations import CONTINUOUS
from packlight.fewbit.codebook import solve_default

FILE = Path(__file__).parents[1] / "src/packlight/fewbit/codebook/codebooks.json"
BITS = range(1, 9)


def build(name: str, bits: int) -> str:
    """The file's line for one codebook."""
    parameters = tuple(CONTINUOUS[name].parameters.values())
    return json.dumps(solve_default(name, bits, parameters).to_dict(), allow_nan=False)


def build_file() -> str:
    """A JSON object from name to list of codebooks, one codebook per line so that diffs read."""
    functions = []
    for name in sorted(CONTINUOUS):
        books = ",\n".join(build(name, bits) for bits in BITS)
        functions.append(f"{json.dumps(name)}: [\n{books}\n]")
    return "{\n" + ",\n".join(functions) + "\n}\n"


def differences(stored: str, built: str) -> list[str]:
    """The (name, bits) of codebooks that are not the same in both texts."""

    def books(text: str) -> dict[tuple[str, int], object]:
        functions = json.loads(text) if text else {}
        return {(name, book["bits"]): book for name in functions for book in functions[name]}

    old, new = books(stored), books(built)
    return [
        f"{name}, {bits} bits: " + ("differs" if key in old and key in new else "on one side only")
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        for name, bits in [key]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check

    built = build_file()
    if not check:
        FILE.write_text(built, encoding="utf-8")
        return 0
    stored = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    if stored == built:
        return 0
    lines = differences(stored, built) or ["the same codebooks, laid out differently"]
    print(f"{FILE.name} is stale; run: python tools/build_codebooks.py", *lines, sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main())
