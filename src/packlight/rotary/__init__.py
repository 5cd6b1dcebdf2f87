"""Rotary position embedding of queries and keys: one kernel each way, in place of a dozen.

With x1 and x2 the halves of a head's numbers, y1 = x1 cos1 - x2 sin1 and y2 = x2 cos2 + x1 sin2
(Su et al., 2021, arXiv 2104.09864, with the halves that transformers rotates). Products are
rounded to the tensors' dtype before they are added, as by the operations of torch. Exact; keeps
cos and sin.
"""

from packlight.rotary.functional import rotate

__all__ = ["rotate"]
