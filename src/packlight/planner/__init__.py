"""The planner: what a training step takes of a device, and which methods make it fit."""
