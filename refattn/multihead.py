"""Multi-head attention: projections to heads, attention in each, concatenation, one projection.

Queries come from one sequence and keys and values from another, or from the same one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, narrow, widen
from refattn.attention import attention
from refattn.checks import check_floats, check_shapes, given
from refattn.options import AttentionOptions
from refattn.projections import merge_heads, pack_output


class Projected(NamedTuple):
    """Queries, keys and values of every head."""

    Q: Array
    K: Array
    V: Array


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def multihead_attention(
    query_input: Array,
    source_input: Array,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    w_output: Array,
    *,
    head_gates: Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    alignment: str | int = "top_left",
    empty_row: str = "zero",
) -> Array:
    """Return multi-head attention of the query sequence over the source sequence.

    Spec: VAS-S322a, VAS-S323a, VAS-S323b, HEADS-S23, OWN-SCALE1, OWN-ROUND1.

        head_h = Attention(X W^Q_h, Y W^K_h, Y W^V_h)
        MultiHead = Concat(ξ_1 head_1, ..., ξ_h head_h) W^O

    Self-attention: pass one sequence twice. The decoder's self-attention: also causal=True.

    Args:
        query_input: X (b, n_q, e_q).
        source_input: Y (b, n_k, e_s), where keys and values come from.
        w_query: W^Q (h, e_q, d_k).
        w_key: W^K (h, e_s, d_k).
        w_value: W^V (h, e_s, d_v).
        w_output: W^O by heads (h, d_v, e_o); see `unpack_output`.
        head_gates: ξ (h,), 1 keeps a head, 0 masks it; all 1 if None.
        scale: factor of the logits; None is 1/√d_k.
        causal: whether a query sees keys up to its own position only.
        alignment: `top_left`, `bottom_right` or the offset of the queries.
        empty_row: `zero`, `nan` or `uniform`: what a row without an allowed key returns.

    Returns:
        (b, n_q, e_o), dtype of query_input.

    Raises:
        ShapeError: two shapes do not fit.
        DtypeError: a dtype is not floating, or two differ.
        OptionError: an option is refused.
        MemoryLimitError: the n_q x n_k matrices do not fit into the free memory.
    """
    weights = {"w_query": w_query, "w_key": w_key, "w_value": w_value, "w_output": w_output}
    check_multihead("multihead_attention", query_input, source_input, weights, head_gates)
    heads = project(query_input, source_input, w_query, w_key, w_value)
    options: AttentionOptions = {
        "scale": scale, "causal": causal, "alignment": alignment, "empty_row": empty_row
    }  # fmt: skip
    output = attention(*heads, **options).output
    gated = output if head_gates is None else gate_factor(head_gates) * output
    return narrow(merge_heads(gated) @ pack_output(widen(w_output)), query_input)


def project(
    query_input: Array, source_input: Array, w_query: Array, w_key: Array, w_value: Array
) -> Projected:
    """Return the queries, keys and values of every head, in the computing dtype.

    Spec: VAS-S322a, VAS-S323a.

        Q_h = X W^Q_h,  K_h = Y W^K_h,  V_h = Y W^V_h

    Args:
        query_input: X (b, n_q, e_q).
        source_input: Y (b, n_k, e_s).
        w_query: W^Q (h, e_q, d_k).
        w_key: W^K (h, e_s, d_k).
        w_value: W^V (h, e_s, d_v).

    Returns:
        Q (b, h, n_q, d_k), K (b, h, n_k, d_k), V (b, h, n_k, d_v).
    """
    X, Y = widen(query_input)[:, None, :, :], widen(source_input)[:, None, :, :]
    return Projected(X @ widen(w_query), Y @ widen(w_key), Y @ widen(w_value))


def check_multihead(
    function: str,
    query_input: Array,
    source_input: Array,
    weights: dict[str, Array],
    head_gates: Array | None,
    d_output: Array | None = None,
) -> None:
    """Check every shape and dtype.

    Raises:
        ShapeError, DtypeError: an argument is refused.
    """
    shapes = {
        "w_query": "h e_q d_k", "w_key": "h e_s d_k", "w_value": "h e_s d_v",
        "w_output": "h d_v e_o",
    }  # fmt: skip
    check_shapes(
        function,
        query_input=(query_input, "b n_q e_q"),
        source_input=(source_input, "b n_k e_s"),
        **{name: (weights[name], shape) for name, shape in shapes.items()},
        head_gates=(head_gates, "h or None"),
        d_output=(d_output, "b n_q e_o or None"),
    )
    arrays = {"query_input": query_input, "source_input": source_input, **weights}
    check_floats(function, **arrays, **given(head_gates=head_gates, d_output=d_output))


def gate_factor(head_gates: Array) -> Array:
    """Return the gates as a factor of (b, h, n, d), in the computing dtype."""
    return widen(head_gates)[None, :, None, None]
