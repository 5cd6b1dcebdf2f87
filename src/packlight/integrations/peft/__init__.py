"""Adapters of PEFT, known by their code.

`packlight.convert` imports this where the program has imported peft. docs/integrations.md says what
each class becomes.
"""

from packlight.integrations.peft import (  # noqa: F401  each registers its rules
    adalora,
    adapters,
    made,
    scaled,
)
