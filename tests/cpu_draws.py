"""Attention problems drawn at random over every option that the CPU kernels claim."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

QUERIES = [1, 2, 5, 16, 17, 33, 63, 64, 65, 129, 151]
KEYS = [1, 3, 7, 8, 31, 65, 101, 128, 129, 257]
FEATURES = [1, 3, 8, 15, 24, 33, 64, 80, 131]


def chance(drawn: np.random.Generator, p: float) -> bool:
    return bool(drawn.random() < p)


def lay(array: np.ndarray, way: int) -> np.ndarray:
    """Return the same numbers at other strides."""
    if way == 1:
        return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2)
    if way == 2:
        return np.ascontiguousarray(array.swapaxes(2, 3)).swapaxes(2, 3)
    if way == 3:
        return np.repeat(array, 2, axis=3)[..., ::2]
    return array[:, :, ::-1].copy()[:, :, ::-1] if way == 4 else array


def draw(seed: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return (query, key, value) and options."""
    drawn = np.random.default_rng(seed)
    b, h_k, group = drawn.integers(1, 3), drawn.integers(1, 4), drawn.integers(1, 4)
    h, dtype = h_k * group, DTYPES[seed % 4]
    n_q, n_k = drawn.choice(QUERIES), drawn.choice(KEYS)
    d_k, d_v = drawn.choice(FEATURES), drawn.choice(FEATURES)

    def floats(*shape: int) -> np.ndarray:
        return drawn.standard_normal(shape).astype(dtype)

    way = drawn.integers(0, 5)
    arrays = [
        lay(floats(*shape), way)
        for shape in ((b, h, n_q, d_k), (b, h_k, n_k, d_k), (b, h_k, n_k, d_v))
    ]
    options: dict[str, Any] = {"head_map": str(drawn.choice(["interleave", "tile"]))}
    options["causal"] = chance(drawn, 0.4)
    offsets: list[Any] = ["top_left", "bottom_right", int(drawn.integers(-20, 200))]
    options["alignment"] = [*offsets, [int(x) for x in drawn.integers(-5, 99, b)]][
        drawn.integers(4)
    ]
    if chance(drawn, 0.3):
        ends = drawn.integers(0, 60, 2)
        options["window"] = [int(x) if chance(drawn, 0.6) else None for x in ends]
    if chance(drawn, 0.3):
        options["softcap"] = float(drawn.uniform(0.5, 30))
        options["softcap_order"] = str(drawn.choice(["before_bias", "after_bias"]))
    if chance(drawn, 0.3):
        options["slopes"] = (drawn.random(h) / 3).astype(dtype)
        options["distance"] = str(drawn.choice(["absolute", "signed", "column"]))
    if chance(drawn, 0.3):
        options["sinks"] = floats(h)
    shapes = [(b, h, n_q, n_k), (1, h, n_q, n_k), (n_q, n_k), (b, 1, 1, n_k), (b, h, n_q, 1)]
    if chance(drawn, 0.3):
        options["mask"] = drawn.random(shapes[drawn.integers(5)]) < 0.6
    if chance(drawn, 0.3):
        bias = floats(*shapes[drawn.integers(5)])
        bias[drawn.random(bias.shape) < 0.2] = -np.inf
        options["bias"] = bias
    if chance(drawn, 0.25):
        options["keep"] = drawn.random(shapes[drawn.integers(5)]) < 0.7
        options["keep_probability"] = 0.7
    options["empty_row"] = str(drawn.choice(["zero", "zero", "nan", "uniform"]))
    options["masked"] = str(drawn.choice(["select", "select", "add"]))
    for name, n in (("key_lengths", n_k), ("query_lengths", n_q)):
        if chance(drawn, 0.25):
            options[name] = drawn.integers(0, n + 1, b)
    if chance(drawn, 0.3):
        options["scale"] = float(drawn.choice([-0.3, 0.0, 1.0, 0.05]))
    return arrays, options


def widened(arrays: list[np.ndarray], options: dict[str, Any]) -> tuple[list, dict[str, Any]]:
    """Return the same problem in float64."""
    wide = {
        name: x.astype(np.float64) if name in ("bias", "slopes", "sinks") else x
        for name, x in options.items()
    }
    return [array.astype(np.float64) for array in arrays], wide
