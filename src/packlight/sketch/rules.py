"""What `Sketch` makes of modules."""

from torch import nn

from packlight.errors import CannotConvertError, InputError
from packlight.layers.casts import CASTS
from packlight.method import Swap, call_rule, rule
from packlight.sketch import modules
from packlight.sketch.functional import check_pointwise
from packlight.sketch.method import Sketch


@rule(Sketch, nn.Linear)
def _linear(method: Sketch, module: nn.Linear) -> Swap:
    return Swap(modules.Linear, {"method": method})


@rule(Sketch, nn.Conv1d, nn.Conv2d)
def _convolution(method: Sketch, module: nn.Conv1d | nn.Conv2d) -> Swap:
    name = type(module).__name__
    try:
        check_pointwise(module.kernel_size, module.stride, module.padding, module.groups, name)
    except InputError as error:
        raise CannotConvertError(str(error)) from error
    return Swap(getattr(modules, name), {"method": method})


call_rule(Sketch, CASTS)
