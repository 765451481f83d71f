"""Small vectors made in the test run: values by the direct formula in float64, bounds by hand.

They stand in for a certified pack where a test is about what is done with a verdict.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refattn.bounds import PROFILES
from refattn.vectors.pack import Case

LIMITS = {"fp64": 1e-13, "fp32": 3e-6, "tf32": 4e-3, "fp16": 8e-3, "bf16": 6e-2}
"""Absolute limits, far above what the profile's rounding does to sums of these sizes."""

SHAPE = {"n_q": 3, "n_k": 5, "d": 7, "heads": 1, "key_heads": 1}
"""Sizes of a case; distinct primes."""


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Return multiples of 1/16 between -2 and 2: exact in every dtype."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.integers(-32, 33, shape) / 16).astype(np.float32)


def direct(case_inputs: dict[str, np.ndarray], allowed: np.ndarray, scale: float) -> dict[str, Any]:
    """Return output, logsumexp and, with a d_output, gradients by the matrix formula."""
    Q, K, V = (case_inputs[name].astype(np.float64) for name in ("query", "key", "value"))
    group = Q.shape[1] // K.shape[1]
    K, V = (np.repeat(a, group, axis=1) for a in (K, V))
    S = np.where(allowed, scale * (Q @ K.swapaxes(-1, -2)), -np.inf)
    L = np.log(np.exp(S).sum(axis=-1))
    P = np.exp(S - L[..., None])
    outputs = {"output": P @ V, "logsumexp": L}
    if "d_output" in case_inputs:
        dO = case_inputs["d_output"].astype(np.float64)
        dP = dO @ V.swapaxes(-1, -2)
        dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True))
        outputs["d_query"] = scale * dS @ K
        outputs["d_key"] = scale * dS.swapaxes(-1, -2) @ Q
        outputs["d_value"] = P.swapaxes(-1, -2) @ dO
    return outputs


def make_case(
    *,
    name: str = "plain",
    clauses: tuple[str, ...] = ("VAS-EQ1", "OWN-LSE1"),
    requires: tuple[str, ...] = ("cross_lengths",),
    causal: bool = False,
    backward: bool = False,
    scale: float | None = None,
    gain: float = 1.0,
    **sizes: int,
) -> Case:
    """Return a case of attention, with the default conventions written out."""
    size = SHAPE | sizes
    q_shape = (2, size["heads"], size["n_q"], size["d"])
    k_shape = (2, size["key_heads"], size["n_k"], size["d"])
    inputs = {"query": drawn(*q_shape) * np.float32(gain)}
    inputs |= {n: drawn(*k_shape, seed=s) for s, n in enumerate(("key", "value"), 1)}
    if backward:
        inputs["d_output"] = drawn(*q_shape, seed=3)
    rows, keys = size["n_q"], size["n_k"]
    allowed = np.tri(rows, keys, dtype=bool) if causal else np.ones((rows, keys), bool)
    outputs = direct(inputs, allowed, 1 / math.sqrt(size["d"]) if scale is None else scale)
    needed = set(requires) | ({"causal"} if causal else set())
    needed |= {"backward"} if backward else set()
    needed |= {"scale"} if scale is not None else set()
    bounds = {
        p: {output: (LIMITS.get(p, 0.5), 0.0, 0.0) for output in outputs}  # a · unit
        for p in PROFILES
    }
    return Case(
        id=name,
        summary="made by hand",
        clauses=clauses,
        flags=("Plain",),
        op="attention",
        parameters={"causal": causal, **({} if scale is None else {"scale": scale})},
        conventions={
            "alignment": "top_left",
            "softcap_order": "before_bias",
            "distance": "absolute",
            "head_map": "interleave",
            "empty_row": "zero",
            "masked": "select",
            "round_weights": False,
        },
        requires=tuple(sorted(needed)),
        dtypes=("float64", "float32", "float16", "bfloat16"),
        draws={},
        inputs=inputs,
        outputs=outputs,
        units={f"{n}.unit": np.ones(a.shape, np.float32) for n, a in outputs.items()},
        bounds=bounds,
        certification={},
    )
