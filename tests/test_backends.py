"""Backends: what loads, what is absent and why, and that numpy runs every operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import module_cases
from refattn import backends
from refattn.arrays import FLOATS, numpy_dtype
from refattn.backends import BACKENDS, CLAIMS, OPS, BackendAbsent, Unsupported, claiming, load

GPU = ("numba-cuda", "cuda-cpp", "cupy")
"""Backends of the GPU package."""


def _drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).integers(-8, 9, shape).astype(np.float32) / 8


def _attention() -> dict[str, Any]:
    inputs = {"query": _drawn(2, 4, 3, 5), "key": _drawn(2, 2, 7, 5), "value": _drawn(2, 2, 7, 11)}
    return inputs | {
        "bias": _drawn(1, 4, 3, 7),
        "slopes": _drawn(4),
        "sinks": _drawn(4) + 1,
        "d_output": _drawn(2, 4, 3, 11),
        "d_logsumexp": _drawn(2, 4, 3),
    }


def _multihead() -> dict[str, Any]:
    return {
        "query_input": _drawn(2, 3, 5),
        "source_input": _drawn(2, 7, 11),
        "w_query": _drawn(2, 5, 3),
        "w_key": _drawn(2, 11, 3),
        "w_value": _drawn(2, 11, 2),
        "w_output": _drawn(2, 2, 13),
        "head_gates": _drawn(2),
        "d_output": _drawn(2, 3, 13),
    }


def _shapes(case: str) -> dict[str, tuple]:
    """Return the shapes of a module's output and of the gradients of all float inputs."""
    inputs = module_cases.CASES[case][1]
    floats = {n: a.shape for n, a in inputs.items() if a.dtype.kind == "f" and n != "d_output"}
    return {"output": inputs["d_output"].shape} | {f"d_{n}": shape for n, shape in floats.items()}


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, tuple]]] = {
    "attention": (
        _attention(),
        {"causal": True, "window": [2, None]},
        {"alignment": [0, 1]},
        {
            "output": (2, 4, 3, 11),
            "logsumexp": (2, 4, 3),
            "d_query": (2, 4, 3, 5),
            "d_key": (2, 2, 7, 5),
            "d_value": (2, 2, 7, 11),
            "d_bias": (1, 4, 3, 7),
            "d_slopes": (4,),
            "d_sinks": (4,),
        },
    ),
    "multihead": (
        _multihead(),
        {"causal": True},
        {"alignment": "bottom_right"},
        {"output": (2, 3, 13)}
        | {f"d_{n}": a.shape for n, a in _multihead().items() if n[0] != "d"},
    ),
    "causal_module": (*module_cases.CASES["causal module"][1:], _shapes("causal module")),
    "gated_cross_attention": (*module_cases.CASES["gated"][1:], _shapes("gated")),
    "head_importance": (
        {"head_outputs": _drawn(2, 3, 5, 7, 4), "d_head_outputs": _drawn(2, 3, 5, 7, 4)},
        {},
        {"granularity": "token"},
        {"importance": (2, 5), "normalized": (2, 5), "order": (10,)},
    ),
    "rope": (
        {"x": _drawn(2, 3, 5, 8), "positions": np.arange(5), "d_output": _drawn(2, 3, 5, 8)},
        {"base": 500.0, "rotary_dim": 6, "variant": {"kind": "linear", "factor": 2.0}},
        {"pairing": "half_split"},
        {
            "frequencies": (3,),
            "attention_factor": (),
            "cosine": (5, 3),
            "sine": (5, 3),
            "output": (2, 3, 5, 8),
            "d_x": (2, 3, 5, 8),
        },
    ),
    "alibi": (
        {},
        {"heads": 3, "n_q": 5, "n_k": 7},
        {"alignment": 2, "distance": "signed", "slope_rule": "geometric"},
        {"slopes": (3,), "bias": (3, 5, 7)},
    ),
    "tiles": (
        {"query": _drawn(5, 4), "key": _drawn(7, 4), "value": _drawn(7, 3)},
        {"block_rows": 2, "block_cols": 3},
        {},
        {"row_max": (3, 5), "row_sum": (3, 5), "states": (3, 5, 3)},
    ),
    "merge": (
        {"outputs": _drawn(3, 5, 2), "logsumexps": _drawn(3, 5)},
        {},
        {},
        {"output": (5, 2), "logsumexp": (5,)},
    ),
    "score": (
        {"query": _drawn(3, 5), "key": _drawn(7, 2), "weight": _drawn(5, 2)},
        {"kind": "general"},
        {},
        {"scores": (3, 7)},
    ),
    "rope_decay": (
        {"distances": np.arange(7)},
        {"d": 8, "base": 10000.0},
        {},
        {"decay": (7,)},
    ),
    "traffic": (
        {},
        {"n_q": 5, "n_k": 7, "d": 3, "sram": 60, "algorithm": "tiled"},
        {},
        {"reads": (), "writes": ()},
    ),
    "keep_mask": (
        {},
        {"seed": 3, "offset": 1, "shape": [2, 3, 5], "keep_probability": 0.5},
        {},
        {"keep": (2, 3, 5)},
    ),
}
"""A call of every operation, and the shape of each output."""


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_numpy_runs_every_operation_in_every_dtype(op: str, dtype: str) -> None:
    inputs, parameters, conventions, shapes = CALLS[op]
    before = {name: array.copy() for name, array in inputs.items()}
    outputs = load("numpy").run(op, inputs, parameters, conventions, dtype)
    assert {name: array.shape for name, array in outputs.items()} == shapes
    computing = np.dtype("float64" if dtype == "float64" else "float32")
    for name, array in outputs.items():
        assert array.dtype.kind in "ib" or array.dtype in (numpy_dtype(dtype), computing), name
    assert all(np.array_equal(before[name], array) for name, array in inputs.items())


def test_numpy_computes_in_the_dtype_that_is_asked_for() -> None:
    inputs = {name: _drawn(1, 1, 3, 5) for name in ("query", "key", "value")}
    run = load("numpy").run
    found = {d: run("attention", inputs, {}, {}, d)["output"] for d in FLOATS}
    assert {d: a.dtype for d, a in found.items()} == {d: numpy_dtype(d) for d in FLOATS}
    exact = found["float64"]
    errors = [np.abs(found[d].astype(np.float64) - exact).max() for d in FLOATS]
    assert errors[0] == 0 < errors[1] < errors[2] < errors[3] < 0.01


def test_every_backend_claims_something() -> None:
    assert set(BACKENDS) == set(CLAIMS)
    assert set().union(*CLAIMS.values()) <= set(OPS)


@pytest.mark.parametrize("name", GPU)
def test_without_the_gpu_package_its_backends_are_absent(name: str, monkeypatch) -> None:
    monkeypatch.setitem(backends.GPU, name, "refattn_gpu.nowhere")
    with pytest.raises(
        BackendAbsent, match=f"backend {name} is absent: refattn_gpu is not installed: pip"
    ):
        load(name)


def test_a_backend_without_its_package_names_the_command(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        BackendAbsent, match=r'numba is not installed: pip install "refattn\[cpu\]"'
    ):
        load("numba")


def test_an_unknown_backend_is_told_the_names() -> None:
    with pytest.raises(
        BackendAbsent, match="there is no backend torch; there are numpy, numpy-tiled"
    ):
        load("torch")


def test_what_is_not_claimed_is_refused() -> None:
    run = load("numpy").run
    with pytest.raises(Unsupported, match="op is convolution, but backend numpy claims attention"):
        run("convolution", {}, {}, {}, "float64")
    with pytest.raises(Unsupported, match="dtype is int8, but backend numpy claims float64"):
        run("merge", {}, {}, {}, "int8")


def test_a_backend_is_credited_with_the_clauses_that_its_text_states() -> None:
    assert set(CLAIMS["numpy"]) == set(OPS) == set(CALLS)
    assert claiming("ROPE-EQ34", {"rope"}) == ("numpy", "numba", "numba-cuda", "cupy")
    assert claiming("OWN-ROPE5", {"rope"}) == claiming("ALIBI-S3c", {"alibi"}) == ("numpy",)
    assert claiming("VAS-EQ1", {"attention"}) == ("numpy", "numpy-tiled", "numba", *GPU)
    assert claiming("FA1-ALG4", {"attention"}) == ("numpy-tiled", "numba", "numba-cuda", "cuda-cpp")
    tiled = {"attention", "tiles"}
    assert claiming("FA1-ALG1", tiled) == ("numpy", "numpy-tiled", "numba", *GPU)
    assert claiming("FA1-ALG3", {"attention"}) == ("numpy", "cupy")
    assert claiming("VAS-EQ1", {"convolution"}) == claiming("VAS-EQ1", ()) == ()


def test_the_tiled_backend_agrees_with_the_matrix_text_on_ragged_tiles() -> None:
    inputs = {name: _drawn(1, 2, n, 5) for name, n in (("query", 29), ("key", 31), ("value", 31))}
    inputs["d_output"] = _drawn(1, 2, 29, 5)
    options = {"causal": True}, {"alignment": "bottom_right"}
    whole = load("numpy").run("attention", inputs, *options, "float64")
    tiled = load("numpy-tiled").run("attention", inputs, *options, "float64")
    assert set(tiled) == {"output", "logsumexp", "d_query", "d_key", "d_value"}
    for name, array in tiled.items():
        assert np.allclose(array, whole[name], rtol=1e-12, atol=1e-13), name


@pytest.mark.parametrize(
    ("extra", "options", "beyond"),
    [
        ({"sinks": np.zeros(2)}, {}, "sinks"),
        ({}, {"softcap": 2.0}, "softcap"),
        ({}, {"empty_row": "nan"}, "empty_row"),
        ({}, {"alignment": [1]}, "an alignment a batch item"),
        ({"key": np.zeros((1, 1, 5, 3)), "value": np.zeros((1, 1, 5, 3))}, {}, "grouped heads"),
    ],
)
def test_the_tiled_backend_refuses_what_the_listings_do_not_have(
    extra: dict[str, np.ndarray], options: dict[str, object], beyond: str
) -> None:
    inputs = {name: np.zeros((1, 2, 5, 3)) for name in ("query", "key", "value")} | extra
    with pytest.raises(Unsupported, match=f"the case has {beyond}, but the tiled listings do not"):
        load("numpy-tiled").run("attention", inputs, options, {}, "float64")
