"""A callback for the `Trainer` of lightning."""

from lightning import Callback

from packlight.integrations._lightning import ConvertingFit


class PacklightCallback(ConvertingFit, Callback):
    __doc__ = ConvertingFit.__doc__
