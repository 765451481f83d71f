"""The two engines agree on random cases of every operation, and a corrupted value is caught."""

import ast
from pathlib import Path

import numpy as np
import pytest

import module_cases
import refattn.certify
from refattn.certify import CertifyError, Disagreement, certify, recertify

pytestmark = pytest.mark.clause("OWN-EXACT1")

SLOPES = np.array([0.5, 0.25, 0.125, 1.0])


def draw(seed, *shape):
    return np.round(np.random.default_rng(seed).standard_normal(shape) * 32) / 32


def attention_inputs(b=2, h=4, h_k=2, n_q=5, n_k=7, d=6, d_v=3, **more):
    inputs = {
        "query": draw(1, b, h, n_q, d),
        "key": draw(2, b, h_k, n_k, d),
        "value": draw(3, b, h_k, n_k, d_v),
        "d_output": draw(4, b, h, n_q, d_v),
    }
    return inputs | more


MASK = np.random.default_rng(8).random((2, 1, 5, 7)) < 0.6
KEEP = np.random.default_rng(9).random((2, 4, 5, 7)) < 0.75
D_LSE = draw(5, 2, 4, 5)

ATTENTION = {
    "plain": ({}, {}, {}),
    "square_d": ({}, {}, {"d": 4}),
    "causal": ({"causal": True}, {}, {"d_logsumexp": D_LSE}),
    "mask": ({}, {}, {"mask": MASK, "d_logsumexp": D_LSE}),
    "softcap": ({"causal": True, "softcap": 2.0}, {}, {"bias": draw(6, 1, 4, 5, 7)}),
    "capped_bias": (
        {"softcap": 2.0},
        {"softcap_order": "after_bias", "alignment": "bottom_right", "head_map": "tile"},
        {"bias": draw(6, 5, 1), "slopes": SLOPES},
    ),
    "window": (
        {"causal": True, "window": [2, None], "scale": 0.3},
        {"alignment": [-2, 1], "distance": "signed", "empty_row": "uniform"},
        {"slopes": SLOPES, "bias": draw(6, 2, 1, 1, 7), "d_logsumexp": D_LSE},
    ),
    "lengths": (
        {"window": [1, 1]},
        {"alignment": "bottom_right", "distance": "column", "empty_row": "nan"},
        {"slopes": SLOPES, "key_lengths": np.array([3, 7]), "query_lengths": np.array([5, 2])},
    ),
    "dropout_and_sinks": (
        {"causal": True, "keep_probability": 0.75},
        {"alignment": -2},
        {"keep": KEEP, "sinks": draw(7, 4), "bias": draw(6, 1, 1, 5, 1)},
    ),
    "peaked": ({"scale": 300.0}, {}, {}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_engines_agree_on_attention(name):
    parameters, conventions, more = ATTENTION[name]
    inputs = attention_inputs(**more)
    done = certify("attention", inputs, parameters, conventions, midpoints="record")
    count = recertify("attention", inputs, parameters, conventions, done.outputs)
    assert count == sum(x.size for x in done.outputs.values()) == done.record["elements"]


def poisoned():
    inputs = attention_inputs(mask=MASK)
    inputs["key"][0, 1, 3, 2] = np.nan
    inputs["value"][1, 0, 2, 1] = np.nan
    return inputs


@pytest.mark.parametrize("masked", ["select", "add"])
@pytest.mark.parametrize("policy", ["zero", "uniform"])
def test_engines_agree_on_where_nan_goes(masked, policy):
    conventions = {"masked": masked, "empty_row": policy}
    inputs = poisoned()
    inputs["mask"][1, 0, 3] = False
    done = certify("attention", inputs, {}, conventions)
    assert np.isnan(done.outputs["output"]).any()
    recertify("attention", inputs, {}, conventions, done.outputs)


@pytest.mark.parametrize("policy", ["zero", "nan", "uniform"])
def test_engines_agree_on_where_nan_in_an_upstream_gradient_goes(policy):
    inputs = attention_inputs(mask=MASK.copy(), sinks=draw(7, 4))
    inputs["mask"][1, 0, 3] = False
    inputs["d_output"][1, 2, 3, 0] = inputs["d_output"][0, 1, 2, 1] = np.nan
    for dropped in ((), ("sinks",)):
        given = {name: x for name, x in inputs.items() if name not in dropped}
        done = certify("attention", given, {}, {"empty_row": policy})
        assert np.isfinite(done.outputs["output"][0]).all()
        assert np.isnan(done.outputs["d_value"]).any()
        recertify("attention", given, {}, {"empty_row": policy}, done.outputs)


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_a_masked_cell_holds_is_never_read(bad):
    mask = np.ones((1, 1, 1, 7), dtype=bool)
    mask[..., 5:] = False
    clean = attention_inputs(mask=mask)
    dirty = {name: x.copy() for name, x in clean.items()}
    dirty["key"][:, :, 5:] = bad
    dirty["value"][:, :, 5:] = bad
    expected = certify("attention", clean, {}, {}).outputs
    for name, x in certify("attention", dirty, {}, {}).outputs.items():
        np.testing.assert_array_equal(x, expected[name])


@pytest.mark.clause("OWN-POISON1")
def test_an_added_mask_lets_nan_through():
    mask = np.ones((1, 1, 5, 7), dtype=bool)
    mask[..., 2, 5] = False
    inputs = attention_inputs(mask=mask, d_output=np.zeros((2, 4, 5, 3)))
    inputs["value"][:, :, 5, 0] = np.nan
    for masked, clean_row in (("select", True), ("add", False)):
        output = certify("attention", inputs, {}, {"masked": masked}).outputs["output"]
        assert np.isfinite(output[:, :, 2]).all() == clean_row
        assert np.isnan(output[:, :, 3, 0]).all() and np.isfinite(output[..., 1:]).all()


@pytest.mark.clause("OWN-POISON1", "OWN-EMPTY1")
@pytest.mark.parametrize("name", ["query", "key", "value", "d_output"])
@pytest.mark.parametrize("policy", ["zero", "uniform"])
def test_engines_agree_on_what_an_empty_row_reads(name, policy):
    mask = np.ones((1, 1, 5, 7), dtype=bool)
    mask[..., 3, :] = False
    row = {"query": 3, "d_output": 3, "key": 6, "value": 6}[name]
    inputs = attention_inputs(mask=mask)
    inputs[name][:, :, row, 1] = np.nan
    felt = {"query": "d_key", "key": "d_query", "value": "output", "d_output": "d_value"}[name]
    read = {"zero": (), "uniform": ("value", "d_output")}[policy]  # under select
    for masked, names in (("select", read), ("add", ("query", "key", "value", "d_output"))):
        conventions = {"masked": masked, "empty_row": policy}
        done = certify("attention", inputs, {}, conventions)
        recertify("attention", inputs, {}, conventions, done.outputs)
        x = done.outputs[felt]
        x = x[:, :, 3] if felt in ("output", "d_query") else x
        assert np.isnan(x[..., 1]).all() == np.isnan(x).any() == (name in names)
        assert np.isfinite(x[..., 0]).all()


def test_an_infinite_operand_that_is_read_is_refused():
    inputs = attention_inputs()
    inputs["value"][0, 0, 0, 0] = np.inf
    with pytest.raises(CertifyError, match="infinite operand"):
        certify("attention", inputs, {}, {})


def multihead_inputs():
    return {
        "query_input": draw(1, 2, 3, 4),
        "source_input": draw(2, 2, 5, 6),
        "w_query": draw(3, 2, 4, 3),
        "w_key": draw(4, 2, 6, 3),
        "w_value": draw(5, 2, 6, 2),
        "w_output": draw(6, 2, 2, 4),
        "head_gates": draw(7, 2),
        "d_output": draw(8, 2, 3, 4),
    }


ROPE = {
    "x": draw(1, 1, 2, 3, 8),
    "positions": np.array([0, 5, 131071]),
    "d_output": draw(2, 1, 2, 3, 8),
}
PARTS = {"outputs": draw(1, 3, 5, 4), "logsumexps": draw(2, 3, 5)}
PARTS["logsumexps"][1, 2] = PARTS["logsumexps"][:, 4] = -np.inf
VECTORS = {"query": draw(1, 3, 4), "key": draw(2, 5, 4)}
ADDITIVE = {"w_query": draw(3, 4, 6), "w_key": draw(4, 4, 6), "v": draw(5, 6)}
HEADS = {"head_outputs": draw(1, 2, 3, 4, 5, 2), "d_head_outputs": draw(2, 2, 3, 4, 5, 2)}
TILES = {"query": draw(1, 5, 4), "key": draw(2, 7, 4), "value": draw(3, 7, 3)}
STRETCHED = {"factor": 4.0, "original_length": 4096}
VARIANTS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0, "original_length": 64, "length": 200},
    "yarn": STRETCHED,
    "longrope": {
        **STRETCHED,
        "length": 5000,
        "short_factor": [1.0, 1.0, 1.25, 1.5],
        "long_factor": [1.0, 1.5, 2.0, 4.0],
    },
    "llama3": {
        "factor": 8.0,
        "original_length": 900,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}

CASES = {
    **module_cases.CASES,
    "multihead": ("multihead", multihead_inputs(), {}, {}),
    "multihead_causal": (
        "multihead",
        multihead_inputs(),
        {"causal": True, "scale": 0.25},
        {"alignment": -1, "empty_row": "uniform"},
    ),
    **{
        f"importance_{g}": ("head_importance", HEADS, {}, {"granularity": g})
        for g in ("token", "example", "batch")
    },
    **{
        f"rope_{kind}": ("rope", ROPE, {"variant": {"kind": kind, **numbers}}, {})
        for kind, numbers in VARIANTS.items()
    },
    "rope_partial": ("rope", ROPE, {"rotary_dim": 6, "base": 500.0}, {"pairing": "half_split"}),
    "rope_yarn_untruncated": (
        "rope",
        ROPE,
        {
            "variant": {
                "kind": "yarn",
                **STRETCHED,
                "truncate": False,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            }
        },
        {},
    ),
    **{
        f"rope_yarn_clamped_{length}": (
            "rope",
            ROPE,
            {"base": 10.0, "variant": {"kind": "yarn", "factor": 4.0, "original_length": length}},
            {},
        )
        # the ramp ends at the last feature, or would end before it starts
        for length in (400, 10**6)
    },
    "decay": ("rope_decay", {"distances": np.array([0, 1, 100])}, {"d": 16, "base": 10000.0}, {}),
    **{
        f"alibi_{heads}_{rule}": (
            "alibi",
            {},
            {"heads": heads, "n_q": 3, "n_k": 5},
            {"slope_rule": rule, "alignment": "bottom_right", "distance": "signed"},
        )
        for heads in (1, 3, 8, 12)
        for rule in ("authors", "geometric")
    },
    "tiles": ("tiles", TILES, {"block_rows": 2, "block_cols": 3}, {}),
    "tiles_scaled": ("tiles", TILES, {"block_rows": 2, "block_cols": 4, "scale": 0.3}, {}),
    "merge": ("merge", PARTS, {}, {}),
    "score_dot": ("score", VECTORS, {"kind": "dot"}, {}),
    "score_scaled": ("score", VECTORS, {"kind": "scaled_dot"}, {}),
    "score_cosine": ("score", {**VECTORS, "strength": np.array(2.5)}, {"kind": "cosine"}, {}),
    "score_general": ("score", {**VECTORS, "weight": draw(3, 4, 4)}, {"kind": "general"}, {}),
    "score_location": ("score", {**VECTORS, "weight": draw(3, 4, 5)}, {"kind": "location"}, {}),
    "score_additive": ("score", {**VECTORS, **ADDITIVE}, {"kind": "additive"}, {}),
    **{
        f"traffic_{name}": (
            "traffic",
            {},
            {"n_q": 37, "n_k": 53, "d": 8, "sram": 300, "algorithm": name},
            {},
        )
        for name in ("standard", "standard_backward", "tiled", "tiled_backward")
    },
    "keep_mask": (
        "keep_mask",
        {},
        {"seed": 2**64 - 3, "offset": 2**64 - 1, "shape": [3, 5], "keep_probability": 0.6},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_engines_agree_on_the_other_operations(name):
    op, inputs, parameters, conventions = CASES[name]
    done = certify(op, inputs, parameters, conventions)
    count = recertify(op, inputs, parameters, conventions, done.outputs)
    assert count == sum(x.size for x in done.outputs.values()) == done.record["elements"]
    assert done.record["ambiguous"] == 0


def corruptions():
    for case, (parameters, conventions, more) in ATTENTION.items():
        if case in ("plain", "capped_bias", "dropout_and_sinks"):
            yield case, ("attention", attention_inputs(**more), parameters, conventions)
    for case in ("multihead", "rope_llama3", "tiles", "merge", "importance_token", "keep_mask"):
        yield case, CASES[case]
    yield "traffic", CASES["traffic_tiled"]


@pytest.mark.parametrize(
    ("name", "case"), list(corruptions()), ids=lambda x: x if type(x) is str else ""
)
def test_one_changed_bit_of_any_output_is_caught(name, case):
    op, inputs, parameters, conventions = case
    outputs = certify(op, inputs, parameters, conventions).outputs
    for output, x in outputs.items():
        wrong = x.copy()
        at = tuple(size // 2 for size in x.shape)
        if x.dtype == np.float64:
            wrong[at] = np.nextafter(x[at], np.inf)
        else:
            wrong[at] = not x[at] if x.dtype == bool else x[at] + 1
        with pytest.raises(Disagreement, match=output):
            recertify(op, inputs, parameters, conventions, {output: wrong})


def test_a_sample_is_the_same_every_time_and_spread_over_the_output():
    op, inputs, parameters, conventions = CASES["multihead"]
    outputs = certify(op, inputs, parameters, conventions).outputs
    counts = {recertify(op, inputs, parameters, conventions, outputs, sample=3) for _ in range(2)}
    assert counts == {sum(min(3, x.size) for x in outputs.values())}


def test_certificates_are_equal_run_to_run_and_for_every_exact_input_dtype():
    inputs = attention_inputs()
    first = certify("attention", inputs, {}, {})
    narrow = {name: x.astype(np.float32) for name, x in inputs.items()}
    second = certify("attention", narrow, {}, {})
    for name, x in first.outputs.items():
        assert x.tobytes() == second.outputs[name].tobytes()
    assert first.record == second.record


def test_every_float_output_has_units_in_float32():
    done = certify("attention", attention_inputs(), {}, {})
    for name, x in done.outputs.items():
        unit = done.units[f"{name}.unit"]
        assert unit.shape == x.shape and unit.dtype == np.float32 and (unit >= 0).all()


def test_certify_imports_nothing_else_of_refattn():
    for path in Path(refattn.certify.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module or ""]
            for name in names:
                own = name.startswith("refattn.certify.") or name.split(".")[0] != "refattn"
                assert own, f"{path.name} imports {name}"


def test_the_second_engine_takes_no_formula_from_the_first():
    root = Path(refattn.certify.__path__[0]) / "mpmath_engine"
    shared = {"refattn.certify.errors", "refattn.certify.rounding"}
    for path in root.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refattn"):
                assert node.module in shared or "mpmath_engine" in node.module, path
