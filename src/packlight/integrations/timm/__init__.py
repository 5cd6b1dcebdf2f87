"""Layers of timm; `packlight.convert` imports this where the program has imported timm.

| class | becomes, under |
| --- | --- |
| GELU, GELUTanh, QuickGELU | the activation: `FewBit`, `GroupQuant`, `Inverted` |
| BatchNormAct2d | the batch norm, before its dropout and activation: `FixedPoint`, `GroupQuant` |
| LayerNorm | the layer norm: `GroupQuant`, `Inverted` |
| LayerNorm2d | the layer norm over channels: `GroupQuant` |
| RmsNorm | the RMS norm: `GroupQuant`, `Inverted` |
| Mlp | W_2 f(W_1 x) as one function, where its parts are `GroupQuant`'s and no dropout is on |
| Attention | query, key and value stay one tensor, where its calls are covered |
| Block of vision transformers | two functions, where its parts may be and its calls are covered |

The dropout and the activation of BatchNormAct2d are modules of their own and converted as such.
What timm builds of torch.nn has torch's rules; its attention calls
`F.scaled_dot_product_attention`, which `convert` covers; with `functional=False` it keeps what
torch keeps. All other classes of its own are left alone.
"""

# Each registers its rules.
from packlight.integrations.timm import (  # noqa: F401
    activations,
    attention,
    blocks,
    mlp,
    norms,
    residual,
)
