"""Layers, whatever the method by which they keep."""
