"""Values by hand: constants known to many digits, written as the nearest float64."""

import numpy as np
import pytest

from refattn.certify import CertifyError, certify
from refattn.certify.engine import solve
from refattn.certify.flint_attention import prepare
from refattn.certify.philox import philox, words

SIGMOID_1 = 0.7310585786300049  # 0.731058578630004879…
SIGMOID_SLOPE_1 = 0.19661193324148185  # σ(1)σ(-1) = 0.196611933241481852…
SOFTPLUS_1 = 1.3132616875182228  # ln(1 + e) = 1.313261687518222834…
TANH_1 = 0.7615941559557649  # 0.761594155955764888…
SECH2_1 = 0.41997434161402607  # 1 - tanh²(1) = 0.419974341614026069…
LN_2 = 0.6931471805599453


def pair(**more):
    """One query 1, keys 0 and 1, values 0 and 1: the output is the logistic function at 1."""
    inputs = {
        "query": np.ones((1, 1, 1, 1)),
        "key": np.array([0.0, 1.0]).reshape(1, 1, 2, 1),
        "value": np.array([0.0, 1.0]).reshape(1, 1, 2, 1),
        "d_output": np.ones((1, 1, 1, 1)),
    }
    return inputs | more


@pytest.mark.clause("VAS-EQ1", "OWN-LSE1", "OWN-BACKWARD1")
def test_two_keys_give_the_logistic_function_and_its_slope():
    out, _ = solve(prepare(pair(), {}, {}))
    assert out["output"].item() == SIGMOID_1
    assert out["logsumexp"].item() == SOFTPLUS_1
    assert out["d_query"].item() == SIGMOID_SLOPE_1
    assert out["d_key"].reshape(-1).tolist() == [-SIGMOID_SLOPE_1, SIGMOID_SLOPE_1]
    assert out["d_value"][0, 0, 1, 0] == SIGMOID_1


@pytest.mark.clause("OWN-SOFTCAP1")
def test_the_cap_is_a_hyperbolic_tangent_and_multiplies_the_gradient_by_its_slope():
    one_key = pair(key=np.ones((1, 1, 1, 1)), value=np.ones((1, 1, 1, 1)))
    out, _ = solve(prepare(one_key, {"softcap": 1.0}, {}))
    assert out["logsumexp"].item() == TANH_1
    one_key["d_logsumexp"] = np.ones((1, 1, 1))
    out, _ = solve(prepare(one_key, {"softcap": 1.0}, {}))
    assert out["d_query"].item() == SECH2_1


@pytest.mark.clause("OWN-BIAS1", "OWN-SINK1")
def test_bias_and_sink_take_part_in_the_softmax():
    flat = pair(query=np.zeros((1, 1, 1, 1)), bias=np.array([[0.0, 1.0]]))
    out, _ = solve(prepare(flat, {}, {}))
    assert out["output"].item() == SIGMOID_1
    assert out["d_bias"].tolist() == [[-SIGMOID_SLOPE_1, SIGMOID_SLOPE_1]]
    sunk = pair(key=np.ones((1, 1, 1, 1)), value=np.ones((1, 1, 1, 1)), sinks=np.zeros(1))
    out, _ = solve(prepare(sunk, {}, {}))
    assert out["output"].item() == SIGMOID_1
    assert out["d_sinks"].item() == -SIGMOID_SLOPE_1


@pytest.mark.clause("OWN-ALIBI1")
def test_the_gradient_of_a_slope_is_the_gradient_times_the_distance():
    flat = pair(query=np.zeros((1, 1, 1, 1)), slopes=np.ones(1))
    out, _ = solve(prepare(flat, {}, {"distance": "signed"}))
    assert out["output"].item() == SIGMOID_1
    assert out["d_slopes"].item() == SIGMOID_SLOPE_1


@pytest.mark.clause("OWN-DROPOUT1")
def test_kept_weights_are_divided_by_the_keep_probability():
    keep = np.array([[[[False, True]]]])
    out, _ = solve(prepare(pair(keep=keep), {"keep_probability": 0.5}, {}))
    assert out["output"].item() == 2 * SIGMOID_1
    assert out["logsumexp"].item() == SOFTPLUS_1
    assert out["d_query"].item() == 2 * SIGMOID_SLOPE_1


@pytest.mark.clause("OWN-EMPTY1")
@pytest.mark.parametrize("policy", ["zero", "nan", "uniform"])
def test_an_empty_row_follows_its_policy(policy):
    inputs = pair(mask=np.zeros((1, 1, 1, 2), dtype=bool))
    out, _ = solve(prepare(inputs, {}, {"empty_row": policy}))
    expected = {"zero": 0.0, "nan": np.nan, "uniform": 0.5}[policy]
    np.testing.assert_array_equal(out["output"].item(), expected)
    assert out["logsumexp"].item() == -np.inf
    slope = np.nan if policy == "nan" else 0.0
    np.testing.assert_array_equal(out["d_query"].item(), slope)
    np.testing.assert_array_equal(out["d_key"].reshape(-1), [slope, slope])
    np.testing.assert_array_equal(out["d_value"].reshape(-1), [expected, expected])


@pytest.mark.clause("OWN-MERGE1")
def test_parts_are_weighed_by_their_logsumexps_and_empty_parts_are_ignored():
    outputs = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[np.nan, 9.0]]])
    done = certify(
        "merge", {"outputs": outputs, "logsumexps": np.array([[1.0], [0], [-np.inf]])}, {}, {}
    )
    assert done.outputs["output"].tolist() == [[SIGMOID_1, 0.2689414213699951]]
    assert done.outputs["logsumexp"].tolist() == [SOFTPLUS_1]
    halves = {"outputs": outputs[:2], "logsumexps": np.zeros((2, 1))}
    done = certify("merge", halves, {}, {})
    assert done.outputs["output"].tolist() == [[0.5, 0.5]]
    assert done.outputs["logsumexp"].tolist() == [LN_2]


@pytest.mark.clause("ROPE-EQ13", "ROPE-EQ34", "OWN-ROPE1")
@pytest.mark.parametrize("pairing", ["interleaved", "half_split"])
def test_position_one_turns_the_first_pair_by_one_radian(pairing):
    x = np.zeros((1, 1, 2, 4))
    x[..., 0] = 1.0
    inputs = {"x": x, "positions": np.array([0, 1])}
    out = certify("rope", inputs, {}, {"pairing": pairing}).outputs
    second = 1 if pairing == "interleaved" else 2
    assert out["frequencies"].tolist() == [1.0, 0.01]
    assert out["output"][0, 0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert out["output"][0, 0, 1, 0] == 0.5403023058681398  # cos 1 = 0.540302305868139717…
    assert out["output"][0, 0, 1, second] == 0.8414709848078965  # sin 1 = 0.841470984807896506…


@pytest.mark.clause("OWN-ROPE4")
def test_frequency_variants_follow_their_rules_by_hand():
    def frequencies(d=4, base=10000.0, **variant):
        inputs = {"x": np.zeros((1, 1, 1, d)), "positions": np.zeros(1, dtype=np.int64)}
        out = certify("rope", inputs, {"variant": variant, "base": base}, {}).outputs
        return out["frequencies"].tolist(), out["attention_factor"].item()

    assert frequencies(kind="linear", factor=4.0) == ([0.25, 0.0025], 1.0)
    assert frequencies(kind="proportional", partial_rotary_factor=0.5) == ([1.0, 0.0], 1.0)
    # base·(2·3 - 1)^2 = 250000 for length 3·L0; its inverse root is 1/500
    dynamic = {"factor": 2.0, "original_length": 8, "length": 24}
    assert frequencies(kind="dynamic", **dynamic) == ([1.0, 0.002], 1.0)
    factors = {"short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]}
    longrope = {"kind": "longrope", "factor": 16.0, "original_length": 16, **factors}
    root_2 = 1.4142135623730951  # √(1 + ln 16/ln 16)
    assert frequencies(length=16, **longrope) == ([1.0, 0.005], root_2)
    assert frequencies(length=17, **longrope) == ([0.25, 0.00125], root_2)
    bands = {"factor": 8.0, "original_length": 100, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    # 100/2π turns is above 4: kept; a hundredth of it is below 1: divided by 8
    assert frequencies(kind="llama3", **bands) == ([1.0, 0.00125], 1.0)
    yarn = {"factor": 4.0, "original_length": 4096, "attention_factor": 1.5}
    # with beta 32 and 1 the ramp of two pairs runs from ⌊0.65…⌋ = 0 to ⌈1.4…⌉ = 2
    assert frequencies(kind="yarn", **yarn) == ([1.0, 0.01 * (0.5 + 0.5 / 4)], 1.5)


@pytest.mark.clause("ALIBI-S3b", "ALIBI-S3c")
def test_slopes_are_powers_of_two_and_interleave_for_other_head_counts():
    def slopes(heads, **conventions):
        parameters = {"heads": heads, "n_q": 2, "n_k": 3}
        return certify("alibi", {}, parameters, conventions).outputs["slopes"].tolist()

    assert slopes(8) == [2.0**-k for k in range(1, 9)]
    assert slopes(12)[:8] == slopes(8)
    # the first two of the 16-head slopes that 8 heads skip: 2^-0.5 and 2^-1.5
    assert slopes(12)[8:10] == [0.7071067811865476, 0.3535533905932738]
    assert slopes(12, slope_rule="geometric")[2] == 0.25


@pytest.mark.clause("SCORES-COSINE1", "SCORES-ADDITIVE1", "SCORES-SCALED1")
def test_scores_of_small_vectors():
    q, k = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 2.0]])

    def scores(kind, **weights):
        given = {"query": q, "key": k, **{name: np.array(x) for name, x in weights.items()}}
        return certify("score", given, {"kind": kind}, {}).outputs["scores"].tolist()

    assert scores("cosine", strength=2.0) == [[1.2, 1.6]]
    assert scores("dot") == [[3.0, 8.0]]
    assert scores("scaled_dot") == [[2.1213203435596424, 5.656854249492381]]  # 3/√2, 4√2
    assert scores("general", weight=[[0.0, 1.0], [1.0, 0.0]]) == [[4.0, 6.0]]
    assert scores("location", weight=[[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]]) == [[3.0, 4.0, 14.0]]
    only_key = {"w_query": [[0.0], [0.0]], "w_key": [[1.0], [0.0]], "v": [2.0]}
    assert scores("additive", **only_key) == [[2 * TANH_1, 0.0]]


@pytest.mark.clause("HEADS-EQ2", "HEADS-S4a", "HEADS-S4b", "OWN-IMPORTANCE1")
def test_importance_by_hand_at_each_granularity():
    # one layer, two examples, two heads, two tokens, one feature
    A = np.array([[[[[3.0], [-3.0]], [[1.0], [1.0]]], [[[2.0], [1.0]], [[0.0], [2.0]]]]])
    expected = {"token": [9 / 4, 1.0], "example": [3 / 2, 2.0], "batch": [3 / 2, 2.0]}
    for granularity, importance in expected.items():
        inputs = {"head_outputs": A, "d_head_outputs": np.ones_like(A)}
        out = certify("head_importance", inputs, {}, {"granularity": granularity}).outputs
        assert out["importance"].tolist() == [importance]
        order = [1, 0] if granularity == "token" else [0, 1]
        assert out["order"].tolist() == order and out["order"].dtype == np.int64
    assert out["normalized"].tolist() == [[0.6, 0.8]]


@pytest.mark.clause("ROPE-EQ37")
def test_the_decay_factor_at_distance_zero_is_the_mean_of_the_counts():
    out = certify("rope_decay", {"distances": np.array([0])}, {"d": 8, "base": 10000.0}, {}).outputs
    assert out["decay"].tolist() == [2.5]


@pytest.mark.clause("FA1-ALG0", "FA1-ALG1", "FA1-ALG3", "FA1-ALG4", "FA1-THM2", "FA1-THM5")
def test_traffic_of_two_rows_is_counted_line_by_line():
    def count(algorithm):
        parameters = {"n_q": 2, "n_k": 2, "d": 1, "sram": 4, "algorithm": algorithm}
        out = certify("traffic", {}, parameters, {}).outputs
        return out["reads"].item(), out["writes"].item()

    assert count("standard") == (4 + 4 + 6, 4 + 4 + 2)
    assert count("standard_backward") == (6 + 4 + 8 + 6 + 6, 2 + 4 + 4 + 2 + 2)
    # B_c = B_r = 1: two outer steps, two inner steps in each
    assert count("tiled") == (2 * 2 + 4 * 4, 6 + 4 * 3)
    assert count("tiled_backward") == (2 * 2 + 4 * 6, 6 + 4 * 1 + 2 * 2)


@pytest.mark.clause("OWN-DROPOUT2")
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    def parsed(text):
        return tuple(int(word, 16) for word in text.split())

    assert philox(parsed(counter), parsed(key)) == parsed(expected)


@pytest.mark.clause("OWN-DROPOUT2")
def test_the_block_number_fills_the_counter_from_its_lowest_word():
    for word in range(4):
        counter = tuple(int(k == word) for k in range(4))
        assert words(5 + (7 << 32), 1 << (32 * word), 4) == list(philox(counter, (5, 7)))


@pytest.mark.clause("OWN-DROPOUT2")
def test_the_keep_mask_compares_words_with_a_fixed_point_threshold():
    def keep(p, **more):
        parameters = {"seed": 0, "offset": 0, "shape": [2, 3], "keep_probability": p, **more}
        return certify("keep_mask", {}, parameters, {}).outputs["keep"]

    assert keep(1.0).all() and not keep(0.0).any()
    # the first words are 6627e8d5, e169c58d, bc57ac4c, 9b00dbd8
    assert keep(0x6627E8D5 / 2**32).reshape(-1)[:4].tolist() == [False, False, False, False]
    assert keep(0x9B00DBD9 / 2**32).reshape(-1)[:4].tolist() == [True, False, False, True]
    assert keep(0.5, offset=1).reshape(-1)[:2].tolist() == keep(0.5).reshape(-1)[4:].tolist()


@pytest.mark.clause("OWN-EXACT1")
def test_unknown_names_are_refused_in_one_sentence():
    with pytest.raises(CertifyError, match="operation is 'softmax'"):
        certify("softmax", {}, {}, {})
    with pytest.raises(CertifyError, match="parameter scal is not one of"):
        certify("attention", pair(), {"scal": 1.0}, {})
    with pytest.raises(CertifyError, match="empty_row is 'one'"):
        certify("attention", pair(), {}, {"empty_row": "one"})
    with pytest.raises(CertifyError, match=r"key has shape \(1, 1, 0, 1\)"):
        certify("attention", pair(key=np.zeros((1, 1, 0, 1))), {}, {})
    with pytest.raises(CertifyError, match="needs heads"):
        certify("alibi", {}, {"n_q": 1, "n_k": 1}, {})
