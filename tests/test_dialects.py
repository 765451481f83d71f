"""Dialects without the systems they speak of: the list, the command, and each rule by hand."""

from __future__ import annotations

import importlib
import json
import warnings

import numpy as np
import pytest

from refattn import attention, attention_weights, cli
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.dialects import DIALECTS, find
from refattn.dialects.conventions import CONVENTIONS, choices, differences, in_words
from refattn.dialects.torch_mha_module import MultiheadAttention
from refattn.dialects.torch_sdpa import (
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
)
from refattn.errors import RefattnError
from refattn.spec_text import load_clauses

B, H, N_Q, N_K, D = 2, 3, 5, 7, 4

E_DIM = H * D


def _draw(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _operands(*lead: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sizes = ((N_Q, D), (N_K, D), (N_K, D + 2))
    return tuple(_draw(*lead, *size, seed=i) for i, size in enumerate(sizes))  # type: ignore[return-value]


def _module(**named: object) -> MultiheadAttention:
    module = MultiheadAttention(E_DIM, H, **named)  # type: ignore[arg-type]
    state = {n: _draw(*s, seed=9 + i) for i, (n, s) in enumerate(module.shapes().items())}
    return module.load_state_dict(state)


def _weights(**options: object) -> np.ndarray:
    """Return the weights of SDPA: queries are 0, and the value is the identity."""
    q, k, v = np.zeros((2, D)), np.zeros((3, D)), np.eye(3)
    return scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
def test_a_dialect_chooses_on_every_axis_among_its_values(dialect) -> None:
    assert set(dialect.conventions) == set(CONVENTIONS)
    for axis, choice in dialect.conventions.items():
        assert set(choices(choice)) <= set(CONVENTIONS[axis].values), axis


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
def test_the_functions_of_a_dialect_exist(dialect) -> None:
    for name in dialect.functions:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))


def test_every_convention_names_its_clause_and_a_choice() -> None:
    clauses = load_clauses()
    for name, convention in CONVENTIONS.items():
        assert name == convention.name
        assert convention.clause in clauses
        assert len(set(convention.values)) == len(convention.values) >= 2
        assert convention.sentence.endswith(".")


def test_a_dialect_is_found_by_name_and_by_alias() -> None:
    assert find("torch_sdpa") is find("torch_sdpa_2_13") is DIALECTS["torch_sdpa_2_13"]
    with pytest.raises(OptionError, match="dialect is 'tensorflow', but it must be one of torch"):
        find("tensorflow")


def test_differences_are_the_axes_on_which_choices_differ() -> None:
    one, other = find("torch_sdpa"), find("torch_mha")
    found = differences(one, other)
    assert found["mask_polarity"] == ("True attends", "True ignores")
    assert "default_scale" not in found
    assert differences(one, one) == {}
    assert in_words(found["empty_row"][1]) == (
        "nan (need_weights), zero (no weights), nan (inference)"
    )


@pytest.mark.parametrize("one", DIALECTS)
def test_a_difference_is_seen_from_both_sides_for_every_pair(one: str) -> None:
    for other in DIALECTS:
        there, back = differences(find(one), find(other)), differences(find(other), find(one))
        assert {axis: (b, a) for axis, (a, b) in there.items()} == back
        for axis in CONVENTIONS:
            told = [set(choices(find(name).conventions[axis])) for name in (one, other)]
            # a choice that is the same whatever the circumstance is written as one word
            assert (axis in there) or told[0] == told[1]
            assert len(told[0]) > 1 or isinstance(find(one).conventions[axis], str), (one, axis)


def test_the_command_lists_shows_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dialects", "list", "--json"]) == 0
    assert {d["name"] for d in json.loads(capsys.readouterr().out)} == set(DIALECTS)
    assert cli.main(["dialects", "show", "torch_mha", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["conventions"]["mask_polarity"] == {
        "choice": "True ignores",
        "clause": "OWN-MASK1",
    }
    assert cli.main(["dialects", "show", "torch_sdpa"]) == 0
    assert "exception: is_causal with scale" in capsys.readouterr().out
    assert cli.main(["dialects", "diff", "torch_sdpa", "torch_mha", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mask_polarity"]["torch_mha_2_13"] == "True ignores"
    assert cli.main(["dialects", "diff", "torch_sdpa", "torch_mha_2_13"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"differ in {len(found)} of {len(CONVENTIONS)} conventions")


def test_an_unknown_dialect_is_one_sentence_and_bad_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["dialects", "diff", "torch_sdpa", "keras"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "dialect is 'keras', but it must be one of" in captured.err


@pytest.mark.clause("OWN-SCALE1", "OWN-CAUSAL1", "OWN-BIAS1")
def test_the_dialect_is_the_reference_under_its_conventions() -> None:
    q, k, v = _operands(B, H)
    bias = _draw(N_Q, N_K)
    ours = scaled_dot_product_attention(q, k, v, bias, scale=0.3)
    np.testing.assert_array_equal(
        ours, attention(q, k, v, bias=bias, scale=0.3, masked="add").output
    )
    causal = scaled_dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_array_equal(causal, attention(q, k, v, causal=True, masked="add").output)


@pytest.mark.clause("OWN-MASK1", "OWN-EMPTY1")
def test_true_attends_and_an_empty_row_is_zero_in_sdpa() -> None:
    mask = np.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(_weights(attn_mask=mask), [[0.5, 0, 0.5], [0, 0, 0]])
    as_floats = np.where(mask, 0.0, -np.inf)
    np.testing.assert_array_equal(_weights(attn_mask=as_floats), [[0.5, 0, 0.5], [0, 0, 0]])


@pytest.mark.clause("OWN-CAUSAL1")
def test_causal_attention_starts_at_the_top_left_in_sdpa() -> None:
    np.testing.assert_array_equal(_weights(is_causal=True), [[1, 0, 0], [0.5, 0.5, 0]])


@pytest.mark.clause("OWN-BATCH1")
def test_leading_axes_broadcast_and_their_gradients_are_summed() -> None:
    q, k, v = _operands()
    k = np.stack([k, 2 * k])
    apart = [scaled_dot_product_attention(q, one, v) for one in k]
    np.testing.assert_allclose(scaled_dot_product_attention(q, k, v), apart, rtol=1e-14)
    d_output = _draw(2, N_Q, D + 2)
    together = scaled_dot_product_attention_backward(d_output, q, k, v)
    each = [
        scaled_dot_product_attention_backward(d, q, one, v)
        for d, one in zip(d_output, k, strict=True)
    ]
    np.testing.assert_allclose(together.d_query, each[0].d_query + each[1].d_query, rtol=1e-12)
    np.testing.assert_allclose(together.d_value, each[0].d_value + each[1].d_value, rtol=1e-12)
    np.testing.assert_allclose(together.d_key[1], each[1].d_key, rtol=1e-12)


@pytest.mark.clause("OWN-GQA1")
def test_keys_and_values_may_be_grouped_differently() -> None:
    q, k, v = _draw(6, N_Q, D), _draw(2, N_K, D), _draw(3, N_K, D)
    ours = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    written_out = attention(q, np.repeat(k, 3, axis=0), np.repeat(v, 2, axis=0), masked="add")
    np.testing.assert_array_equal(ours, written_out.output)


def test_without_keys_or_features_torch_still_answers() -> None:
    q, k, v = _operands()
    assert not scaled_dot_product_attention(q, k[:0], v[:0]).any()
    mean = np.broadcast_to(v.mean(axis=0), (N_Q, D + 2))
    np.testing.assert_allclose(scaled_dot_product_attention(q[:, :0], k[:, :0], v), mean)


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"attn_mask": np.ones((4, 4), bool)}, ShapeError, "attn_mask has shape"),
        ({"attn_mask": np.ones((N_Q, N_K), np.int64)}, DtypeError, "must be bool, float32 or"),
        ({"attn_mask": np.ones((N_Q, N_K), bool), "is_causal": True}, OptionError, "one of them"),
        ({"dropout_p": 0.5}, OptionError, "keep is absent"),
        ({"dropout_p": 1.5}, OptionError, "from 0 to 1"),
        ({"dropout_p": float("nan")}, OptionError, "must be finite"),
        ({"enable_gqa": True, "key": _draw(2, N_K, D)}, ShapeError, "must be a multiple"),
        ({"key": _draw(H, N_K, D + 1)}, ShapeError, "d_k"),
        ({"value": _draw(H + 1, N_K, D)}, ShapeError, "they must broadcast"),
        ({"key": _draw(H, N_K, D).astype(np.float32)}, DtypeError, "float32"),
        ({"is_causal": 1}, OptionError, "True or False"),
        ({"keep": np.ones((N_Q, N_K), bool)}, OptionError, "keep is given"),
    ],
)
def test_misuse_of_sdpa_is_refused_in_one_sentence(changed, error, sentence) -> None:
    operands = dict(zip(("query", "key", "value"), _operands(H), strict=True))
    with pytest.raises(error, match=sentence) as caught:
        scaled_dot_product_attention(**(operands | changed))
    assert "\n" not in str(caught.value)


@pytest.mark.clause("OWN-EMPTY1", "OWN-MASK1")
@pytest.mark.parametrize("need_weights", [True, False])
def test_true_ignores_and_an_empty_row_is_nan_only_beside_weights(need_weights: bool) -> None:
    module = _module(bias=False)
    x = _draw(N_Q, B, E_DIM)
    ignored = np.zeros((B, N_Q), bool)
    ignored[0] = True
    output, weights = module(x, x, x, ignored, need_weights)
    assert np.isnan(output[:, 0]).all() == need_weights
    assert np.isfinite(output[:, 1]).all()
    if weights is None:
        assert not output[:, 0].any()


@pytest.mark.clause("OWN-EMPTY1")
def test_the_inference_path_is_nan_on_empty_rows_without_weights_too() -> None:
    module = MultiheadAttention(8, 2, batch_first=True)
    state = {name: _draw(*shape) for name, shape in module.shapes().items()}
    x, empty = _draw(B, N_Q, 8), np.zeros((N_Q, N_Q), bool)
    empty[2] = True
    slow = module.load_state_dict(state).eval()
    call = {"attn_mask": empty, "need_weights": False}
    assert not np.isnan(slow(x, x, x, **call)[0]).any()
    assert np.isnan(slow(x, x, x, inference=True, **call)[0][:, 2]).all()
    # another array of the same values keeps torch off that path
    assert not np.isnan(slow(x, x.copy(), x, inference=True, **call)[0]).any()


@pytest.mark.clause("OWN-APPEND1")
def test_appended_keys_are_attended_whatever_the_masks_say() -> None:
    module = _module(add_bias_kv=True, add_zero_attn=True)
    x = _draw(N_Q, B, E_DIM)
    nothing = np.ones((N_Q, N_Q), bool)
    _, weights = module(x, x, x, attn_mask=nothing)
    assert weights is not None and weights.shape == (B, N_Q, N_Q + 2)
    assert not weights[..., :N_Q].any()
    np.testing.assert_allclose(weights[..., N_Q:].sum(axis=-1), 1, rtol=1e-14)


@pytest.mark.clause("OWN-WEIGHTS1", "OWN-DROPOUT1")
def test_returned_weights_are_those_after_dropout_and_averaged_over_heads() -> None:
    module = _module(dropout=0.5, bias=False)
    x = _draw(N_Q, B, E_DIM)
    keep = _draw(B, H, N_Q, N_Q) > 0
    _, each = module(x, x, x, average_attn_weights=False, keep=keep)
    _, mean = module(x, x, x, keep=keep)
    _, whole = module.eval()(x, x, x, average_attn_weights=False)
    assert each is not None and mean is not None and whole is not None
    np.testing.assert_allclose(each, np.where(keep, 2 * whole, 0), rtol=1e-14)
    np.testing.assert_allclose(mean, each.mean(axis=1), rtol=1e-14)


@pytest.mark.clause("OWN-WEIGHTS1")
def test_returned_weights_are_the_references_weights() -> None:
    module = _module(bias=False)
    x = _draw(N_Q, 1, E_DIM)
    _, weights = module(x, x, x, average_attn_weights=False)
    W_Q, W_K, _ = np.split(module.parameters["in_proj_weight"], 3)
    q, k = ((x[:, 0] @ W.T).reshape(N_Q, H, D).swapaxes(0, 1) for W in (W_Q, W_K))
    np.testing.assert_allclose(weights[0], attention_weights(q, k, k), rtol=1e-12)


@pytest.mark.clause("OWN-WEIGHTS1", "OWN-BACKWARD1")
def test_gradients_are_the_slopes_of_a_loss_on_output_and_weights() -> None:
    module = _module(add_bias_kv=True)
    q, k, v = (_draw(n, B, E_DIM, seed=n + i) for i, n in enumerate((N_Q, N_K, N_K)))
    output, weights = module(q, k, v)
    assert weights is not None
    d_output, d_weights = _draw(*output.shape, seed=3), _draw(*weights.shape, seed=4)
    found = module.backward(d_output, q, k, v, d_weights=d_weights)

    def loss(module: MultiheadAttention, key: np.ndarray) -> float:
        output, weights = module(q, key, v)
        return float(np.sum(output * d_output) + np.sum(weights * d_weights))

    step, name = 1e-6, "in_proj_weight"
    direction = _draw(3 * E_DIM, E_DIM, seed=5)
    moved = [
        module.load_state_dict(
            module.state_dict() | {name: module.parameters[name] + s * direction}
        )
        for s in (-step, step)
    ]
    slope = (loss(moved[1], k) - loss(moved[0], k)) / (2 * step)
    np.testing.assert_allclose(slope, np.sum(found.d_parameters[name] * direction), rtol=1e-7)
    direction = _draw(*k.shape, seed=6)
    slope = (loss(module, k + step * direction) - loss(module, k - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, np.sum(found.d_key * direction), rtol=1e-7)


def test_a_module_takes_and_gives_a_state_dict_by_torchs_names() -> None:
    module = _module(kdim=5)
    assert list(module.state_dict()) == [
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight",
        "out_proj.bias",
    ]  # fmt: skip
    state = module.state_dict()
    state["in_proj_bias"][0] += 1  # a copy: the module keeps its own
    assert module.state_dict()["in_proj_bias"][0] != state["in_proj_bias"][0]
    with pytest.raises(OptionError, match="state holds"):
        module.load_state_dict({n: a for n, a in state.items() if n != "in_proj_bias"})
    with pytest.raises(OptionError, match="state holds"):
        module.load_state_dict(state | {"bias_k": state["in_proj_bias"]})
    with pytest.raises(ShapeError, match="k_proj_weight has shape"):
        module.load_state_dict(state | {"k_proj_weight": state["q_proj_weight"]})
    with pytest.raises(OptionError, match="load_state_dict gives them"):
        MultiheadAttention(E_DIM, H)(*_operands())


@pytest.mark.parametrize("named", [
    {"embed_dim": 0}, {"num_heads": 0}, {"num_heads": 5}, {"embed_dim": -4, "num_heads": -2},
    {"kdim": -1}, {"bias": 1}, {"dropout": float("inf")},
])  # fmt: skip
def test_a_module_that_torch_would_not_make_is_refused(named) -> None:
    with pytest.raises(RefattnError):
        MultiheadAttention(**({"embed_dim": E_DIM, "num_heads": H} | named))


def test_masks_of_two_types_are_warned_of() -> None:
    module = _module()
    x = _draw(N_Q, B, E_DIM)
    masks = {"attn_mask": np.zeros((N_Q, N_Q)), "key_padding_mask": np.zeros((B, N_Q), bool)}
    with pytest.warns(UserWarning, match="deprecates masks of two types"):
        mixed, _ = module(x, x, x, **masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, _ = module(x, x, x)
    np.testing.assert_array_equal(mixed, plain)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"is_causal": True}, "hint on attn_mask, which is absent"),
        ({"attn_mask": np.zeros((N_Q + 1, N_Q), bool)}, "attn_mask has shape"),
        ({"attn_mask": np.zeros((B, N_Q, N_Q), bool)}, "attn_mask has shape"),
        ({"attn_mask": np.zeros((N_Q, N_Q), np.int64)}, "must be bool or float"),
        ({"key_padding_mask": np.zeros((N_Q, B), bool)}, "key_padding_mask has shape"),
        ({"key_padding_mask": np.zeros(N_Q, bool)}, "key_padding_mask has 1 axes"),
        ({"key": _draw(N_K, B, E_DIM)}, "value has n_k"),
        ({"query": _draw(N_Q, B, 1, E_DIM)}, "query has 4 axes"),
        ({"query": _draw(N_Q, E_DIM)}, "key has 3 axes"),
        ({"query": _draw(N_Q, B, E_DIM + 1)}, f"must be equal|={E_DIM}"),
        ({"query": None}, "query is a?n? ?None"),
        ({"keep": np.ones((B, H, N_Q, N_Q), bool)}, "keep is given"),
    ],
)
def test_misuse_of_the_module_is_refused_in_one_sentence(changed, sentence) -> None:
    x = _draw(N_Q, B, E_DIM)
    call = {"query": x, "key": x, "value": x} | changed
    with pytest.raises(RefattnError, match=sentence) as caught:
        _module()(**call)
    assert "\n" not in str(caught.value)
