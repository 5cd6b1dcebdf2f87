"""`gradient_error`: how far a conversion moves the gradients of each layer, on a batch.

Copies of the model share its weights' memory and run in its place: one as it was before any
conversion, one converted by each method. A gradient is looked at when the backward pass has made
it, and let go: what stays are the exact ones and one sum over draws.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from packlight._seeds import rounding_left_as_found
from packlight._swap import former
from packlight.conversion import brief
from packlight.convert import DEFAULT_METHODS, convert
from packlight.errors import InputError
from packlight.gradient_error.halves import noise_of
from packlight.gradient_error.passes import DROPOUTS, Key, Loss, Run, Sample
from packlight.gradient_error.sums import deviations_of
from packlight.method import Method
from packlight.report.gradients import Deviation, GradientReport, LayerGradients
from packlight.saving.rest import Given
from packlight.selectors import EVERYTHING, Layer, Methods, Selector, layers_of, text_of


def gradient_error(
    model: nn.Module,
    batch: Any,
    /,
    *methods: Methods,
    loss: Loss | None = None,
    draws: int = 4,
    strict: bool = True,
    functional: bool = True,
    rest: Given = "auto",
    head: bool | Selector = False,
) -> GradientReport:
    """How far conversions move the gradients of each layer on this batch, beside its own noise.

    For each layer and each of `methods` the gradient g~ under the conversion, of the layer's own
    parameters as one vector and of its input, beside the exact gradient g of the same batch:

        error  = sqrt(mean_d |g~_d - g|^2) / |g|           over `draws` draws d of the rounding
        bias^2 = (|sum_d e_d|^2 - sum_d |e_d|^2) / (D (D - 1)) / |g|^2,    e_d = g~_d - g
        cosine = mean_d <g~_d, g> / (|g| sqrt(mean_d |g~_d|^2))

    The second is the mean of <e_c, e_d> over pairs of draws, an unbiased estimate of
    |E[g~] - g|^2. Of n independent elements it tells a bias from none down to about
    error (2 / (D (D - 1) n))^(1/4). It takes two draws.

    **The batch's own noise** is how far g is from its mean over batches of this size,
    sqrt(E|g - E[g]|^2). Rows are taken for independent, with a gradient of variance s^2 each, and
    the loss for a mean over rows. Then g has the variance s^2 / n, and the gradients a and b of the
    first n1 and the other n2 rows differ by

        E|a - b|^2 = s^2 (1 / n1 + 1 / n2) = s^2 n / (n1 n2),
        so   noise^2 = n1 n2 / n^2 |a - b|^2,

    which is |a - b| / 2 for two halves. It is one sample: of many weights a good estimate, of few a
    rough one. Errors of a conversion add to it in squares: 30% of the noise raise the variance of a
    step's gradient by 9%.

    **Gradients of inputs** are those of the loss with respect to a layer's input, from all that
    reads it, so they hold the errors of all layers behind. Of more than 2^20 elements, that many
    are looked at, drawn at random, the same in each pass. A batch has no noise of them.

    **Dropout.** Layers of torch.nn that drop out are off in all passes, since a converted one draws
    other masks than torch's. All other draws are the same in each pass: each starts from the
    present state of the random number generators.

    **Kept**: the gradients of the parameters twice, and up to 2^21 elements an input; copies of the
    buffers. Passes: one exact, two of half the batch, and `draws` for each method.

    The model stays as it is: parameters, buffers, `.grad`, hooks, modes, random numbers, and how it
    is converted. It runs under the caller's autocast. Hooks of its modules run, on copies.

    Args:
        model: in training mode, since packlight's layers are exact in `eval()`.
        batch: what the model is called with: a tensor, a tuple of arguments or a mapping of
            keywords; or a function that is called with the model and gives the loss, whose noise
            is not known. Tensors whose first dimension is as long as that of the first tensor are
            cut in two for the noise, the others stay whole.
        methods: each of what `packlight.convert` takes: several are compared. None: how the model
            is converted now, or `DEFAULT_METHODS`.
        loss: called with the model and the batch, or, if it takes one argument, with the model's
            output, gives a scalar, a mean over rows. None: the model's output, if that is a scalar,
            or the output's `loss`, or its first part.
        draws: passes under each method, with other random numbers for the rounding.
        strict: as for `packlight.convert`.
        functional: as for `packlight.convert`.
        rest: as for `packlight.convert`.
        head: as for `packlight.convert`.

    Raises `InputError` for a model in `eval()`, one without parameters that are trained, a loss
    that is no scalar, not finite, without a gradient, or a sum over rows.

    >>> import torch, packlight
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU())
    >>> batch = torch.randn(32, 64)
    >>> report = packlight.gradient_error(
    ...     model, batch, packlight.GroupQuant(4), loss=lambda m, x: m(x).square().mean()
    ... )
    >>> report.rows[0].weights[0].error < report.rows[0].noise
    True
    """
    _check(model, loss, draws)
    run = Run(model, batch, loss)
    with rounding_left_as_found():
        names, conversions = [], list[nn.Module]()
        if not methods and _is_converted(model):
            names, conversions = ["as converted"], [run.copy()]
        else:
            for choice in methods or (DEFAULT_METHODS,):
                made = run.copy(plain=True)
                convert(made, choice, strict=strict, functional=functional, rest=rest, head=head)
                conversions.append(made)
                names.append(_text(choice))
        layers = _looked_at(model, conversions)
        plain = run.copy(plain=True)
        exact: dict[Key, Sample] = {}
        value = run.gradients(plain, layers, exact.__setitem__)
        if not any(key.of == "weight" for key in exact):
            raise InputError(
                "no parameter that is trained gets a gradient of this loss; a loss calls the model"
                " that it is given, which is a copy: loss=lambda model, batch: model(batch).mean()"
            )
        count, noise = noise_of(run, plain, value)
        deviations = [deviations_of(run, each, layers, exact, draws) for each in conversions]
    rows = _rows(layers, run.numbers, noise, deviations)
    return GradientReport(type(model).__name__, tuple(names), tuple(rows), count, draws)


def _check(model: object, loss: object, draws: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected an nn.Module")
    if not model.training:
        raise InputError("the model is in eval(), where all layers are exact; call model.train()")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("no parameter of the model is trained, so there is no gradient to compare")
    if loss is not None and not callable(loss):
        raise InputError(
            f"loss is a {type(loss).__name__}, which cannot be called; pass a function of model and"
            " batch: loss=lambda model, batch: model(batch).mean()"
        )
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise InputError(f"draws={draws!r} is not a number of passes, 1 or more")


def _is_converted(model: nn.Module) -> bool:
    return any(former(module) is not None for module in model.modules())


def _text(methods: Methods) -> str:
    """What `convert` takes, as one text."""
    if isinstance(methods, Method):
        return brief(methods)
    if isinstance(methods, Mapping):
        choices = {
            key: "None" if choice is None else _text(choice) for key, choice in methods.items()
        }
        if list(choices) == [EVERYTHING]:
            return choices[EVERYTHING]
        return ", ".join(f"{text_of(key)}: {choice}" for key, choice in choices.items())
    return ", ".join(brief(method) for method in methods)


def _looked_at(model: nn.Module, conversions: list[nn.Module]) -> list[Layer]:
    """The layers with parameters of their own, and those without parts that are converted."""
    converted = {
        name
        for made in conversions
        for name, module in made.named_modules()
        if former(module) is not None and not any(True for _ in module.children())
    }
    return [
        layer
        for layer in layers_of(model)
        if any(True for _ in layer.module.parameters(recurse=False))
        or (layer.names[0] in converted and not isinstance(layer.module, DROPOUTS))
    ]


def _rows(
    layers: list[Layer],
    numbers: dict[int, int],
    noise: dict[Key, float] | None,
    deviations: list[dict[Key, Deviation]],
) -> Iterator[LayerGradients]:
    """A row a layer. A parameter counts at the layer that has it first."""
    owners: dict[int, str] = {}
    for layer in layers:
        name = layer.names[0]
        own = list(layer.module.parameters(recurse=False))
        trained = [numbers[id(p)] for p in own if id(p) in numbers]
        first = [number for number in trained if owners.setdefault(number, name) == name]
        keys = [Key("weight", "", number) for number in first]
        keys = [key for key in keys if key in deviations[0]]
        note = ""
        if own and not keys:
            note = (
                "no gradient" if first else "tied to " + owners[trained[0]] if trained else "frozen"
            )
        weights = tuple(_total(found[key] for key in keys) for found in deviations if keys)
        inputs = [_inputs(found, name) for found in deviations]
        known = [each for each in inputs if each is not None]
        if not (own or known):
            continue
        yield LayerGradients(
            name,
            layer.kind.__name__,
            weights,
            _noise_of(keys, noise),
            tuple(known) if len(known) == len(inputs) else (),
            note,
        )


def _noise_of(keys: list[Key], noise: dict[Key, float] | None) -> float | None:
    """None where it is not known: a layer may not be reached by a half of the batch."""
    if noise is None or not keys or any(key not in noise for key in keys):
        return None
    return sum(noise[key] for key in keys)


def _inputs(found: dict[Key, Deviation], layer: str) -> Deviation | None:
    own = [each for key, each in found.items() if (key.of, key.layer) == ("input", layer)]
    return _total(own) if own else None


def _total(deviations: Iterable[Deviation]) -> Deviation:
    return functools.reduce(lambda a, b: a + b, deviations)
