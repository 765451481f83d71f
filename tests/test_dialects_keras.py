"""Keras's dialects without Keras: each rule by hand, and gradients as slopes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refattn import cli, multihead_attention
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.dialects import find
from refattn.dialects.conventions import differences
from refattn.dialects.keras2_mha import MultiHeadAttention as Keras2
from refattn.dialects.keras3_gqa import GroupQueryAttention
from refattn.dialects.keras3_mha import MultiHeadAttention as Keras3
from refattn.errors import RefattnError

B, N_Q, N_K, E = 2, 5, 7, 3

LAYERS = {
    "keras3": lambda **named: Keras3(2, 4, **named),
    "keras3_gqa": lambda **named: GroupQueryAttention(4, 6, 2, **named),
    "keras2": lambda **named: Keras2(2, 4, **named),
}
"""A layer of each kind."""


def _draw(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _weighted(layer: Any, x: np.ndarray, y: np.ndarray, z: np.ndarray | None = None) -> Any:
    shapes = layer.weight_shapes(x.shape, y.shape, None if z is None else z.shape)
    return layer.set_weights([_draw(*s, seed=9 + i) for i, s in enumerate(shapes.values())])


def _transparent(layer: Any, n: int) -> Any:
    """Return a layer of one head whose logits are 0 and whose values pass as they are."""
    nothing, same = np.zeros((n, 1, n)), np.eye(n)
    return layer.set_weights([nothing, nothing, same[:, None, :], same[None]])


def _weights(layer: Any, n: int, **options: Any) -> np.ndarray:
    """Return the weights of a transparent layer: its values are the identity."""
    x = np.eye(n)[None]
    output = _transparent(layer, n)(x, x, **options)
    return np.asarray(output[0] if isinstance(output, tuple) else output)[0]


EMPTY = np.array([[[True, False, True], [False, False, False], [True, True, False]]])


@pytest.mark.clause("OWN-MASK1", "OWN-EMPTY1", "OWN-BIAS1")
def test_true_attends_and_an_empty_row_is_the_mean_unless_scores_or_dropout() -> None:
    fused = _weights(Keras3(1, 3, use_bias=False), 3, attention_mask=EMPTY)
    np.testing.assert_allclose(fused, [[0.5, 0, 0.5], [1 / 3] * 3, [0.5, 0.5, 0]], rtol=1e-6)
    dropping = Keras3(1, 3, use_bias=False, dropout=0.5)
    scored = {"attention_mask": EMPTY, "return_attention_scores": True}
    for weights in (
        _weights(dropping, 3, attention_mask=EMPTY),
        _weights(Keras3(1, 3, use_bias=False), 3, **scored),
    ):
        np.testing.assert_array_equal(weights, [[0.5, 0, 0.5], [0, 0, 0], [0.5, 0.5, 0]])


@pytest.mark.clause("OWN-EMPTY1", "OWN-BIAS1")
def test_in_keras_2_an_empty_row_is_as_unmasked_or_with_robust_masking_the_mean() -> None:
    x = _draw(1, 3, E)
    nothing, everything = np.zeros((1, 3, 3), bool), np.ones((1, 3, 3), bool)
    layer = _weighted(Keras2(2, 4), x, x)
    told = {"return_attention_scores": True}
    _, sunk = layer(x, x, attention_mask=nothing, **told)
    _, plain = layer(x, x, attention_mask=everything, **told)
    np.testing.assert_allclose(sunk, plain, rtol=1e-6)  # of 1e9, float64 holds 1e-7
    assert np.ptp(plain) > 0.1
    robust = _weighted(Keras2(2, 4, softmax_robust_masking=True), x, x)
    _, mean = robust(x, x, attention_mask=nothing, **told)
    np.testing.assert_allclose(mean, 1 / 3, rtol=1e-15)


@pytest.mark.clause("OWN-BIAS1")
@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.5), ("float64", 1 / (1 + np.exp(-20)))])
def test_beside_1e9_float32_holds_multiples_of_64_only(dtype: str, share: float) -> None:
    query, key, value = (np.array([[[x] for x in xs]], dtype) for xs in ([1], [0, 20], [0, 1]))
    layer = Keras2(1, 1, use_bias=False).set_weights([np.ones((1, 1, 1), dtype)] * 4)
    nothing = np.zeros((1, 1, 2), bool)
    np.testing.assert_allclose(layer(query, value, key, nothing), [[[share]]], rtol=1e-12)


@pytest.mark.clause("OWN-MASK1")
def test_numbers_as_a_mask_are_read_in_four_ways() -> None:
    numbers = np.array([[[0.3, 0.0, 2.0]]])
    halves = [[0.5, 0, 0.5]]
    fused = Keras3(1, 3, use_bias=False)
    np.testing.assert_allclose(_weights(fused, 3, attention_mask=numbers)[:1], halves, rtol=1e-6)
    groups = GroupQueryAttention(3, 1, 1, use_bias=False)
    np.testing.assert_allclose(_weights(groups, 3, attention_mask=numbers)[:1], halves, rtol=1e-6)
    dropping = GroupQueryAttention(3, 1, 1, use_bias=False, dropout=0.5)
    np.testing.assert_array_equal(_weights(dropping, 3, attention_mask=numbers)[0], [0, 0, 1])
    np.testing.assert_array_equal(
        _weights(dropping, 3, attention_mask=numbers, value_mask=np.ones((1, 3)))[0], [0.5, 0, 0.5]
    )
    # -1e9 times 0.7, 1 and -1: the last one wins
    keras2 = Keras2(1, 3, use_bias=False)
    np.testing.assert_array_equal(_weights(keras2, 3, attention_mask=numbers)[0], [0, 0, 1])
    beside = {"value_mask": np.ones((1, 3), bool), "attention_mask": -numbers}
    np.testing.assert_array_equal(_weights(keras2, 3, **beside)[0], [0.5, 0, 0.5])


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("robust", [False, True])
def test_a_forbidden_key_is_not_read_and_a_forbidden_value_is_multiplied_by_0(robust: bool) -> None:
    x, y, z = np.zeros((1, 2, 3)), np.eye(3)[None], np.eye(3)[None].copy()
    mask = np.array([[[True, True, False], [False, False, False]]])
    layers = (
        Keras2(1, 3, use_bias=False, softmax_robust_masking=True),
        Keras3(1, 3, use_bias=False, dropout=0.5),
    )
    layer, z[0, 2] = _transparent(layers[0 if robust else 1], 3), np.nan
    # two rows: half of each allowed value; none
    row = layer(x, y, z, attention_mask=mask)[0, 0]
    np.testing.assert_array_equal(row, [0.5, 0.5, 0])
    assert np.isnan(layer(x, z, y, attention_mask=mask)).all()


@pytest.mark.clause("OWN-CAUSAL1", "OWN-WINDOW1")
def test_causal_starts_at_the_top_left_and_a_window_excludes_its_end() -> None:
    layer = Keras3(1, 4, use_bias=False, sliding_window=2)
    causal = _weights(layer, 4, use_causal_mask=True) > 0
    np.testing.assert_array_equal(causal, np.tri(4, dtype=bool) & ~np.tri(4, k=-2, dtype=bool))
    both_sides = _weights(layer, 4) > 0
    np.testing.assert_array_equal(both_sides, causal | causal.T)


@pytest.mark.clause("VAS-S322a", "VAS-S322b")
def test_without_options_a_layer_is_the_reference_s_multi_head_attention() -> None:
    x, y = _draw(B, N_Q, E), _draw(B, N_K, E + 1, seed=2)
    layer = _weighted(Keras3(2, 4, value_dim=5, use_bias=False, dropout=0.5), x, y)
    kernels = dict(zip(("w_query", "w_key", "w_value"), layer.get_weights(), strict=False))
    by_head = {name: np.swapaxes(kernel, 0, 1) for name, kernel in kernels.items()}
    expected = multihead_attention(x, y, **by_head, w_output=layer.get_weights()[3])
    np.testing.assert_allclose(layer(x, y), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.clause("OWN-GATE1")
def test_a_gate_multiplies_what_the_heads_return() -> None:
    x = _draw(B, N_Q, E)
    gated = _weighted(Keras3(2, 4, use_gate=True, dropout=0.5), x, x)
    named = dict(gated.weights)
    plain = Keras3(2, 4, dropout=0.5, output_shape=(2, 4))
    # an output kernel that is the identity returns the heads as they are
    same = np.eye(8).reshape(2, 4, 2, 4)
    ungated = [named[n] for n in named if not n.startswith(("gate", "attention"))]
    heads = plain.set_weights([*ungated, same, np.zeros((2, 4))])(x, x)
    gate = np.einsum("bne,ehd->bnhd", x, named["gate/kernel"]) + named["gate/bias"]
    heads = heads / (1 + np.exp(-gate))
    out = np.einsum("bnhd,hde->bne", heads, named["attention_output/kernel"])
    expected = out + named["attention_output/bias"]
    np.testing.assert_allclose(gated(x, x), expected, rtol=1e-12, atol=1e-12)


def test_the_fused_form_computes_in_float32_whatever_the_dtype() -> None:
    x = _draw(B, N_Q, E)
    plain, exact = (_weighted(Keras3(2, 4, dropout=rate), x, x) for rate in (0.0, 0.5))
    difference = np.max(np.abs(plain(x, x) - exact(x, x)))
    assert plain(x, x).dtype == np.float64
    assert 1e-9 < difference < 1e-5


@pytest.mark.clause("OWN-GQA1")
def test_grouped_queries_read_their_group_s_keys_and_values() -> None:
    x = _draw(B, N_Q, E)
    groups = _weighted(GroupQueryAttention(4, 6, 2), x, x)
    query, q_bias, key, k_bias, value, v_bias, out, o_bias = groups.get_weights()
    apart = [np.repeat(w, 3, axis=-2) for w in (key, k_bias, value, v_bias)]
    heads = Keras3(6, 4).set_weights([query, q_bias, *apart, out, o_bias])
    np.testing.assert_allclose(groups(x, x), heads(x, x), rtol=1e-12)


@pytest.mark.clause("OWN-WEIGHTS1", "OWN-DROPOUT1")
def test_returned_scores_are_those_before_dropout() -> None:
    x = _draw(B, N_Q, E)
    keep = _draw(B, 2, N_Q, N_Q) > 0
    layer = _weighted(Keras3(2, 4, dropout=0.5), x, x)
    told = {"return_attention_scores": True}
    output, scores = layer(x, x, training=True, keep=keep, **told)
    plain, same = layer(x, x, **told)
    np.testing.assert_array_equal(scores, same)
    assert np.abs(output - plain).max() > 0.1


@pytest.mark.clause("OWN-MASK1")
def test_only_the_mask_that_hangs_on_the_query_is_looked_at() -> None:
    x = _draw(B, N_Q, E)
    layer, mask = _weighted(Keras3(2, 4, dropout=0.5), x, x), np.ones((B, N_Q), bool)
    mask[:, 1:] = False
    np.testing.assert_array_equal(layer(x, x, query_mask=mask), layer(x, x))
    hung = layer(x, x, attached_query_mask=mask)
    bias = layer.weights["attention_output/bias"]
    np.testing.assert_array_equal(hung[:, 1:], np.broadcast_to(bias, (B, N_Q - 1, E)))
    groups = _weighted(GroupQueryAttention(4, 6, 2, dropout=0.5), x, x)
    assert np.abs(groups(x, x, query_mask=mask) - groups(x, x)).max() > 0.1


@pytest.mark.clause("OWN-AXES1")
def test_axes_that_are_attended_jointly_are_one_of_their_product() -> None:
    x = _draw(B, 2, 3, E)
    layer = _weighted(Keras3(2, 4, dropout=0.5), x, x)
    flat = x.reshape(B, 6, E)
    output, scores = layer(x, x, return_attention_scores=True)
    np.testing.assert_allclose(output.reshape(B, 6, E), layer(flat, flat), rtol=1e-13)
    assert scores.shape == (B, 2, 2, 3, 2, 3)
    rows = _weighted(Keras3(2, 4, dropout=0.5, attention_axes=2), x, x)
    apart = layer(x[:, 1], x[:, 1])
    np.testing.assert_allclose(rows(x, x)[:, 1], apart, rtol=1e-12)


@pytest.mark.clause("OWN-BACKWARD1", "OWN-GATE1", "OWN-WEIGHTS1", "OWN-DROPOUT1")
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_the_slopes_of_a_loss_on_output_and_scores(kind: str) -> None:
    gate = {} if kind == "keras2" else {"use_gate": True}
    x, y, z = (_draw(B, n, E, seed=n + i) for i, n in enumerate((N_Q, N_K, N_K)))
    layer = _weighted(LAYERS[kind](dropout=0.5, **gate), x, y, z)
    told: dict[str, Any] = {"return_attention_scores": True, "training": True}
    told["attention_mask"] = _draw(B, N_Q, N_K, seed=5) > -1
    heads = layer.form.heads
    told["keep"] = _draw(B, heads, N_Q, N_K, seed=6) > 0
    output, scores = layer(x, y, z, **told)
    d_output, d_scores = _draw(*output.shape, seed=7), _draw(*scores.shape, seed=8)
    found = layer.backward(d_output, x, y, z, d_scores=d_scores, **told)

    def loss(weights: list[np.ndarray], *inputs: np.ndarray) -> float:
        output, scores = layer.set_weights(weights)(*inputs, **told)
        return float(np.sum(output * d_output) + np.sum(scores * d_scores))

    step, weights, inputs = 1e-6, layer.get_weights(), [x, y, z]
    ways = [_draw(*a.shape, seed=20 + i) for i, a in enumerate([*weights, *inputs])]
    gradients = [*found.d_weights, found.d_query, found.d_value, found.d_key]
    for i, (way, gradient) in enumerate(zip(ways, gradients, strict=True)):
        ends = []
        for sign in (-1, 1):
            moved = [*weights, *inputs]
            moved[i] = moved[i] + sign * step * way
            ends.append(loss(moved[: len(weights)], *moved[len(weights) :]))
        slope, expected = (ends[1] - ends[0]) / (2 * step), np.sum(way * gradient)
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-6)


def test_without_a_key_its_gradient_is_the_value_s() -> None:
    x, y = _draw(B, N_Q, E), _draw(B, N_K, E, seed=2)
    layer = _weighted(Keras3(2, 4, dropout=0.5), x, y)
    d_output = _draw(B, N_Q, E, seed=3)
    alone, apart = layer.backward(d_output, x, y), layer.backward(d_output, x, y, y)
    assert alone.d_key is None and apart.d_key is not None
    np.testing.assert_allclose(alone.d_value, apart.d_value + apart.d_key, rtol=1e-14)


def test_weights_come_and_go_in_kerass_order() -> None:
    layer = Keras3(2, 4, value_dim=5, output_shape=(6, 2), use_gate=True)
    shapes = layer.weight_shapes((B, N_Q, 3), (B, N_K, 7), (B, N_K, 8))
    assert shapes == {
        "query/kernel": (3, 2, 4), "query/bias": (2, 4), "key/kernel": (8, 2, 4),
        "key/bias": (2, 4), "gate/kernel": (3, 2, 5), "gate/bias": (2, 5),
        "value/kernel": (7, 2, 5), "value/bias": (2, 5),
        "attention_output/kernel": (2, 5, 6, 2), "attention_output/bias": (6, 2),
    }  # fmt: skip
    assert list(shapes)[:4] == ["query/kernel", "query/bias", "key/kernel", "key/bias"]
    weights = [_draw(*shape) for shape in shapes.values()]
    layer = layer.set_weights(weights)
    taken = layer.get_weights()
    taken[0] += 1  # a copy: the layer keeps its own
    np.testing.assert_array_equal(layer.get_weights()[0], weights[0])
    with pytest.raises(OptionError, match="weights holds 9 arrays, but the layer has query/kernel"):
        layer.set_weights(weights[:-1])
    with pytest.raises(ShapeError, match="value/bias has"):
        layer.set_weights([*weights[:7], weights[7].T, *weights[8:]])
    with pytest.raises(DtypeError, match="float32"):
        layer.set_weights([*weights[:-1], weights[-1].astype(np.float32)])
    with pytest.raises(OptionError, match="set_weights gives them"):
        Keras3(2, 4)(_draw(B, N_Q, 3), _draw(B, N_K, 7))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"query": _draw(B, N_Q, E + 1)}, ShapeError, "query has"),
        ({"query": _draw(B, E)}, (ShapeError, OptionError), "axes"),
        ({"key": _draw(B, N_K + 1, E)}, ShapeError, "key has lengths"),
        ({"value": _draw(B + 1, N_K, E)}, ShapeError, "batch axes"),
        ({"value": np.ones((B, N_K, E), int)}, DtypeError, "must be one of"),
        ({"value": [[1.0]]}, DtypeError, "value is a list"),
        ({"attention_mask": np.ones(N_K, bool)}, ShapeError, "attention_mask has shape"),
        ({"attention_mask": np.ones((4, N_K), bool)}, ShapeError, "attention_mask has shape"),
        ({"value_mask": np.ones((B, 4), bool), "use_causal_mask": True}, ShapeError, "broadcast"),
        ({"training": 1}, OptionError, "True or False"),
        ({"use_causal_mask": None}, OptionError, "True or False"),
        ({"training": True}, OptionError, "keep is absent"),
        ({"training": True, "keep": np.ones((4, 4), bool)}, ShapeError, "keep has shape"),
    ],
)
def test_misuse_is_refused_in_one_sentence(kind, changed, error, sentence) -> None:
    inputs = {"query": _draw(B, N_Q, E), "value": _draw(B, N_K, E)}
    layer = _weighted(LAYERS[kind](dropout=0.5), *inputs.values())
    with pytest.raises(error, match=sentence) as caught:
        layer(**(inputs | changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [
    lambda: Keras3(0, 4), lambda: Keras3(2, 4, value_dim=0), lambda: Keras3(2, 4, dropout=2.0),
    lambda: Keras3(2, 4, sliding_window=0), lambda: Keras3(2, 4, output_shape="7"),
    lambda: Keras3(2, 4, output_shape=(2, 0)), lambda: Keras3(2, 4, use_gate=1),
    lambda: Keras3(2, 4, flash_attention=True, dropout=0.5), lambda: Keras2(2, -4),
    lambda: Keras2(2, 4, softmax_robust_masking=1), lambda: GroupQueryAttention(4, 5, 2),
    lambda: GroupQueryAttention(0, 4, 2), lambda: GroupQueryAttention(4, 4, 2, sliding_window=-1),
])  # fmt: skip
def test_a_layer_that_keras_would_not_make_is_refused(make: Any) -> None:
    with pytest.raises(RefattnError):
        make()


@pytest.mark.parametrize("axes", [0, 3, -1, (1, 1), (), "1", (1.0,)])
def test_attention_axes_lie_between_batch_and_features(axes: Any) -> None:
    x = _draw(B, N_Q, 3, E)
    layer = _weighted(Keras3(2, 4, attention_axes=axes), x, x)
    with pytest.raises(OptionError, match="attention_axes is"):
        layer(x, x)
    with pytest.raises(OptionError, match="must count from 0"):
        _weighted(Keras2(2, 4, attention_axes=-2), x, x)(x, x)


def test_cotangents_that_do_not_fit_are_refused() -> None:
    x = _draw(B, N_Q, E)
    layer = _weighted(Keras3(2, 4, flash_attention=True), x, x)
    with pytest.raises(ShapeError, match="d_output has"):
        layer.backward(_draw(B, N_Q, E + 1), x, x)
    with pytest.raises(DtypeError, match="float32"):
        layer.backward(_draw(B, N_Q, E).astype(np.float32), x, x)
    with pytest.raises(OptionError, match="d_scores is given"):
        layer.backward(_draw(B, N_Q, E), x, x, d_scores=_draw(B, 2, N_Q, N_Q))
    with pytest.raises(OptionError, match="flash_attention returns none"):
        layer(x, x, return_attention_scores=True)


def test_the_command_compares_torch_with_keras(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dialects", "diff", "torch_mha", "keras3_mha"]) == 0
    printed = capsys.readouterr().out
    found = differences(find("torch_mha"), find("keras3_mha"))
    assert f"torch_mha_2_13 and keras_mha_3_15 differ in {len(found)} of" in printed
    assert found["argument_order"] == ("query key value", "query value key")
    assert found["mask_polarity"] == ("True ignores", "True attends")
    assert {"default_scale", "head_map", "sinks", "dropout"}.isdisjoint(found)
