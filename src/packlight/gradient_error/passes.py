"""Passes of copies of a model, whose gradients are handed out one by one."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packlight import graphs
from packlight.batches import call, takes
from packlight.errors import InputError
from packlight.predict import copied_model, restore_all
from packlight.profile.recording import watchable
from packlight.profile.restoring import left_as_found
from packlight.profile.scene import scene_of
from packlight.selectors import Layer

Loss = Callable[..., Tensor]


class Key(NamedTuple):
    """A gradient: of a parameter by its number, or of a layer's input by layer, call and place."""

    of: str  # "weight" or "input"
    layer: str
    place: int


class Sample(NamedTuple):
    """Elements of a gradient, and how many each of them stands for."""

    values: Tensor
    factor: float


Consume = Callable[[Key, Sample], None]


DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class Run:
    """Passes of copies of a model, whose parameters lie in the model's memory."""

    def __init__(self, model: nn.Module, batch: Any, loss: Loss | None) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        # Parameters of our own: nobody's `.grad`, and nobody's hooks.
        trained = [p for p in model.parameters() if p.requires_grad]
        self.parameters = [nn.Parameter(p.detach()) for p in trained]
        self.shared: dict[int, Any] = {id(p): p for p in model.parameters()}
        self.shared |= {id(p): own for p, own in zip(trained, self.parameters, strict=True)}
        self.numbers = {id(p): number for number, p in enumerate(trained)}

    def copy(self, plain: bool = False) -> nn.Module:
        """A copy that drops nothing out; `plain`: as the model was before any conversion."""
        made, _ = copied_model(self.model, self.shared)
        graphs.launched(made)
        for module in made.modules():
            if isinstance(module, DROPOUTS):
                module.eval()
        if plain:
            restore_all(made)
        return made

    def gradients(
        self, model: nn.Module, layers: list[Layer], consume: Consume, batch: Any = None
    ) -> float:
        """Runs a pass of the model, hands out each gradient as soon as it is there; the loss."""
        batch = self.batch if batch is None else batch
        scene = scene_of(model, self.loss, (batch,), {})
        with (
            left_as_found(scene),
            torch.inference_mode(False),
            torch.enable_grad(),
            self._watched(model, layers, consume),
        ):
            value = _loss_of(model, batch, self.loss)
            # No other leaf gets a gradient.
            torch.autograd.backward(value, inputs=self.parameters)
            return float(value.detach())

    @contextmanager
    def _watched(self, model: nn.Module, layers: list[Layer], consume: Consume) -> Iterator[None]:
        """Hooks on all parameters, and on what enters these layers."""

        def parameter_hook(number: int, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                consume(Key("weight", "", number), _dense(gradient))

        calls: dict[str, int] = {}

        def layer_hook(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if type(value) is Tensor and value.requires_grad and torch.is_grad_enabled():
                    place = calls[name] = calls.get(name, -1) + 1
                    key = Key("input", name, place)
                    value.register_hook(lambda g, key=key: consume(key, _sample(g)))

        modules = dict(model.named_modules())
        watched = set(watchable(modules.values()))
        with ExitStack() as handles:
            for number, parameter in enumerate(self.parameters):
                hook = functools.partial(parameter_hook, number)
                handle = parameter.register_post_accumulate_grad_hook(hook)
                handles.callback(handle.remove)
            for name in (layer.names[0] for layer in layers):
                if modules[name] in watched:
                    hook = functools.partial(layer_hook, name)
                    handle = modules[name].register_forward_pre_hook(hook, with_kwargs=True)
                    handles.callback(handle.remove)
            yield


def _loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    if loss is None:
        value = _output(model, batch)
    elif takes(loss, model, batch):
        value = loss(model, batch)
    else:
        value = loss(call(model, batch))
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise InputError(
            f"a loss is a tensor of one element, and here it is {what}; pass a function of model"
            " and batch: loss=lambda model, batch: model(batch).mean()"
        )
    if not value.requires_grad:
        raise InputError("the loss has no gradient: nothing that is trained led to it")
    if not torch.isfinite(value.detach()).all():
        raise InputError(f"the loss is {float(value.detach())}, which has no gradient to compare")
    return value


def _output(model: nn.Module, batch: Any) -> Any:
    """The loss that the model itself, or the batch, returns; any other output as it is."""
    is_loss = callable(batch) and not isinstance(batch, Tensor | Mapping)
    output = batch(model) if is_loss else call(model, batch)
    if isinstance(output, Mapping):
        return output.get("loss", output)
    if isinstance(output, tuple | list) and output:
        return output[0]
    return getattr(output, "loss", output)


# Elements of an input's gradient that are looked at.
_SAMPLED = 1 << 20


def _dense(gradient: Tensor) -> Sample:
    gradient = gradient.detach()
    return Sample(gradient if gradient.layout is torch.strided else gradient.to_dense(), 1.0)


def _sample(gradient: Tensor) -> Sample:
    """All elements, or so many at random, the same of each gradient of this size."""
    flat = gradient.detach().reshape(-1)
    count = flat.numel()
    if count <= _SAMPLED:
        return Sample(flat.clone(), 1.0)
    generator = torch.Generator("cpu").manual_seed(count)
    places = torch.randint(count, (_SAMPLED,), generator=generator, device="cpu").to(flat.device)
    return Sample(flat[places], count / _SAMPLED)
