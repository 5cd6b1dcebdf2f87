"""Layers, each once, for any method that keeps what they need.

Functions have torch.nn.functional's names and arguments, and `method`.
"""
