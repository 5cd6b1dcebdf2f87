"""What other packages need of packlight: rules for their layers, callbacks for their trainers."""

import importlib
import pkgutil
import sys


def load() -> None:
    """Imports what there is for those packages that the program itself has imported."""
    for package in pkgutil.iter_modules(__path__):
        if sys.modules.get(package.name) is not None:  # None where an import of it is barred
            importlib.import_module(f"{__name__}.{package.name}")
