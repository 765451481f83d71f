"""Problems of the modules that several tests share: small, hard, every option somewhere."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

B, N, E, H = 2, 5, 6, 3
M, N_M, E_M, D_K, D_V, F = 3, 2, 4, 2, 3, 7
MARKED = np.zeros((B, N), dtype=bool)
MARKED[0, [1, 3]] = MARKED[1, [2]] = True

BLOCK = {
    "norm_weight": (E,),
    "norm_bias": (E,),
    "w_query": (H, E, D_K),
    "w_key": (H, E_M, D_K),
    "w_value": (H, E_M, D_V),
    "w_output": (H, D_V, E),
    "attention_gate": (1,),
    "feed_forward_norm_weight": (E,),
    "feed_forward_norm_bias": (E,),
    "w_up": (E, F),
    "w_down": (F, E),
    "feed_forward_gate": (E,),
    "media_norm_weight": (E_M,),
    "media_norm_bias": (E_M,),
}
WHOLE = ("query_input", "media", "d_output", "norm_weight", "feed_forward_norm_weight")


def drawn(seed: int, *shape: int, size: float = 1.0) -> Array:
    """Return numbers of few bits, exact in every format."""
    x = size * np.random.default_rng((seed, *shape)).standard_normal(shape)
    return np.asarray(np.round(x * 32) / 32, np.float32)


def fused(size: float = 0.5) -> dict[str, Array]:
    """Return the inputs of the causal module."""
    return {
        "x": drawn(1, B, N, E),
        "w_qkv": drawn(2, E, 3 * E, size=size),
        "b_qkv": drawn(3, 3 * E, size=size),
        "w_output": drawn(4, E, E, size=size),
        "b_output": drawn(5, E, size=size),
        "d_output": drawn(6, B, N, E),
    }


def dropped() -> dict[str, Array]:
    """Return the same in training."""
    draw = np.random.default_rng(7).random
    masks = {"keep": draw((B, H, N, N)) < 0.75, "output_keep": draw((B, N, E)) < 0.625}
    return {**fused(), **masks}


def block(*, media_norm: bool = True, marks: Array | None = MARKED) -> dict[str, Array]:
    """Return the inputs of the gated block."""
    shapes = {"query_input": (B, N, E), "media": (B, M, N_M, E_M), "d_output": (B, N, E), **BLOCK}
    inputs = {
        name: drawn(at, *shape, size=1.0 if name in WHOLE else 0.25)
        for at, (name, shape) in enumerate(shapes.items())
        if media_norm or not name.startswith("media_norm")
    }
    return inputs if marks is None else {**inputs, "media_locations": marks}


FUSED = {"heads": H, "block_size": 8}
CHANCES = {"keep_probability": 0.75, "output_keep_probability": 0.625}
NORM = {"norm_epsilon": 1e-5}

CASES: dict[str, tuple[str, dict[str, Array], dict[str, Any], dict[str, Any]]] = {
    "causal module": ("causal_module", fused(), FUSED, {}),
    "causal module, dropout": ("causal_module", dropped(), {**FUSED, **CHANCES}, {}),
    "gated": ("gated_cross_attention", block(), NORM, {}),
    "gated, gelu": (
        "gated_cross_attention",
        block(media_norm=False),
        {**NORM, "scale": 0.5},
        {"activation": "gelu", "attend": "preceding"},
    ),
    "gated, uniform": (
        "gated_cross_attention",
        block(),
        NORM,
        {"before_media": "uniform", "attend": "preceding"},
    ),
    "gated, everything": (
        "gated_cross_attention",
        block(),
        NORM,
        {"before_media": "everything", "activation": "gelu"},
    ),
    "gated, cached": (
        "gated_cross_attention",
        block(marks=MARKED[:, :4]),
        NORM,
        {"cached_media": True},
    ),
    "gated, unmarked": ("gated_cross_attention", block(marks=None), NORM, {}),
}
"""Operation, inputs, parameters and conventions by name."""
