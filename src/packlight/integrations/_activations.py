"""Activation modules of other packages: what each becomes under a method, by what it computes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from packlight._classes import joined
from packlight.fewbit import functional as few_bit
from packlight.fewbit.method import FewBit
from packlight.fewbit.modules import Coded
from packlight.fewbit.rules import check_codebook_is_of
from packlight.groupquant.modules import Quantised
from packlight.inverted import functional as inverted
from packlight.inverted.inverses import INVERSES
from packlight.inverted.method import Inverted
from packlight.layers.activations import activation
from packlight.layers.twin import Twin
from packlight.method import NotConverted, Swap, rule
from packlight.quantiser import Quantiser


class GroupQuantActivation(Quantised):
    """An activation that keeps a pack of its input; see `packlight.groupquant.functional`."""

    packed_function: str

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(input)
            return plain
        return activation(input, self.packed_function, self.method)


class FewBitActivation(Coded):
    """An activation that keeps codes of its derivative; see `packlight.fewbit.functional`."""

    packed_function: str

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(input)
            return plain
        return few_bit._continuous(input, self.packed_function, self.bits, self.codebook)


class InvertedActivation(Twin):
    """An activation that keeps its output and 1 bit; see `packlight.inverted.functional`."""

    packed_function: str

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(input)
            return plain
        return inverted._inverted(input, self.packed_function)


def register(functions: Mapping[type[nn.Module], str]) -> None:
    """Registers rules for activation modules, with the names of what they compute."""

    @rule(Quantiser, *functions)
    def quantised_activation(method: Quantiser, module: Any) -> Swap:
        kind = type(module)
        attributes = {"method": method, "packed_function": functions[kind]}
        return Swap(joined(GroupQuantActivation, kind), attributes)

    @rule(FewBit, *functions)
    def coded_activation(method: FewBit, module: Any) -> Swap:
        check_codebook_is_of(method, module)
        kind = type(module)
        attributes = {**method.options, "packed_function": functions[kind]}
        return Swap(joined(FewBitActivation, kind), attributes)

    @rule(Inverted, *functions)
    def inverted_activation(method: Inverted, module: Any) -> Swap:
        kind = type(module)
        function = functions[kind]
        if function not in INVERSES:
            raise NotConverted(f"{function} has no inverse here; FewBit and GroupQuant take it")
        return Swap(joined(InvertedActivation, kind), {"packed_function": function})
