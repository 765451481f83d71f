"""Drawn calls of Keras's layers: any combination of arguments, a few of them wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

KINDS = st.sampled_from(["none"] * 2 + ["bool"] * 4 + ["float", "int"])
"""Kinds of masks."""

WRONG = ["nothing"] * 24 + [
    "lengths",
    "rank",
    "mask",
    "axes",
    "dropout",
    "heads",
    "output",
    "window",
    "batch",
]
"""What is wrong with a call, if anything."""

FLAG = st.booleans()


def drawn_mask(draw: Any, kind: str, shape: tuple[int, ...], random: Any) -> np.ndarray | None:
    """Return a mask of a kind, with rows that forbid everything now and then."""
    if kind == "none":
        return None
    allowed = random.random(shape) < draw(st.sampled_from([0.2, 0.8]))
    if kind == "bool":
        return np.asarray(allowed)
    numbers = np.where(allowed, random.integers(1, 3, shape), random.integers(-1, 1, shape))
    return numbers if kind == "int" else np.where(allowed, random.random(shape), 0.0)


def attention_mask(
    draw: Any, lead: tuple[int, ...], ends: tuple[int, ...], random: Any
) -> np.ndarray | None:
    """Return a mask over scores of `lead` (batch and heads) and `ends` (queries and keys)."""
    batch = lead[:-1]
    leads = [(), (1,), batch, batch, lead, (*batch, 1), (1,) * len(lead)]
    shape = (*draw(st.sampled_from(leads)), *ends)
    if draw(st.integers(0, 5)) == 0:  # an axis of 1 broadcasts
        at = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:at], 1, *shape[at + 1 :])
    if draw(st.integers(0, 11)) == 0:
        shape = shape[1:]
    return drawn_mask(draw, draw(KINDS), shape, random)


@st.composite
def inputs_and_axes(draw: Any, wrong: str, ranks: list[int], shortest: dict[int, int]) -> Any:
    """Draw query, value and key, the attended axes, and the axes of the scores."""
    rank, size = draw(st.sampled_from(ranks)), st.integers(1, 4)
    least = shortest.get(rank) or draw(st.sampled_from([1] * 7 + [0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    middle = list(range(1, rank - 1))
    axes = draw(st.permutations(middle))[: draw(st.integers(1, len(middle)))]
    batch = {a: draw(st.integers(1, 3)) for a in range(rank - 1) if a not in axes}
    queries = {a: draw(st.integers(least, 4)) for a in axes}
    keys = {a: draw(st.integers(least, 4)) for a in axes}
    q_shape, v_shape = (
        [(batch | lengths)[a] for a in range(rank - 1)] for lengths in (queries, keys)
    )
    if wrong == "batch":
        v_shape[0] = draw(st.sampled_from([1, batch[0] + 1]))
    k_shape = list(v_shape)
    if wrong == "lengths":
        k_shape[1] += 1
    if wrong == "rank":
        q_shape = [2, *q_shape]
    shapes = {"query": q_shape, "value": v_shape, "key": k_shape}
    found = {n: random.normal(size=(*s, draw(size))) for n, s in shapes.items()}
    if draw(FLAG) and wrong != "lengths":
        del found["key"]
    ends = (*queries.values(), *keys.values())
    return found, axes, (tuple(batch.values()), ends), random


@st.composite
def mha_calls(draw: Any, *, version: int, dtype: str = "float64", some_keys: bool = False) -> Any:
    """Draw a MultiHeadAttention and a call: constructor, inputs, options, hung masks.

    `some_keys` keeps to what Keras's numpy backend can do, or sees: there is a key, and a mask of
    another length does not meet the only key or the only head, which it would repeat. tf-keras
    repeats the only query or key, too, but a causal mask of the first axis can do that over several
    axes only.
    """
    wrong = draw(st.sampled_from([w for w in WRONG if not (some_keys and w == "mask")]))
    ranks = [3, 3, 3, 4, 4, 5]
    shortest = {3: 1, 4: 1, 5: 1} if some_keys else {4: 2, 5: 2} if version == 2 else {}
    inputs, axes, (batch, ends), random = draw(inputs_and_axes(wrong, ranks, shortest))
    inputs = {name: x.astype(dtype) for name, x in inputs.items()}
    rank, size = inputs["value"].ndim, st.integers(1, 3)
    h = draw(st.integers(2 if some_keys else 1, 3))
    named: dict[str, Any] = {"num_heads": -1 if wrong == "heads" else h, "key_dim": draw(size)}
    named |= {"value_dim": draw(st.one_of(st.none(), size)), "use_bias": draw(FLAG)}
    named["dropout"] = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))
    if wrong == "dropout":
        named["dropout"] = draw(st.sampled_from([-0.5, 1.5]))
    shapes = [None, None, 2, (3,), [2], (2, 3), 0, ()]
    named["output_shape"] = (2, -1) if wrong == "output" else draw(st.sampled_from(shapes))
    whole = len(axes) == rank - 2 and axes == sorted(axes)
    spelled = [tuple(axes), list(axes)] + ([axes[0]] if len(axes) == 1 else [])
    if version == 3:
        spelled.append(tuple(a - rank for a in axes))
    spelled = ["1"] if wrong == "axes" else spelled
    named["attention_axes"] = None if whole and draw(FLAG) else draw(st.sampled_from(spelled))
    if version == 3:
        named |= {"use_gate": draw(FLAG), "seed": 3}
        named["sliding_window"] = draw(
            st.sampled_from([0] if wrong == "window" else [None, None, 1, 2])
        )
    else:
        named["softmax_robust_masking"] = draw(FLAG)
    options = {n: draw(FLAG) for n in ("return_attention_scores", "use_causal_mask")}
    if rank > 3:  # a causal mask is of the first axis: it seldom fits several
        options["use_causal_mask"] &= draw(st.integers(0, 3)) == 0
    options["training"] = draw(st.sampled_from([None, False, True, True]))
    ends = (*ends[:-1], ends[-1] + 2) if wrong == "mask" else ends
    options["attention_mask"] = attention_mask(draw, (*batch, h), ends, random)
    hung: dict[str, Any] = {}
    if rank == 3:
        q, v = inputs["query"].shape[:-1], inputs["value"].shape[:-1]
        lengths = {"query": q, "value": v, "key": v}
        for name in inputs:
            if draw(st.integers(0, 3)) == 0:
                hung[name] = random.random(lengths[name]) < 0.7
        if version == 3:
            for name, shape in lengths.items():
                if name not in hung and draw(st.integers(0, 4)) == 0:
                    options[f"{name}_mask"] = drawn_mask(draw, draw(KINDS), shape, random)
    return named, inputs, options, hung


@st.composite
def gqa_calls(draw: Any) -> Any:
    """Draw a GroupQueryAttention and a call."""
    # lengths of key and value that differ are a named exception
    wrong = draw(st.sampled_from([w for w in WRONG if w != "lengths"]))
    ranks = [4] if wrong == "axes" else [3]
    inputs, _, (batch, ends), random = draw(inputs_and_axes(wrong, ranks, {}))
    h_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    named: dict[str, Any] = {
        "head_dim": draw(st.integers(1, 3)),
        "num_query_heads": h_k * group + (wrong == "heads"),
        "num_key_value_heads": h_k,
    }
    named["dropout"] = draw(st.sampled_from([-0.5] if wrong == "dropout" else [0.0, 0.0, 0.5, 1.0]))
    named |= {"use_bias": draw(FLAG), "use_gate": draw(FLAG), "seed": 3}
    named["sliding_window"] = draw(
        st.sampled_from([0] if wrong == "window" else [None, None, 1, 2])
    )
    options = {n: draw(FLAG) for n in ("return_attention_scores", "use_causal_mask")}
    options["training"] = draw(st.sampled_from([None, False, True, True]))
    ends = (*ends[:-1], ends[-1] + 2) if wrong == "mask" else ends
    options["attention_mask"] = attention_mask(draw, (*batch, h_k * group), ends, random)
    for name in ("query", "value", "key"):
        if draw(st.integers(0, 4)) == 0:
            shape = inputs["query" if name == "query" else "value"].shape[:-1]
            options[f"{name}_mask"] = drawn_mask(draw, draw(KINDS), shape, random)
    return named, inputs, options
