"""What the callbacks of all trainers share: they convert a model, and measure what it keeps."""

from torch import nn

from packlight.conversion import Conversion
from packlight.convert import DEFAULT_METHODS, convert
from packlight.integrations._measure import KeptBytes
from packlight.saving.rest import Given
from packlight.selectors import Methods, Selector


class Converting:
    """A callback's arguments and results; when it does what is its own business."""

    def __init__(
        self,
        methods: Methods = DEFAULT_METHODS,
        *,
        strict: bool = True,
        functional: bool = True,
        rest: Given = "auto",
        head: bool | Selector = False,
        exact_ends: bool = False,
        revert_at_end: bool = False,
        measure: bool = True,
    ) -> None:
        """
        Args:
            methods: as for `packlight.convert`.
            strict: as for `packlight.convert`.
            functional: as for `packlight.convert`.
            rest: as for `packlight.convert`.
            head: as for `packlight.convert`.
            exact_ends: as for `packlight.convert`.
            revert_at_end: whether the model is as it was before when training has ended.
            measure: False for no measurement.

        Attributes:
            conversion: what `packlight.convert` returned; None before.
            kept_bytes: what autograd kept of the pass that was measured last, from its beginning to
                its backward pass, so with the loss wherever it is computed; None before. A pass
                that keeps nothing, without gradients, is none to measure.
        """
        super().__init__()  # the trainer's own class
        self.methods = methods
        self.strict = strict
        self.functional = functional
        self.rest = rest
        self.head = head
        self.exact_ends = exact_ends
        self.revert_at_end = revert_at_end
        self.measure = measure
        self.conversion: Conversion | None = None
        self.kept_bytes: int | None = None
        self._measuring: KeptBytes | None = None

    def _convert(self, model: nn.Module) -> None:
        self.conversion = convert(
            model,
            self.methods,
            strict=self.strict,
            functional=self.functional,
            rest=self.rest,
            head=self.head,
            exact_ends=self.exact_ends,
        )

    def _start_measuring(self, model: nn.Module) -> None:
        self._stop_measuring()
        if self.measure and self.kept_bytes is None:
            self._measuring = KeptBytes(model)
            self._measuring.__enter__()

    def _stop_measuring(self) -> None:
        if self._measuring is not None:
            measured, self._measuring = self._measuring, None
            measured.__exit__()
            self.kept_bytes = measured.bytes or None
