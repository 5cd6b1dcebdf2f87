"""Activations of timm, each of which is one of torch's."""

from timm import layers

from packlight.integrations._activations import register

register({layers.GELU: "gelu", layers.GELUTanh: "gelu_tanh", layers.QuickGELU: "quick_gelu"})
