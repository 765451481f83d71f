"""What kernels are told: records of arrays and numbers.

Every array is contiguous, its leading axes (batch, head). A mask and a bias keep their axes of size
1, so that nothing is repeated in memory. A kernel writes into its first record alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Results(NamedTuple):
    """What a forward pass writes."""

    output: Any
    """O, (b, h, n_q, d_v)."""
    logsumexp: Any
    """L, (b, h, n_q), nats."""


class Operands(NamedTuple):
    """What both passes read."""

    query: Any
    """Q, (b, h, n_q, d_k)."""
    key: Any
    """K, (b, h_k, n_k, d_k)."""
    value: Any
    """V, (b, h_k, n_k, d_v)."""


class Band(NamedTuple):
    """Which keys a query sees by its place alone."""

    offsets: Any
    """Position of query row 0, tokens, (b,) int64."""
    query_lengths: Any
    """(b,) int64."""
    key_lengths: Any
    """(b,) int64."""
    left: Any
    """Keys behind a query's position that it sees, int64; `rules.UNBOUNDED` for all."""
    right: Any
    """Keys ahead, likewise; causal is 0."""
    tiled_heads: Any
    """1 if query head h reads key-value head h mod h_k, 0 if ⌊h / g⌋, int64."""


class Terms(NamedTuple):
    """What makes a logit of a product, and the rest that joins the softmax; by cell or by head."""

    mask: Any
    """(b or 1, h or 1, n_q or 1, n_k or 1) bool, True = attend; of size 0 where there is none."""
    bias: Any
    """Likewise, logits; a cell of -∞ is forbidden."""
    keep: Any
    """Likewise, bool: dropout's keep mask."""
    slopes: Any
    """ALiBi's m, (h,); of size 0 where there is none, and so are the sinks."""
    sinks: Any
    """(h,), logits that join the denominator only."""
    distance: Any
    """Form of ALiBi's distance, int64."""
    softcap_order: Any
    """`rules.NO_SOFTCAP`, `BEFORE_BIAS` or `AFTER_BIAS`, int64."""
    softcap: Any
    """c, logits."""
    scale: Any
    """Factor on a product."""
    kept: Any
    """1 / keep_probability, what a kept weight is multiplied by."""


class Saved(NamedTuple):
    """What the backward pass reads beside the operands."""

    d_output: Any
    """dO, (b, h, n_q, d_v)."""
    logsumexp: Any
    """L, (b, h, n_q)."""
    dots: Any
    """D - dL, (b, h, n_q)."""


class Dots(NamedTuple):
    """What the first step of the backward pass writes: D - dL, (b, h, n_q)."""

    dots: Any


class Rows(NamedTuple):
    """What it reads: by row of the queries, and the gradient of L by row."""

    d_output: Any
    output: Any
    d_logsumexp: Any


class QueryGradients(NamedTuple):
    """What the kernel by tiles of queries writes."""

    d_query: Any
    """(b, h, n_q, d_k)."""
    d_bias: Any
    """(b, h, n_q, n_k), zeros before; of size 0 where there is no bias."""
    d_slopes: Any
    """(b, h, n_q), one summand a row; of size 0 where there are no slopes."""


class KeyGradients(NamedTuple):
    """What the kernel by tiles of keys writes."""

    d_key: Any
    """(b, h_k, n_k, d_k)."""
    d_value: Any
    """(b, h_k, n_k, d_v)."""
