"""The reference beside jax.nn.dot_product_attention in float32, forward and backward.

Its layout is (b, n, h, d). A row that its mask empties is uniform over all keys, forbidden ones
included, with a finite logsumexp; a row beyond a query length is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optional import require
from peers.agreement import Arrays, allowances, allowed_between, assert_agree, run_ours
from refattn.attention import attention

jax = require("jax")

B, H, H_K, N_Q, N_K, D = 2, 6, 3, 5, 7, 11
"""Sizes of every test; jax needs d_v = d_k."""


def _arrays(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, H, N_Q, D), "key": (B, H_K, N_K, D), "value": (B, H_K, N_K, D)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def _mask(seed: int, *, empty: bool) -> np.ndarray:
    mask = np.random.default_rng(seed).random((B, 1, N_Q, N_K)) < 0.6
    mask[..., 0] = True  # no row is empty by chance, even if causal
    if empty:
        mask[:, :, 2] = False
    return mask


def _swap(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, 1, 2)


def _run_jax(arrays: Arrays, d_output: np.ndarray, **options: Any) -> Arrays:
    def attend(leaves: Arrays) -> Any:
        return jax.nn.dot_product_attention(**leaves, **options)

    # a bias is (b, h, n_q, n_k) in jax too
    leaves = {n: a if n == "bias" else _swap(a) for n, a in arrays.items()}
    output, pull = jax.vjp(attend, leaves)
    (gradients,) = pull(jax.numpy.asarray(_swap(d_output)))
    found = {f"d_{name}": np.asarray(g) for name, g in gradients.items()}
    found = {n: g if n == "d_bias" else _swap(g) for n, g in found.items()}
    return {"output": _swap(np.asarray(output)), **found}


MASK, EMPTY = _mask(1, empty=False), _mask(2, empty=True)
LENGTHS = np.array([5, 2], dtype=np.int32)  # jax refuses int64 where its 64 bits are switched on

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({"scale": -0.3}, {"scale": -0.3}),
    "causal": ({"is_causal": True}, {"causal": True}),
    "mask": ({"mask": MASK}, {"mask": MASK}),
    "mask and causal": ({"mask": MASK, "is_causal": True}, {"mask": MASK, "causal": True}),
    "empty rows": ({"mask": EMPTY}, {"mask": EMPTY, "empty_row": "uniform"}),
    "window": ({"local_window_size": (2, 1)}, {"window": (2, 1)}),
    "key lengths": ({"key_value_seq_lengths": LENGTHS}, {"key_lengths": LENGTHS}),
    "query lengths": ({"query_seq_lengths": LENGTHS}, {"query_lengths": LENGTHS}),
}
"""What jax is asked, and the same in our words."""


@pytest.mark.clause(
    "VAS-EQ1", "OWN-SCALE1", "OWN-MASK1", "OWN-CAUSAL1", "OWN-WINDOW1", "OWN-GQA1", "OWN-LENGTH1",
    "OWN-EMPTY1", "OWN-BACKWARD1",
)  # fmt: skip
@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_agree_with_jax(name: str) -> None:
    asked, same = OPTIONS[name]
    arrays = _arrays(17)
    d_output = np.random.default_rng(18).normal(size=(B, H, N_Q, D)).astype(np.float32)
    ours, theirs = run_ours(arrays, d_output, **same), _run_jax(arrays, d_output, **asked)
    assert_agree(ours, theirs, allowances(arrays, d_output, **same))


@pytest.mark.clause("OWN-BIAS1", "OWN-BACKWARD1")
def test_a_bias_and_its_gradient_agree_with_jax() -> None:
    rng = np.random.default_rng(19)
    arrays = _arrays(20) | {"bias": rng.normal(size=(1, H, N_Q, N_K)).astype(np.float32)}
    d_output = rng.normal(size=(B, H, N_Q, D)).astype(np.float32)
    ours, theirs = run_ours(arrays, d_output), _run_jax(arrays, d_output)
    assert_agree(ours, theirs, allowances(arrays, d_output))


@pytest.mark.clause("OWN-LSE1", "OWN-EMPTY1")
def test_the_logsumexp_agrees_with_jax_but_for_empty_rows() -> None:
    arrays = _arrays(21)
    swapped = {name: _swap(array) for name, array in arrays.items()}
    _, theirs = jax.nn.dot_product_attention(**swapped, mask=EMPTY, return_residual=True)
    theirs = _swap(np.asarray(theirs))
    ours = attention(**arrays, mask=EMPTY).logsumexp
    full = np.arange(N_Q) != 2
    allowed = allowed_between("attention", arrays | {"mask": EMPTY}, {}, {}, "float32")["logsumexp"]
    assert (np.abs(theirs - ours)[..., full] <= allowed[..., full]).all()
    assert (ours[..., 2] == -np.inf).all()
    assert (theirs[..., 2] < -1e38).all() and np.isfinite(theirs).all()
