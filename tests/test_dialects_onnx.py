"""The dialects of ONNX's Attention without ONNX: each rule by hand."""

from __future__ import annotations

import numpy as np
import pytest

from refattn import attention_weights
from refattn.checks import OptionError
from refattn.dialects import onnx_attention, onnx_releases
from refattn.errors import RefattnError


def _draw(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def _onnx(opset: int, **inputs: object) -> np.ndarray:
    """Return the weights of ONNX's operator: queries are 0, and the values are the identity."""
    attend = getattr(onnx_attention, f"attention_{opset}")
    past = inputs.get("past_key")
    n_c = 0 if past is None else past.shape[2]
    inputs = {"past_value": np.eye(3 + n_c)[None, None, :n_c]} | inputs if n_c else inputs
    value = np.eye(3 + n_c)[None, None, n_c:]
    return attend(np.zeros((1, 1, 2, 4)), np.zeros((1, 1, 3, 4)), value, **inputs).Y[0, 0]


@pytest.mark.clause("OWN-CAUSAL1", "OWN-CACHE1", "OWN-LENGTH1")
def test_causal_attention_of_onnx_starts_after_the_keys_that_stand_before() -> None:
    np.testing.assert_array_equal(_onnx(23, is_causal=1), [[1, 0, 0], [0.5, 0.5, 0]])
    after_past = _onnx(23, is_causal=1, past_key=np.zeros((1, 1, 2, 4)))
    np.testing.assert_allclose(after_past, [[1 / 3] * 3 + [0] * 2, [1 / 4] * 4 + [0]])
    for opset in (24, 25):
        valid = _onnx(opset, is_causal=1, nonpad_kv_seqlen=np.array([3]))
        np.testing.assert_allclose(valid, [[1 / 2, 1 / 2, 0], [1 / 3] * 3])
        short = _onnx(opset, is_causal=1, nonpad_kv_seqlen=np.array([1]))
        np.testing.assert_array_equal(short, [[0, 0, 0], [1, 0, 0]])  # row 0 stands before key 0


@pytest.mark.clause("OWN-MASK1", "OWN-BIAS1", "OWN-EMPTY1", "OWN-WINDOW1")
def test_masks_of_onnx_are_added_or_read_by_their_dtype() -> None:
    mask = np.array([[True, False, True], [False, False, False]])
    for given in (mask, np.where(mask, 0.0, -np.inf)):
        np.testing.assert_array_equal(_onnx(23, attn_mask=given), [[0.5, 0, 0.5], [0, 0, 0]])
    whole = _onnx(23, attn_mask=mask.astype(np.int64))
    np.testing.assert_allclose(whole[0], np.exp([1, 0, 1]) / (2 * np.e + 1))
    two = np.ones((2, 2), bool)
    np.testing.assert_array_equal(_onnx(24, attn_mask=two), [[0.5, 0.5, 0]] * 2)
    np.testing.assert_array_equal(_onnx(25, left_window_size=0, right_window_size=0), np.eye(2, 3))


@pytest.mark.clause("OWN-SOFTCAP1", "OWN-WEIGHTS1")
def test_each_mode_of_onnx_shows_a_later_stage() -> None:
    q, k, v = (_draw(1, 2, 3, 4, seed=seed) for seed in range(3))
    call = {"Q": q, "K": k, "V": v, "attn_mask": np.tri(3, dtype=bool), "softcap": 0.5}
    stages = [
        onnx_attention.attention_25(**call, qk_matmul_output_mode=mode).qk_matmul_output
        for mode in range(4)
    ]
    raw = q @ k.swapaxes(-1, -2) / 2
    np.testing.assert_allclose(stages[0], raw, rtol=1e-14)
    np.testing.assert_allclose(stages[1], 0.5 * np.tanh(raw / 0.5), rtol=1e-14)
    np.testing.assert_array_equal(np.isneginf(stages[2][0, 0]), ~np.tri(3, dtype=bool))
    np.testing.assert_allclose(
        stages[3], attention_weights(q, k, v, softcap=0.5, causal=True), rtol=1e-14
    )


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"attn_mask": np.ones((2, 2), bool)}, "attn_mask has 2 keys, but there are 3"),
        ({"attn_mask": np.ones((4, 3), bool)}, "attn_mask has shape"),
        ({"attn_mask": np.ones((2, 3), complex)}, "must be bool or a number"),
        ({"is_causal": 2}, "is_causal is 2, but it must be one of 0, 1"),
        ({"qk_matmul_output_mode": 4}, "must be one of 0, 1, 2, 3"),
        ({"softmax_precision": 6}, "softmax_precision is 6"),
        ({"scale": -1.0}, "its root is taken"),
        ({"q_num_heads": 1, "kv_num_heads": 1}, "Q has 4 axes and 2 of q_num_heads"),
        ({"past_value": np.zeros((1, 1, 1, 3))}, "past_key is absent, but past_value is given"),
    ],
)
def test_misuse_of_onnxs_operator_is_refused_in_one_sentence(changed, sentence) -> None:
    with pytest.raises(RefattnError, match=sentence) as caught:
        _onnx(23, **changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"nonpad_kv_seqlen": np.array([1], np.int32)}, "must be int64"),
        ({"nonpad_kv_seqlen": np.array([1, 2])}, "b=2"),
        (
            {"nonpad_kv_seqlen": np.array([1]), "past_key": np.zeros((1, 1, 1, 4))},
            "a cache is one of them",
        ),
        ({"left_window_size": -2}, "must be -1 or a count"),
    ],
)
def test_misuse_of_caches_and_windows_is_refused_in_one_sentence(changed, sentence) -> None:
    with pytest.raises(RefattnError, match=sentence) as caught:
        _onnx(25, **changed)
    assert "\n" not in str(caught.value)


def _release(name: str, mask: object = None, *past: object, **attributes: object) -> np.ndarray:
    attend = getattr(onnx_releases, f"attention_23_{name}")
    q, k = np.ones((1, 1, 1, 4)), np.array([[1.0] * 4, [0.0] * 4])[None, None]
    return attend(q, k, np.eye(2)[None, None], mask, *past, **attributes).Y[0, 0, 0]


@pytest.mark.clause("OWN-SOFTCAP1", "OWN-EMPTY1")
@pytest.mark.parametrize(("name", "leak"), [("1_18", True), ("1_20", True), ("1_22", False)])
def test_a_softcap_that_comes_last_leaves_forbidden_keys_a_weight(name: str, leak: bool) -> None:
    mask = np.array([[True, False]])
    weights = _release(name, mask, softcap=0.5)
    capped = 0.5 * np.tanh(2 / 0.5)
    np.testing.assert_allclose(weights[1], 1 / (1 + np.exp(capped + 0.5)) if leak else 0)
    assert np.isnan(_release(name, ~mask & mask)).all()


@pytest.mark.clause("OWN-GQA1", "OWN-CAUSAL1")
def test_1_18_tiles_heads_and_forgets_the_past() -> None:
    q, k = np.zeros((1, 4, 1, 2)), np.zeros((1, 2, 1, 2))
    v = np.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    found = {n: getattr(onnx_releases, f"attention_23_{n}")(q, k, v).Y for n in ("1_18", "1_20")}
    assert found["1_18"].ravel().tolist() == [10, 20, 10, 20]
    assert found["1_20"].ravel().tolist() == [10, 10, 20, 20]
    past = np.zeros((1, 1, 3, 4)), np.zeros((1, 1, 3, 2))
    # in 1.18 it sees the first key only, whose value is 0
    assert not _release("1_18", None, *past, is_causal=1).any()
    assert _release("1_20", None, *past, is_causal=1).any()


@pytest.mark.clause("OWN-MASK1")
def test_a_mask_beside_causal_attention_was_refused_and_then_nan() -> None:
    mask = np.ones((1, 2), bool)
    with pytest.raises(OptionError, match=r"onnx 1\.18 takes one of them"):
        _release("1_18", mask, is_causal=1)
    for name in ("1_20", "1_22"):
        assert np.isnan(_release(name, mask, is_causal=1)).all()
