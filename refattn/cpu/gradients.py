"""Where the gradients of one attention go: addresses and sizes, as plain numbers."""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from refattn.cpu.plan import Tensor, tensor_at


class Gradients(NamedTuple):
    """What the backward kernel reads beside the plan, and what it writes."""

    d_output: Tensor
    d_logsumexp: int
    """Address of (b, h, n_q) numbers, or 0."""
    dots: int
    """Address of D = Σ dO ∘ O - dL, (b, h, n_q)."""
    d_query: int
    """Address of (splits, b, h, n_q, d_k): one summand a range of keys."""
    d_key: int
    """Address of (b, h_k, n_k, d_k), both last sizes rounded up."""
    d_value: int
    d_bias: int
    """Address of (b, h, n_q, n_k), or 0."""
    d_slopes: int
    """Address of (splits, b, h)."""
    splits: int
    """Ranges of keys a head."""
    keys: int
    """Keys a range, a multiple of `products.ROW_STEP`."""


@njit(error_model="numpy")
def read_gradients(i):
    """Return the gradients of `flatten(gradients)`."""
    return Gradients(
        tensor_at(i, 0), i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13]
    )  # fmt: skip
