"""The CUDA allocator: what the forward pass adds, and the peak of the backward pass."""

import gc

import torch
from torch import Tensor

from packlight.profile.scene import Scene
from packlight.profile.tensors import tensors_in


class AllocatorMeter:
    """Reads the CUDA allocator of the devices in use; None for all readings where there is none."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.devices = devices
        if devices:
            gc.collect()  # what dies during the pass would hide as much that is kept
        self.before = [torch.cuda.memory_allocated(device) for device in devices]
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)

    def grown(self) -> int | None:
        now = [torch.cuda.memory_allocated(device) for device in self.devices]
        return sum(now) - sum(self.before) if self.devices else None

    def peak(self) -> int | None:
        highest = [torch.cuda.max_memory_allocated(device) for device in self.devices]
        return sum(highest) - sum(self.before) if self.devices else None


def backward_targets(value: object) -> list[Tensor]:
    """Where the backward pass starts: the loss, or each output that has a gradient."""
    return [
        tensor
        for tensor in tensors_in(value)
        if tensor.requires_grad and tensor.is_floating_point() and tensor.grad_fn is not None
    ]


def measured_peak(
    meter: AllocatorMeter, targets: list[Tensor], scene: Scene, reentrant: bool
) -> int | None:
    """The allocator's peak after a backward pass that touches no `.grad`."""
    if not meter.devices or reentrant:
        return None
    leaves = [
        tensor
        for tensor in (*scene.parameters, *scene.arguments)
        if tensor.requires_grad and tensor.is_leaf
    ]
    sums = [target.sum() for target in targets]
    targets.clear()
    if sums and leaves:
        try:
            torch.autograd.grad(
                sums, list({id(leaf): leaf for leaf in leaves}.values()), allow_unused=True
            )
        except torch.OutOfMemoryError:
            return None
    return meter.peak()
