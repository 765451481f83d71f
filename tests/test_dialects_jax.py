"""The dialect of JAX's attention without JAX: each rule by hand."""

from __future__ import annotations

import numpy as np
import pytest

from refattn.dialects.jax_dpa import dot_product_attention, dot_product_attention_backward
from refattn.errors import RefattnError


def _draw(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def _jax(**options: object) -> np.ndarray:
    """Return the weights of JAX's function: queries are 0, and the value is the identity."""
    q, k, v = np.zeros((2, 1, 3)), np.zeros((3, 1, 3)), np.eye(3)[:, None]
    return dot_product_attention(q, k, v, **options)[:, 0]  # type: ignore[arg-type]


@pytest.mark.clause("OWN-EMPTY1", "OWN-MASK1", "OWN-LENGTH1")
def test_an_empty_row_of_jax_falls_back_to_the_forbidden_keys() -> None:
    mask = np.array([[True, False, True], [False, False, False]])
    third = np.full(3, 1 / 3)
    np.testing.assert_allclose(_jax(mask=mask), [[0.5, 0, 0.5], third])
    barred = np.array([-np.inf, 0.0, 0.0])
    # the first row may see the first key only, whose bias is -∞: the future is what it gets
    np.testing.assert_allclose(_jax(bias=barred, is_causal=True), [[0, 0.5, 0.5], [0, 1, 0]])
    assert np.isnan(_jax(bias=np.full(3, -np.inf))).all()
    lengths = np.array([1], np.int32)
    np.testing.assert_allclose(_jax(query_seq_lengths=lengths), [third, np.zeros(3)])


@pytest.mark.clause("OWN-WINDOW1", "OWN-CAUSAL1")
def test_a_window_of_jax_counts_its_ends_and_may_lie_beside_the_diagonal() -> None:
    np.testing.assert_array_equal(_jax(local_window_size=(0, 0)), np.eye(3)[:2])
    np.testing.assert_array_equal(_jax(local_window_size=(-1, 1)), np.eye(3)[1:])


@pytest.mark.clause("OWN-BACKWARD1", "OWN-EMPTY1")
def test_no_gradient_but_that_of_the_values_passes_a_row_that_fell_back() -> None:
    q, k, v = (_draw(2, 4, 2, 3, seed=seed) for seed in range(3))
    mask = np.zeros((4, 4), bool)
    found = dot_product_attention_backward(np.ones_like(q), q, k, v, _draw(4, 4), mask)
    assert not found.d_query.any() and not found.d_key.any() and not found.d_bias.any()
    np.testing.assert_allclose(found.d_value, 1)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"mask": np.ones((4, 4), np.int64)}, "mask has dtype int64, but it must be bool"),
        ({"mask": np.ones((4, 5), bool)}, "mask has shape"),
        ({"key": _draw(2, 4, 3, 3)}, "value has h_k=2, but key has h_k=3"),
        ({"query_seq_lengths": np.ones(2, np.int64)}, "lengths have dtype int64, but it must be"),
        ({"local_window_size": (1, None)}, "must be one integer or two"),
        ({"implementation": "cudnn"}, "implementation is 'cudnn', but it must be one of xla"),
        ({"scale": float("nan")}, "scale"),
        ({"d_output": _draw(2, 4, 2, 1)}, "d_output has shape"),
    ],
)
def test_misuse_of_jaxs_function_is_refused_in_one_sentence(changed, sentence) -> None:
    q = _draw(2, 4, 2, 3)
    with pytest.raises(RefattnError, match=sentence) as caught:
        dot_product_attention_backward(
            **({"d_output": q, "query": q, "key": q, "value": q} | changed)
        )
    assert "\n" not in str(caught.value)
