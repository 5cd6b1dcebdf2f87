"""A callback for the `Trainer` of lightning."""

from lightning import Callback

from packlight.integrations._lightning import Converting


class PacklightCallback(Converting, Callback):
    __doc__ = Converting.__doc__
