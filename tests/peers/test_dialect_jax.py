"""The dialect of jax.nn.dot_product_attention beside JAX: a grid, drawn calls, misuse, gradients.

JAX takes its softmax in float32 whatever the inputs are, so that float64 agrees to float32 only.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optional import require
from peers.sameness import TOLERANCE, assert_same, attempt, ours_or_error
from refattn.arrays import numpy_dtype
from refattn.dialects.jax_dpa import (
    DIALECT,
    LARGE_NEGATIVE,
    dot_product_attention,
    dot_product_attention_backward,
)

jax = require("jax")

pytestmark = pytest.mark.peer("jax")

FUNCTION = jax.nn.dot_product_attention

OPERANDS = ("query", "key", "value")

B, H, H_K, N_Q, N_K, D = 2, 6, 3, 5, 7, 4

CLOSE = TOLERANCE | {"float64": 1e-5}
"""Weights of float32 precision, by logits of up to 20, in float64 sums."""

ERRORS = (TypeError, ValueError, AssertionError, ZeroDivisionError, RuntimeError)
"""What JAX raises."""


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def run_jax(call: dict[str, Any], d_output: np.ndarray) -> dict[str, Any]:
    """Return JAX's output and residual, and the gradients of all that is floating."""
    leaves = {n: call[n] for n in (*OPERANDS, "bias") if _is_float(call.get(n))}
    fixed = {n: v for n, v in call.items() if n not in leaves}

    def attend(leaves: dict[str, Any]) -> Any:
        return tuple(FUNCTION(**leaves, **fixed, return_residual=True))

    def both(leaves: dict[str, Any], d_output: Any) -> Any:
        output, pullback, residual = jax.vjp(attend, leaves, has_aux=True)
        return output, residual, pullback(d_output)[0]

    output, residual, gradients = jax.jit(both)(leaves, d_output)
    found = {"output": output, "residual": residual}
    found |= {f"d_{name}": gradient for name, gradient in gradients.items()}
    return {name: np.asarray(array) for name, array in found.items()}


def _is_float(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind == "f"


def run_ours(call: dict[str, Any], d_output: np.ndarray) -> dict[str, Any]:
    """Return the same of the dialect."""
    output, residual = dot_product_attention(**call, return_residual=True)
    found = {"output": output, "residual": residual}
    gradients = dot_product_attention_backward(d_output, **call)._asdict()
    if not _is_float(call.get("bias")):
        del gradients["d_bias"]
    return found | gradients


def compare(call: dict[str, Any]) -> bool:
    """Compare a call, forward and backward; return whether JAX errs (and we, too)."""
    shape = np.shape(call["query"])
    d_output = np.random.default_rng(5).normal(size=shape).astype(call["query"].dtype)
    theirs = attempt(lambda: run_jax(call, d_output), ERRORS)
    ours = ours_or_error(lambda: run_ours(call, d_output))
    assert isinstance(theirs, Exception) == isinstance(ours, Exception), (theirs, ours)
    if isinstance(theirs, Exception):
        return True
    for found in (ours, theirs):  # the residual of a row that fell back dwarfs all others
        found["fallen"] = np.where(found["residual"] < -1e38, found["residual"] / 1e38, 0)
        found["residual"] = np.where(found["residual"] < -1e38, 0, found["residual"])
    assert_same(ours, theirs, CLOSE)
    return False


def operands(seed: int = 17, dtype: str = "float64", heads: int = H_K) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = ((B, N_Q, H, D), (B, N_K, heads, D), (B, N_K, heads, D))
    return {
        name: rng.normal(size=shape).astype(dtype)
        for name, shape in zip(OPERANDS, shapes, strict=True)
    }


def _allowed(*shape: int) -> np.ndarray:
    mask = np.random.default_rng(3).random(shape) < 0.6
    mask[..., 2, :] = False  # one row is empty
    return mask


BARRED = np.where(_allowed(H, N_Q, N_K), 0.5, -np.inf)

GRID: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.3},
    "mask": {"mask": _allowed(B, 1, N_Q, N_K)},
    "mask by head": {"mask": _allowed(1, H, N_Q, N_K)},
    "mask of two axes": {"mask": _allowed(N_Q, N_K)},
    "causal": {"is_causal": True},
    "mask and causal": {"mask": _allowed(B, H, N_Q, N_K), "is_causal": True},
    "bias": {"bias": np.random.default_rng(4).normal(size=(1, H, 1, N_K))},
    "bias of -∞": {"bias": BARRED},
    "bias of -∞ and causal": {"bias": BARRED, "is_causal": True},
    "bias of -∞ and mask": {"bias": BARRED, "mask": _allowed(B, 1, N_Q, N_K)},
    "integer bias": {"bias": np.arange(N_K)},
    "query lengths": {"query_seq_lengths": np.array([3, 0], np.int32)},
    "key lengths": {"key_value_seq_lengths": np.array([4, 0], np.int32)},
    "lengths beyond": {"key_value_seq_lengths": np.array([99, -2], np.int32)},
    "both lengths, causal": {
        "query_seq_lengths": np.array([5, 2], np.int32),
        "key_value_seq_lengths": np.array([7, 1], np.int32),
        "is_causal": True,
    },
    "window": {"local_window_size": (2, 1)},
    "window of one number": {"local_window_size": 1},
    "window beside the diagonal": {"local_window_size": (-1, 2)},
    "window and causal": {"local_window_size": (1, 3), "is_causal": True},
    "implementation": {"implementation": "xla"},
}
"""What JAX is asked, one argument and then two at a time."""


@pytest.mark.clause(
    "VAS-EQ1", "OWN-SCALE1", "OWN-MASK1", "OWN-BIAS1", "OWN-CAUSAL1", "OWN-WINDOW1", "OWN-LENGTH1",
    "OWN-GQA1", "OWN-EMPTY1", "OWN-LSE1", "OWN-BACKWARD1",
)  # fmt: skip
@pytest.mark.parametrize("heads", [1, H_K, H])
@pytest.mark.parametrize("name", GRID)
def test_the_dialect_agrees_with_jax_on_a_grid(name: str, heads: int) -> None:
    jax_errs = compare(operands(heads=heads) | GRID[name])
    assert not jax_errs


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a call: any combination of arguments, a few of them wrong."""
    whole, flag = st.integers, st.booleans()
    b, n_q, n_k, d = (draw(st.sampled_from(sizes)) for sizes in ((1, 2), (2, 3), (3, 4), (2, 3)))
    heads, key_heads = draw(st.sampled_from([(4, 2), (2, 2), (3, 1), (3, 2)]))
    wrong = draw(st.sampled_from([""] * 12 + ["batch", "length", "features", "mask", "dtype"]))
    rng = np.random.default_rng(draw(whole(0, 2**32)))
    shapes = {
        "query": (b + (wrong == "batch"), n_q, heads, d),
        "key": (b, n_k, key_heads, d),
        "value": (b, n_k + (wrong == "length"), key_heads, d + (wrong == "features")),
    }
    call: dict[str, Any] = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if wrong == "dtype":
        call["key"] = call["key"].astype(np.float32)
    if b == 1 and draw(flag):
        call = {name: array[0] for name, array in call.items()}
    lead = draw(st.sampled_from([(), (1,), (heads,), (b, heads), (b, 1), (1, 1), (key_heads,)]))
    pair = (n_q + (wrong == "mask"), n_k)
    shape = (*lead, *draw(st.sampled_from([pair, pair, (1, n_k), (n_q, 1)])))
    forbidden = rng.random(shape) < draw(st.sampled_from([0.2, 0.8]))
    if draw(flag):
        call["mask"] = ~forbidden if draw(whole(0, 9)) else forbidden.astype(np.int64)
    if draw(flag):
        numbers = rng.normal(size=shape)
        call["bias"] = (
            np.where(rng.random(shape) < 0.4, -np.inf, numbers) if draw(flag) else numbers
        )
    if draw(flag):
        call["scale"] = draw(st.sampled_from([0.3, 0.0, -1.5]))
    call["is_causal"] = draw(flag)
    for name, n in (("query_seq_lengths", n_q), ("key_value_seq_lengths", n_k)):
        if draw(whole(0, 2)) == 0:
            dtype = np.int32 if draw(whole(0, 9)) else np.int64
            call[name] = rng.integers(0, n, size=b, endpoint=True).astype(dtype)
    if draw(whole(0, 2)) == 0:
        call["local_window_size"] = draw(st.sampled_from([1, 0, (1, 0), (0, 2), (-1, 2), (1,)]))
    return call


@pytest.mark.clause(
    "VAS-EQ1", "OWN-MASK1", "OWN-BIAS1", "OWN-CAUSAL1", "OWN-WINDOW1", "OWN-LENGTH1", "OWN-GQA1",
    "OWN-EMPTY1", "OWN-BACKWARD1",
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True)
@given(calls())
def test_the_dialect_agrees_on_any_drawn_call(call: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        compare(call)


MISUSE: dict[str, dict[str, Any]] = {
    "mask of integers": {"mask": np.ones((N_Q, N_K), np.int64)},
    "mask of five axes": {"mask": np.ones((1, 1, 1, N_Q, N_K), bool)},
    "mask by key-value head": {"mask": np.ones((H_K, N_Q, N_K), bool)},
    "bias of another length": {"bias": np.zeros((N_Q, N_K + 1))},
    "lengths in int64": {"query_seq_lengths": np.array([1, 2])},
    "one length too few": {"key_value_seq_lengths": np.array([1], np.int32)},
    "window of one": {"local_window_size": (1,)},
    "window open on a side": {"local_window_size": (None, 1)},
    "window as NumPy's integer": {"local_window_size": np.int64(1)},
    "unknown implementation": {"implementation": "cuda"},
    "cudnn without a device": {"implementation": "cudnn"},
    "value of another width": {"value": np.zeros((B, N_K, H_K, D + 1))},
    "query of five axes": {"query": np.zeros((1, B, N_Q, H, D))},
    "heads that do not divide": {"query": np.zeros((B, N_Q, 5, D))},
    "no key-value heads": {n: np.zeros((B, N_K, 0, D)) for n in ("key", "value")},
    "query in float32": {"query": np.zeros((B, N_Q, H, D), np.float32)},
    "scale of a word": {"scale": "a"},
}


@pytest.mark.parametrize("name", MISUSE)
def test_where_jax_errs_the_dialect_errs(name: str) -> None:
    jax_errs = compare(operands() | MISUSE[name])
    assert jax_errs


@pytest.mark.parametrize("shapes", [
    ((0, 3, 2, 4), (0, 5, 2, 4)), ((2, 0, 2, 4), (2, 5, 2, 4)), ((2, 3, 2, 4), (2, 0, 2, 4)),
    ((2, 3, 2, 0), (2, 5, 2, 0)), ((3, 2, 4), (5, 2, 4)), ((2, 4), (1, 4)), ((4,), (4,)),
    ((3, 2, 4), (1, 5, 2, 4)),
])  # fmt: skip
def test_shapes_without_rows_and_with_fewer_axes_are_as_in_jax(shapes: Any) -> None:
    rng = np.random.default_rng(2)
    drawn = [rng.normal(size=shape) for shape in (*shapes, shapes[1])]
    with np.errstate(all="ignore"):  # JAX divides by the root of no feature
        theirs = FUNCTION(*drawn)
    assert_same({"output": dot_product_attention(*drawn)}, {"output": np.asarray(theirs)}, CLOSE)


@pytest.mark.clause("OWN-ROUND2")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_format_agrees_with_jax(dtype: str) -> None:
    call = {n: a.astype(numpy_dtype(dtype)) for n, a in operands().items()}
    theirs = FUNCTION(**call, is_causal=True)
    ours = dot_product_attention(**call, is_causal=True)
    wide = ours.astype(np.float32), np.asarray(theirs).astype(np.float32)
    assert ours.dtype == theirs.dtype == numpy_dtype(dtype)
    assert np.abs(wide[0] - wide[1]).max() <= TOLERANCE[dtype]


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_forbidden_key_is_not_read_but_a_forbidden_value_is(name: str, number: float) -> None:
    call = operands() | {"is_causal": True}
    call[name][0, 3, 1, 2] = number
    theirs = np.asarray(FUNCTION(**call))
    ours = dot_product_attention(**call)
    assert np.isfinite(ours[0, :3, 2]).all() == (name == "key")
    assert_same({"output": ours}, {"output": theirs}, CLOSE)


@pytest.mark.clause("OWN-EMPTY1")
def test_an_emptied_row_attends_to_what_is_forbidden() -> None:
    query, key = np.ones((1, 1, 3)), np.ones((3, 1, 3))
    value, bias = np.eye(3)[:, None], np.array([0, 0, -np.inf])
    mask = np.array([False, False, True])
    output, residual = dot_product_attention(
        query, key, value, bias, mask[None], return_residual=True
    )
    np.testing.assert_array_equal(output[0, 0], [0.5, 0.5, 0])
    assert residual[0, 0] == LARGE_NEGATIVE


def test_the_signature_is_jaxs_own() -> None:
    theirs, ours = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (FUNCTION, dot_product_attention)
    )
    assert ours == theirs


def test_a_float64_softmax_of_jax_is_one_of_float32_as_the_exception_says() -> None:
    call = operands()
    difference = np.abs(np.asarray(FUNCTION(**call)) - dot_product_attention(**call)).max()
    assert 1e-12 < difference < 1e-6
    assert any(exception.startswith("float64") for exception in DIALECT.exceptions)


def test_one_key_beside_a_wider_bias_is_a_named_exception() -> None:
    call = {n: np.ones((1, 1, 1, 2)) for n in OPERANDS} | {"bias": np.zeros((1, 1, 1, 3))}
    assert np.asarray(FUNCTION(**call)).shape == (1, 1, 1, 2)
    assert isinstance(ours_or_error(lambda: dot_product_attention(**call)), Exception)
    assert any(exception.startswith("one key") for exception in DIALECT.exceptions)


def test_what_is_not_finite_is_a_named_exception() -> None:
    call = operands()
    assert np.isnan(np.asarray(FUNCTION(**call, scale=np.inf))).any()
    refused = ours_or_error(lambda: dot_product_attention(**call, scale=np.inf))
    assert isinstance(refused, Exception)
    call["value"][0, 3, 1, 2] = np.inf
    causal = call | {"is_causal": True}
    d_output = np.ones_like(call["query"])
    theirs = run_jax(causal, d_output)["d_query"]
    ours = dot_product_attention_backward(d_output, **causal).d_query
    assert np.isnan(theirs[0, 0, 2]).any() and np.isfinite(ours[0, 0, 2]).all()
    openings = ("scale not finite", "gradients where an operand")
    assert all(any(e.startswith(o) for e in DIALECT.exceptions) for o in openings)
