"""Adapters of PEFT, known by their code.

`packlight.convert` imports this where the program has imported peft. docs/integrations.md says what
each class becomes.
"""

import warnings

import peft

_OLDEST = (0, 17)

if tuple(int(part) for part in peft.__version__.split(".")[:2]) >= _OLDEST:
    # Each registers its rules.
    from packlight.integrations.peft import adalora, adapters, made, scaled  # noqa: F401
else:
    warnings.warn(
        f"packlight has rules for adapters of peft from version {'.'.join(map(str, _OLDEST))}, and"
        f" this is {peft.__version__}: each adapter keeps a pack of its own",
        stacklevel=2,
    )
