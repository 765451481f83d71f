"""What ONNX's evaluator answered for Attention, operator set 23, before release 1.23.

The same model had other official answers: each release below is the present text but for the rules
that it names.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from refattn.arrays import Array
from refattn.attention import attention
from refattn.checks import OptionError, ShapeError
from refattn.dialects.conventions import Choice, Dialect
from refattn.dialects.onnx_attention import CONVENTIONS, EXCEPTIONS
from refattn.dialects.onnx_attention_call import (
    FUNCTION,
    AttentionOutputs,
    Node,
    check_attributes,
    operands,
    options,
    stage,
)
from refattn.masks import allowed_pairs
from refattn.options import AttentionOptions
from refattn.projections import merge_heads

LOWEST = -1e300
"""A logit whose cap is exactly -c: what the softcap makes of -∞ where it comes last."""


class Release(NamedTuple):
    """The rules of a release in which it is not as the present one."""

    version: str
    head_map: str = "interleave"
    by_heads: bool = True
    """Whether operands of 3 axes are split by features; else their numbers are read on end."""
    cached: bool = True
    """Whether causal attention counts the keys of the past, and a short mask is filled up."""
    capped_last: bool = False
    """Whether the softcap comes after the mask, so that forbidden keys keep a weight."""
    stages: tuple[str, ...] = ("logits", "capped", "sum", "weights")
    """What qk_matmul_output holds in modes 0 to 3."""


V1_18 = Release(
    "1.18", "tile", by_heads=False, cached=False, capped_last=True,
    stages=("logits", "sum", "capped", "weights"),
)  # fmt: skip
V1_20 = Release("1.20 and 1.21", capped_last=True, stages=("logits", "sum", "capped", "weights"))
V1_22 = Release("1.22", stages=("capped", "capped", "sum", "weights"))


class Attributes(TypedDict, total=False):
    """Attributes of operator set 23; see `refattn.dialects.onnx_attention.attention_23`."""

    is_causal: int
    kv_num_heads: int | None
    q_num_heads: int | None
    qk_matmul_output_mode: int
    scale: float | None
    softcap: float
    softmax_precision: int | None


def _dialect(name: str, release: Release, changed: dict[str, Choice]) -> Dialect:
    """Return the dialect of a release."""
    own = (
        "float masks beside is_causal, and masks of bools in 1.18, of other axes than "
        "(n_q, n_k): the evaluator errs, or reads row 0 for all; here they broadcast.",
    )
    return Dialect(
        name=f"onnx_attention_23_{name}",
        alias=f"onnx_23_{name}",
        system="ONNX",
        version=f"{release.version}, operator set 23",
        sentence="The operator Attention by the evaluator of an earlier release.",
        functions=(f"refattn.dialects.onnx_releases.attention_23_{name}",),
        conventions={**CONVENTIONS, "empty_row": "nan", **changed},
        exceptions=EXCEPTIONS[2:] + own,
    )


LEAKING: Choice = "after bias, forbidden keys too"
"""The place of the softcap up to 1.21."""

DIALECTS = (
    _dialect(
        "1_18",
        V1_18,
        {
            "softcap": LEAKING,
            "head_map": "tile",
            "causal_alignment": "top_left",
            "mask_with_causal": "refused",
            "empty_row": {"softcap": "uniform", "else": "nan"},
        },
    ),
    _dialect(
        "1_20",
        V1_20,
        {
            "softcap": LEAKING,
            "mask_with_causal": {"numbers": "and", "bool": "nan"},
            "empty_row": {"softcap": "uniform", "else": "nan"},
        },
    ),
    _dialect("1_22", V1_22, {"mask_with_causal": {"numbers": "and", "bool": "nan"}}),
)
"""One dialect a release whose answers were others."""


def attention_23_1_18(*inputs: Array | None, **attributes: Unpack[Attributes]) -> AttentionOutputs:
    """Return what the evaluator of onnx 1.18 answers.

    Spec: VAS-EQ1, OWN-GQA1, OWN-CAUSAL1, OWN-SOFTCAP1, OWN-EMPTY1.

    Args:
        *inputs: as in `onnx_attention.attention_23`, in its order.
        **attributes: likewise, by name.

    Returns:
        The outputs of `onnx_attention.attention_23`.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    return _run(inputs, attributes, V1_18)


def attention_23_1_20(*inputs: Array | None, **attributes: Unpack[Attributes]) -> AttentionOutputs:
    """Return what the evaluators of onnx 1.20 and 1.21 answer.

    Spec: VAS-EQ1, OWN-SOFTCAP1, OWN-EMPTY1, OWN-MASK1.

    Args:
        *inputs: as in `onnx_attention.attention_23`, in its order.
        **attributes: likewise, by name.

    Returns:
        The outputs of `onnx_attention.attention_23`.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    return _run(inputs, attributes, V1_20)


def attention_23_1_22(*inputs: Array | None, **attributes: Unpack[Attributes]) -> AttentionOutputs:
    """Return what the evaluator of onnx 1.22 answers.

    Spec: VAS-EQ1, OWN-EMPTY1, OWN-MASK1.

    Args:
        *inputs: as in `onnx_attention.attention_23`, in its order.
        **attributes: likewise, by name.

    Returns:
        The outputs of `onnx_attention.attention_23`.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    return _run(inputs, attributes, V1_22)


def _run(
    inputs: tuple[Array | None, ...], attributes: Attributes, release: Release
) -> AttentionOutputs:
    """Return the outputs of a node by the rules of a release."""
    node = Node(*inputs, **attributes)  # type: ignore[arg-type]
    check_attributes(node)
    flat = node.Q.ndim == 3
    Q, K, V = operands(node if release.by_heads else _on_end(node))
    chosen = options(node, 24 if release.cached else 23, (*Q.shape[:-1], K.shape[-2]))
    chosen |= {"head_map": release.head_map, "empty_row": "nan", "masked": "add"}
    if not release.cached:
        chosen["alignment"] = "top_left"
    if node.attn_mask is not None and node.is_causal:
        chosen = _composed(chosen, release)
    if release.capped_last and "softcap" in chosen:
        chosen = _capped_last(chosen, Q.shape[-2], K.shape[-2])
    output = attention(Q, K, V, **chosen).output
    name = release.stages[node.qk_matmul_output_mode]
    if release.capped_last and "softcap" not in chosen and name == "capped":
        name = "sum"  # what would be capped comes after the mask
    shown = _stage(name, Q, K, V, chosen)
    return AttentionOutputs(merge_heads(output) if flat else output, K, V, shown)


def _on_end(node: Node) -> Node:
    """Return a node whose operands of 3 axes are reshaped to 4 with no change of places.

    Raises:
        ShapeError: the features are no multiple of the heads.
    """
    if node.Q.ndim != 3 or node.q_num_heads is None or node.kv_num_heads is None:
        return node
    found = {}
    for name, heads in (
        ("Q", node.q_num_heads),
        ("K", node.kv_num_heads),
        ("V", node.kv_num_heads),
    ):
        array = getattr(node, name)
        if array.ndim != 3 or heads < 1 or array.shape[2] % heads:
            raise ShapeError(
                f"{name} has shape {array.shape}, but must have 3 axes and a multiple of {heads} "
                f"features [{FUNCTION}]"
            )
        b, n, features = array.shape
        found[name] = array.reshape(b, heads, n, features // heads)
    return node._replace(**found, q_num_heads=None, kv_num_heads=None)


def _composed(chosen: AttentionOptions, release: Release) -> AttentionOptions:
    """Return options of a mask beside causal attention: 0·∞ is NaN where a mask of bools allows.

    Raises:
        OptionError: the release refuses both.
    """
    if not release.cached:
        raise OptionError(
            f"attn_mask is given beside is_causal, but onnx {release.version} takes one of them "
            f"[{FUNCTION}]"
        )
    mask = chosen.pop("mask", None)
    if mask is not None:
        chosen |= {"bias": np.where(mask, np.nan, -np.inf), "causal": False}
    return chosen


def _capped_last(chosen: AttentionOptions, n_q: int, n_k: int) -> AttentionOptions:
    """Return options whose softcap acts on the sum of logits and masks, -∞ included."""
    bias = chosen.pop("bias", None)
    offset: Any = chosen.pop("alignment", 0)
    allowed = allowed_pairs(
        n_q,
        n_k,
        causal=chosen.pop("causal", False),
        mask=chosen.pop("mask", None),
        offset=0 if offset == "top_left" else offset,
    )
    B = np.where(allowed, 0.0 if bias is None else bias, LOWEST)
    return chosen | {"bias": np.maximum(B, LOWEST), "softcap_order": "after_bias"}


def _stage(name: str, Q: Array, K: Array, V: Array, chosen: AttentionOptions) -> Array:
    """Return one of the stages, where the cap may come last."""
    if chosen.get("softcap_order") != "after_bias":
        return stage(name, Q, K, V, chosen)
    plain: AttentionOptions = {k: v for k, v in chosen.items() if k != "softcap"}  # type: ignore[assignment]
    if name in ("logits", "weights"):
        return stage(name, Q, K, V, chosen)
    total = stage("sum", Q, K, V, plain)
    if name == "capped":
        return np.asarray(chosen["softcap"] * np.tanh(total / chosen["softcap"]), total.dtype)
    return np.where(total <= LOWEST / 2, -np.inf, total)
