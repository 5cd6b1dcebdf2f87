"""Recomputation: blocks, and MLPs by tiles of tokens, keep their input and run again."""

from packlight.recompute.functional import checkpoint
from packlight.recompute.method import Checkpoint, Offload, Tiles

__all__ = ["Checkpoint", "Offload", "Tiles", "checkpoint"]
