"""Recurrent layers that run once more, in the backward pass, on a pack of the sequence they read.

torch's kernels keep gates and states of every step, several times what they read: eight numbers a
state for an LSTM, in a workspace that nobody can pack.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from packlight import _torch
from packlight._checks import is_plain, is_taken, needs_gradient
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.modules import Quantised
from packlight.layers.replayed import replayed
from packlight.layers.twin import Twin
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser, worth_packing

_Input: TypeAlias = Tensor | PackedSequence
_State: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Recurrent(Quantised):
    """Keeps a pack of its input and runs once more; the gradient is that of the packed input.

    Weights are kept as they are. It is torch's own layer in a compiled region, and with dropout
    between its layers: what cuDNN and the CPU draw cannot be drawn again.
    """

    dropout: float
    num_layers: int

    @staticmethod
    def suited(method: GroupQuant) -> GroupQuant:
        return method.for_attention()

    def training_forward(
        self, input: _Input, hx: _State | None = None
    ) -> tuple[_Input, _State | None]:
        x = input.data if isinstance(input, PackedSequence) else input
        states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        weights = None if _torch.is_traced() else _torch.flat_weights(self)
        if weights is None or not self._replays(x, (*states, *weights)):
            found: tuple[_Input, _State | None] = super(Twin, self).forward(input, hx)
            return found
        operands, with_weights = (x, *states, *weights), _torch.apart(self)
        # What `call` refers to lives as long as the graph: no input, and no state.
        lengths = input[1:] if isinstance(input, PackedSequence) else None
        several, count = isinstance(hx, tuple), len(states)

        def call(*found: Tensor) -> tuple[Tensor, ...]:
            x, *rest = found
            given = x if lengths is None else PackedSequence(x, *lengths)
            own = rest[:count]
            state: Any = tuple(own) if several else own[0] if own else None
            plain: Any = with_weights(rest[count:])
            y, last = super(Twin, plain).forward(given, state)
            y = y.data if isinstance(y, PackedSequence) else y
            return y, *(last if isinstance(last, tuple) else (last,))

        kept_whole = range(1, len(operands))
        y, *last = replayed(call, operands, self.method, biases=kept_whole)
        result = PackedSequence(y, *input[1:]) if isinstance(input, PackedSequence) else y
        return result, tuple(last) if len(last) > 1 else last[0]

    def _replays(self, x: Tensor, others: Sequence[Any]) -> bool:
        """Whether the layer is to run once more; torch's own raises where it cannot run at all."""
        tensors: tuple[Any, ...] = (x, *others)
        return (
            all(isinstance(each, Tensor) and is_plain(each) for each in tensors)
            and is_taken(x)
            and any(map(needs_gradient, tensors))
            and worth_packing(x, self.method)
            and not (self.dropout > 0 and self.num_layers > 1)
        )


class RNN(Recurrent, nn.RNN):
    """`torch.nn.RNN`; keeps a pack of its input."""


class LSTM(Recurrent, nn.LSTM):
    """`torch.nn.LSTM`; keeps a pack of its input."""


class GRU(Recurrent, nn.GRU):
    """`torch.nn.GRU`; keeps a pack of its input."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.LSTM: LSTM, nn.GRU: GRU}


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _swap if issubclass(method, Quantiser) and kind in _KINDS else None


def _swap(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(_KINDS[type(module)], {"method": method.for_attention()})
