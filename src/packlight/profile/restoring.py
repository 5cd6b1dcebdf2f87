"""Leaving everything as it was: generators, buffers, attributes of modules and `.grad`."""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from packlight._torch.attributes import buffers, plain_attributes, version
from packlight.profile.scene import Scene
from packlight.profile.tensors import has_values


@contextmanager
def left_as_found(scene: Scene) -> Iterator[None]:
    """Restore generators, buffers, attributes of modules and `.grad`, also after an exception."""
    leaves = [*scene.parameters, *(tensor for tensor in scene.arguments if tensor.is_leaf)]
    grads = [(leaf, leaf.grad) for leaf in leaves]
    modules = [_ModuleState(module) for module in scene.modules()]
    torch.clear_autocast_cache()
    with _generators(scene.devices()):
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            for state in modules:
                state.restore()
            for leaf, grad in grads:
                if leaf.grad is not grad:
                    leaf.grad = grad


@contextmanager
def _generators(devices: list[torch.device]) -> Iterator[None]:
    kinds = {device.type for device in devices} - {"cpu"}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            indices = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


class _ModuleState:
    """A module's buffers and plain attributes, to be put back.

    Attributes go with the buffers: a module that grows a cached buffer notes its size beside it.
    Parameters stay out: FSDP swaps them during the forward pass and needs them as it leaves them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = plain_attributes(module)
        self.buffers = dict(buffers(module))
        self.contents = {
            name: (version(buffer), buffer.detach().clone())
            for name, buffer in self.buffers.items()
            if buffer is not None and has_values(buffer)
        }

    def restore(self) -> None:
        present = vars(self.module)
        for name in plain_attributes(self.module).keys() - self.attributes.keys():
            del present[name]
        for name, value in self.attributes.items():
            if name not in present or present[name] is not value:
                present[name] = value
        registry = buffers(self.module)
        if not _same_entries(registry, self.buffers):
            registry.clear()
            registry.update(self.buffers)
        for name, (written, content) in self.contents.items():
            buffer = self.buffers[name]
            assert buffer is not None
            # Untouched buffers are not written: a graph of the caller's may have saved them.
            if version(buffer) != written or not torch.equal(buffer, content):
                with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(content)


def _same_entries(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """The same names with the very same objects, in the same order."""
    return [(k, id(v)) for k, v in one.items()] == [(k, id(v)) for k, v in other.items()]
