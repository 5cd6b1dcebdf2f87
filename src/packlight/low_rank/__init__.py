"""Products with a factor of a low rank, as adapters have: memory of the wide side is all they cost.

cuBLAS takes operands of one dtype, so a wide tensor of 16 bits is cast for a factor of 32, and what
comes out of the factor is written in 32, scaled, read and added. Here the wide side is read, or
read and written, once, in its own dtype.
"""
