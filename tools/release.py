"""What would be published: built, checked, installed into an empty environment, and tried there.

    make release                       # or: python tools/release.py
    python tools/release.py --full     # the examples of other packages too

Makes dist/*.whl and dist/*.tar.gz, and stops at the first thing that is wrong. Uploads nothing:
that is `twine upload dist/*`, by a person, once the address in pyproject.toml is the project's.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"

# Examples that a bare install runs, and what the others need.
ALONE = ("diffusion", "own_method")
OTHERS = {
    "accelerated": ("accelerate", "transformers"),
    "dpo": ("trl", "peft"),
    "full": ("transformers",),
    "lightning_vit": ("lightning", "timm"),
    "long_context": ("transformers", "peft"),
    "lora": ("transformers", "peft"),
    "qlora": ("transformers", "peft", "bitsandbytes"),
    "resnet": ("torchvision",),
    "sft": ("trl", "peft"),
    "vit": ("timm",),
}
# As packages name them in `License-Expression`, `License` or a classifier.
PERMISSIVE = re.compile(
    r"Apache|BSD|MIT\b|ISC|PSF|Python Software Foundation|MPL-2|Mozilla Public|Unlicense|Zlib|"
    r"Historical Permission|HPND|0BSD|CC0",
    re.IGNORECASE,
)
# CUDA's libraries, which torch brings, have NVIDIA's own terms.
OF_NVIDIA = re.compile(r"nvidia-|cuda-")

LIST_LICENCES = """
import importlib.metadata, json
found = {}
for each in importlib.metadata.distributions():
    data = each.metadata
    kinds = [kind for kind in data.get_all("Classifier") or [] if kind.startswith("License")]
    found[data["Name"]] = " ".join([data.get("License-Expression") or "", *kinds,
                                    (data.get("License") or "")[:200]])
print(json.dumps(found))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a command, says so, and gives what it printed; a failure ends the release."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\nfailed: {' '.join(words)}")
    return done.stdout


def environment(folder: Path) -> Path:
    """An empty environment with a recent pip; gives its Python."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25.1")
    return python


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built of it."""
    shutil.rmtree(DIST, ignore_errors=True)
    python = environment(folder / "build")
    run(python, "-m", "pip", "install", "--quiet", "build", "twine")
    run(python, "-m", "build", "--outdir", DIST)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    print(run(python, "-m", "twine", "check", "--strict", sdist, wheel))
    return sdist, wheel


def check_wheel(wheel: Path) -> None:
    """What an index shows: every link of the README is an address; and there is nothing private."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = [each for each in files.namelist() if each.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(files.read(name).decode())
        outside = [each for each in files.namelist() if not each.startswith("packlight")]
    relative = re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata.get_payload())
    if relative or "# packlight" not in metadata.get_payload():
        raise SystemExit(f"the README of the wheel is missing or has relative links: {relative}")
    if outside:
        raise SystemExit(f"the wheel has files outside of the package: {outside}")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if f"## {metadata['Version']}" not in changelog:
        raise SystemExit(f"CHANGELOG.md has no heading for {metadata['Version']}")
    print(f"{wheel.name}: version {metadata['Version']}, links are addresses")


def check_licences(python: Path) -> None:
    """Of all that an install brings along."""
    found = json.loads(run(python, "-c", LIST_LICENCES))
    unknown = {
        name: text[:80]
        for name, text in found.items()
        if not PERMISSIVE.search(text) and not OF_NVIDIA.match(name)
    }
    if unknown:
        raise SystemExit(f"licences to look at: {unknown}")
    print(f"licences of {len(found)} packages are permissive, CUDA's apart")


def try_out(python: Path, sdist: Path, folder: Path, full: bool) -> None:
    """The installed wheel on its own: doctor, tests of packaging, examples."""
    print(run(python, "-m", "packlight", "doctor", "--device", "cpu", cwd=folder))
    with tarfile.open(sdist) as files:
        files.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    run(python, "-m", "pip", "install", "--quiet", "--group", f"{source}/pyproject.toml:test")
    tests = ("test_packaging", "test_public_api", "test_readme")
    print(run(python, "-m", "pytest", "-q", *(f"tests/{name}.py" for name in tests), cwd=source))
    if full:
        packages = sorted({package for needed in OTHERS.values() for package in needed})
        run(python, "-m", "pip", "install", "--quiet", *packages)
    for name in (*ALONE, *(OTHERS if full else ())):
        run(python, source / "examples" / f"{name}.py", "--tiny", cwd=folder)
        print(f"examples/{name}.py ran")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also examples of other packages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        check_wheel(wheel)
        python = environment(folder / "empty")
        run(python, "-m", "pip", "install", "--quiet", wheel)
        check_licences(python)
        try_out(python, sdist, folder, options.full)
    print(f"ready: {sdist.name}, {wheel.name}")


if __name__ == "__main__":
    main()
