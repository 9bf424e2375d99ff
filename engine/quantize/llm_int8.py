"""LLM.int8(): int8 by row and column, except where an activation is an outlier.

Source: Dettmers et al. 2022, LLM.int8(), section 3.2 ("mixed-precision decomposition"): features
whose magnitude reaches a threshold, 6.0 in the paper, are multiplied in floating point, everything
else in int8 with one scale a row of activations and one a row of weights (section 3.1). The
decomposition is the matmul's (`kernels.ops.pack_int8`'s `outlier_threshold`); it looks at each row
of activations alone, so that what a token becomes does not depend on its batch.
"""

OUTLIER_THRESHOLD = 6.0
