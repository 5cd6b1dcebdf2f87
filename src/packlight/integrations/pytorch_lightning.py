"""A callback for the `Trainer` of pytorch_lightning."""

from pytorch_lightning import Callback

from packlight.integrations._lightning import ConvertingFit


class PacklightCallback(ConvertingFit, Callback):
    __doc__ = ConvertingFit.__doc__
