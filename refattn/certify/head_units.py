"""One head of attention as the error units see it: what it reads and what it computes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.certify.majorant import Array, Known
from refattn.certify.softmax_units import Rows


class Head(NamedTuple):
    """What one head reads: Q, K, V with their errors, and its cells."""

    Q: Known
    K: Known
    V: Known
    allowed: NDArray[np.bool_]
    added: Known | None
    """ALiBi and bias, (n_q, n_k)."""
    factor: Array
    """keep / keep_probability, (n_q, n_k)."""
    scale: float
    softcap: float | None
    bias_first: bool
    sink: float | None
    fill: bool
    """Empty rows are uniform."""
    group: int = 1
    """How many query heads share the keys and values."""


class Forward(NamedTuple):
    """What one head computes, and what its backward pass reads again."""

    output: Known
    rows: Rows
    empty: NDArray[np.bool_]
    slope: Known
    """Derivative of the softcap, (n_q, n_k)."""
