"""Lets torchvision's wheel be imported beside a CPU build of torch, in the development environment.

The wheel is built for CUDA: beside a CPU build its library does not load, and its import fails for
want of two operators, which nothing here calls. Then transformers cannot be imported either. `make`
copies this file into the environment, with a .pth file that imports it: it waits for the first
import of torchvision, and declares the schemas before it where the library does not load.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path

kept_alive = []


class Declaring(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            declare(Path(spec.origin).with_name("_C.so"))
        return spec


def declare(library: Path) -> None:
    import torch

    try:
        torch.ops.load_library(library)
    except OSError:
        schemas = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        kept_alive.append(schemas)


sys.meta_path.insert(0, Declaring())
