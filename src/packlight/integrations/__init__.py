"""What other packages need of packlight: rules for their layers, callbacks for their trainers."""

import importlib
import pkgutil
import sys

# Adapters alone: what a program does not ask for is not imported with these.
_WITHOUT_RULES = {"accelerate", "axolotl", "megatron", "trl"}


def load() -> None:
    """Imports the rules for those packages that the program itself has imported."""
    for package in pkgutil.iter_modules(__path__):
        if package.name in _WITHOUT_RULES or sys.modules.get(package.name) is None:
            continue  # None also where an import of it is barred
        importlib.import_module(f"{__name__}.{package.name}")
