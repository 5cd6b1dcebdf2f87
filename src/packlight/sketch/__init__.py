"""Sketches: linear layers keep a random projection of their input; the weight gradient stays
unbiased.
"""

from packlight.sketch.choosing import ChosenLayer, ChosenRows, choose
from packlight.sketch.functional import conv1d, conv2d, linear
from packlight.sketch.method import Sketch
from packlight.sketch.modules import Conv1d, Conv2d, Linear
from packlight.sketch.monitor import VarianceMonitor, VarianceSample
from packlight.sketch.variances import correlation, ratio_bound, sample_variance, variance

__all__ = [
    "ChosenLayer",
    "ChosenRows",
    "Conv1d",
    "Conv2d",
    "Linear",
    "Sketch",
    "VarianceMonitor",
    "VarianceSample",
    "choose",
    "conv1d",
    "conv2d",
    "correlation",
    "linear",
    "ratio_bound",
    "sample_variance",
    "variance",
]
