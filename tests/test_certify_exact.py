import math

import flint
import numpy as np
import pytest
from flint import arb, arb_mat, fmpq

from refattn.certify import Ambiguous, certify
from refattn.certify.engine import solve
from refattn.certify.exact import Mixed, grid, times
from refattn.certify.flint_attention import prepare

pytestmark = pytest.mark.clause("OWN-EXACT1")


def tensor(*rows):
    return np.array(rows, dtype=np.float64)[None, None]


def proven(query, key, value, parameters=None, conventions=None, midpoints="refuse", **more):
    inputs = {"query": query, "key": key, "value": value, **more}
    return solve(prepare(inputs, parameters or {}, conventions or {}), midpoints)


def test_one_key_returns_its_value_and_no_gradient_of_the_logit():
    out, record = proven(
        tensor([0.3, -1.7]),
        tensor([2.5, 0.7]),
        tensor([1.1, -0.0, 3.0]),
        d_output=tensor([0.1, 0.2, 0.3]),
    )
    assert out["output"].tolist() == [[[[1.1, 0.0, 3.0]]]]
    assert math.copysign(1, out["output"][0, 0, 0, 1]) == 1
    assert out["d_query"].tolist() == [[[[0.0, 0.0]]]]
    assert out["d_key"].tolist() == [[[[0.0, 0.0]]]]
    assert out["d_value"].tolist() == [[[[0.1, 0.2, 0.3]]]]
    # the scale is 1/√2, so the logsumexp alone is irrational
    assert record["exact_elements"] == record["elements"] - 1


def test_one_key_with_a_rational_scale_has_an_exact_logsumexp():
    out, record = proven(tensor([3.0] * 9), tensor([0.5] * 9), tensor([1.0]))
    assert out["logsumexp"].item() == 13.5 / 3
    assert record["exact_elements"] == 2


def test_equal_keys_share_the_weight_as_a_rational_number():
    key = tensor([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])
    out, record = proven(
        tensor([5.0, -3.0]), key, tensor([1.0], [2.0], [7.0]), d_output=tensor([3.0])
    )
    assert out["output"].item() == 10 / 3
    assert out["d_value"].reshape(-1).tolist() == [1.0, 1.0, 1.0]
    # the key is the same in every feature, so Σ_j dS_j K_j = K Σ_j dS_j = 0
    assert out["d_query"].reshape(-1).tolist() == [0.0, 0.0]
    assert record["precision_bits"] == 128


def test_a_mean_on_a_rounding_tie_goes_to_even():
    one = 1.0
    for low, expected in ((one, one), (one + 2.0**-52, one + 2.0**-51)):
        value = tensor([low], [low + 2.0**-52])
        out, _ = proven(tensor([1.0]), tensor([2.0], [2.0]), value)
        assert out["output"].item() == expected


def test_a_column_with_equal_group_means_is_exact_though_the_weights_are_not():
    key = tensor([0.0], [1.0], [1.0])
    out, record = proven(tensor([1.0]), key, tensor([0.1, 1.0], [0.1, 2.0], [0.1, 5.0]))
    assert out["output"][0, 0, 0, 0] == 0.1
    assert record["exact_elements"] == 1
    value = tensor([4.0], [1.0], [7.0])
    out, record = proven(tensor([1.0]), key, value)
    assert out["output"].item() == 4.0 and record["exact_elements"] == 1


def test_keys_are_grouped_by_raw_score_and_bias_under_an_irrational_scale():
    query, key = tensor([1.0, 1.0]), tensor([1.0, 2.0], [2.0, 1.0], [0.0, 0.0])
    value = tensor([1.0], [4.0], [2.5])
    out, record = proven(query, key, value, bias=np.array([0.5, 0.5, 0.0]))
    assert out["output"].item() == 2.5 and record["exact_elements"] == 1
    out, record = proven(query, key, value, bias=np.array([0.5, 0.0, 0.0]))
    assert out["output"].item() != 2.5 and record["exact_elements"] == 0


@pytest.mark.parametrize("order", ["before_bias", "after_bias"])
def test_capped_logits_are_grouped_by_what_the_cap_acts_on(order):
    # raw + bias is 2 for both keys: equal logits only if the cap comes after the sum
    out, record = proven(
        tensor([1.0]),
        tensor([1.0], [2.0]),
        tensor([1.0], [4.0]),
        {"softcap": 3.0},
        {"softcap_order": order},
        bias=np.array([1.0, 0.0]),
    )
    exact = order == "after_bias"
    assert (out["output"].item() == 2.5) is exact
    assert record["exact_elements"] == (1 if exact else 0)


def test_a_sink_alone_takes_all_the_weight():
    out, record = proven(
        tensor([1.0]),
        tensor([1.0]),
        tensor([2.0]),
        mask=np.zeros((1, 1, 1, 1), dtype=bool),
        sinks=np.array([0.7]),
        d_output=tensor([3.0]),
    )
    assert out["output"].item() == 0 and out["logsumexp"].item() == 0.7
    assert out["d_sinks"].item() == 0
    assert record["exact_elements"] == record["elements"]


def test_a_sink_equal_to_a_logit_halves_the_value():
    out, _ = proven(tensor([2.0]), tensor([1.5]), tensor([1.0]), sinks=np.array([3.0]))
    assert out["output"].item() == 0.5
    assert out["logsumexp"].item() == 3.6931471805599454  # 3 + ln 2 = 3.69314718055994530941…


def test_a_feature_in_which_the_keys_agree_has_no_gradient():
    rng = np.random.default_rng(3)
    key = np.round(rng.standard_normal((1, 1, 5, 7)) * 32) / 32
    key[..., 2] = 0.75
    query = np.round(rng.standard_normal((1, 1, 3, 7)) * 32) / 32
    value, d_output = key[..., :2] * 2, query[..., :2] * 3
    out, record = proven(query, key, value, d_output=d_output)
    assert out["d_query"][0, 0, :, 2].tolist() == [0.0, 0.0, 0.0]
    assert record["precision_bits"] == 128
    d_logsumexp = np.array([[[1.0, 2.0, -4.0]]])
    out, _ = proven(query, key, value, {"scale": 0.5}, d_output=d_output, d_logsumexp=d_logsumexp)
    assert out["d_query"][0, 0, :, 2].tolist() == [0.375, 0.75, -1.5]


def test_a_bias_broadcast_over_the_keys_has_no_gradient():
    rng = np.random.default_rng(5)
    x = np.round(rng.standard_normal((1, 1, 5, 7)) * 32) / 32
    out, record = proven(x, x[:, :, ::-1], x, bias=x[0, 0, :, :1], d_output=x)
    assert out["d_bias"].tolist() == [[0.0]] * 5
    assert record["precision_bits"] == 128


def test_the_slope_of_the_cap_is_one_at_zero():
    inputs = (tensor([0.0, 0.0, 0.0, 0.0]), tensor([1.0, 3.0, 5.0, 7.0]), tensor([1.0]))
    zero, one = tensor([0.0]), np.ones((1, 1, 1))
    out, record = proven(*inputs, {"softcap": 2.0}, d_output=zero, d_logsumexp=one)
    assert out["d_query"].reshape(-1).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert record["exact_elements"] == record["elements"]


def test_a_product_is_exact_where_open_elements_meet_equal_numbers():
    third = arb(1) / 3
    a = Mixed(arb_mat([[third, 1 - third, 4]]), [[0, 1]], {(0, 2): fmpq(4)}, [fmpq(5)])
    b = grid(np.array([[2.0, 0.0, 1.0], [2.0, 0.0, 2.0], [0.5, 0.5, 3.0]]))
    two, zero, unlike = times(a, b)[0]
    assert two == fmpq(2 + 2) and zero == fmpq(2)
    assert isinstance(unlike, arb)
    unknown = times(a._replace(total=[None]), b)[0]
    assert isinstance(unknown[0], arb) and unknown[1] == fmpq(2)


def test_gradients_that_underflow_are_positive_zero():
    key = tensor([5000.0], [-5000.0])
    out, _ = proven(
        tensor([1.0]), key, tensor([1.0], [2.0]), midpoints="record", d_output=tensor([1.0])
    )
    assert out["output"].item() == 1.0
    assert np.copysign(1, out["d_query"]).min() == 1 and not out["d_query"].any()


def test_an_accidental_midpoint_is_undecided_at_every_precision():
    # column sums of P are σ(1) + σ(-1) = 1, so dV = 1 + 2^-8, a midpoint of bfloat16
    d_output = tensor([1 + 2.0**-8], [1 + 2.0**-8])
    inputs = (tensor([1.0], [-1.0]), tensor([0.5], [-0.5]), tensor([1.0], [2.0]))
    with pytest.raises(Ambiguous, match=r"d_value\[0, 0, 0, 0\] is undecided at 4096 bits"):
        proven(*inputs, d_output=d_output)


def test_a_value_beside_a_midpoint_is_refused_or_recorded():
    inputs = (tensor([1.0]), tensor([0.0], [0.0], [-40.0]), tensor([1.0], [1 + 2.0**-7], [5.0]))
    with pytest.raises(Ambiguous, match=r"output\[0, 0, 0, 0\].*bfloat16"):
        proven(*inputs)
    out, record = proven(*inputs, midpoints="record")
    assert out["output"].item() == 1 + 2.0**-8
    assert record["midpoints"] == [["output[0, 0, 0, 0]", "bfloat16"]]


def test_certification_leaves_the_precision_as_it_was():
    before = flint.ctx.prec
    proven(tensor([1.0]), tensor([1.0], [2.0]), tensor([1.0], [2.0]))
    assert flint.ctx.prec == before


def test_tile_states_with_equal_logits_are_integers_and_means():
    inputs = {
        "query": np.array([[1.0]]),
        "key": np.array([[2.0], [2.0], [2.0]]),
        "value": np.array([[1.0], [2.0], [4.0]]),
    }
    done = certify("tiles", inputs, {"block_rows": 1, "block_cols": 2}, {})
    assert done.outputs["row_max"].reshape(-1).tolist() == [2.0, 2.0]
    assert done.outputs["row_sum"].reshape(-1).tolist() == [2.0, 3.0]
    assert done.outputs["states"].reshape(-1).tolist() == [1.5, 7 / 3]
    assert done.record["exact_elements"] == done.record["elements"]
