"""The modules of PyTorch and Keras on the certified vectors that they can state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refattn.backends import cast_floats
from refattn.bounds import profile_of
from refattn.dialects.keras2_mha import MultiHeadAttention as Keras2
from refattn.dialects.keras3_mha import MultiHeadAttention as Keras3
from refattn.dialects.torch_mha_module import MultiheadAttention
from refattn.judge import judge
from refattn.vectors import core_pack

CASES = {case.id: case for case in core_pack().cases}

SELF = ["causal-module-one-token", "causal-module-whole", "causal-module-without-biases"]
"""GPT's module without dropout is torch's, of one embedding, under a causal mask."""

BY_HEAD = [
    f"multihead-{name}"
    for name in (
        "causal", "causal-backward", "cross", "cross-backward", "pruned-cut", "self",
        "self-backward", "single",
    )
]  # fmt: skip
"""Multi-head attention without gates, of the default scale, without empty rows."""

DTYPES = ("float64", "float32")


def _judged(name: str, outputs: dict[str, Any], dtype: str) -> None:
    case = CASES[name]
    assert outputs.keys() == case.outputs.keys()
    assert all(array.dtype == dtype for array in outputs.values())
    verdict = judge(case, outputs, profile_of(dtype))
    assert not [output.reason for output in verdict.outputs if not output.ok]


@pytest.mark.clause("VAS-S322a", "GPT-MODULE1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SELF)
def test_torchs_module_gives_the_certified_values_and_gradients(name: str, dtype: str) -> None:
    case = CASES[name]
    given = {name: cast_floats(array, dtype) for name, array in case.inputs.items()}
    x, n = given["x"], given["x"].shape[1]
    turned = {"w_qkv": "in_proj_weight", "w_output": "out_proj.weight"}
    names = turned | {"b_qkv": "in_proj_bias", "b_output": "out_proj.bias"}
    state = {names[name]: given[name].T for name in names if name in given}
    heads, bias = case.parameters["heads"], "b_qkv" in given
    module = MultiheadAttention(x.shape[2], heads, bias=bias, batch_first=True)
    module = module.load_state_dict(state)
    options = {"attn_mask": np.triu(np.ones((n, n), bool), 1), "need_weights": False}
    output, _ = module.forward(x, x, x, **options)
    found = module.backward(given["d_output"], x, x, x, **options)
    outputs = {"output": output, "d_x": found.d_query + found.d_key + found.d_value}
    parameters = {name: found.d_parameters[of] for name, of in names.items() if name in given}
    _judged(name, outputs | {f"d_{name}": array.T for name, array in parameters.items()}, dtype)


@pytest.mark.clause("VAS-S322a", "VAS-S323a")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [Keras2, Keras3])
@pytest.mark.parametrize("name", BY_HEAD)
def test_kerass_layers_give_the_certified_values_and_gradients(
    name: str, layer: Any, dtype: str
) -> None:
    case = CASES[name]
    given = {name: cast_floats(array, dtype) for name, array in case.inputs.items()}
    h, d_v, e_o = given["w_output"].shape
    made = layer(h, given["w_query"].shape[2], d_v, use_bias=False, output_shape=e_o)
    kernels = [given[name].swapaxes(0, 1) for name in ("w_query", "w_key", "w_value")]
    made = made.set_weights([*kernels, given["w_output"]])
    arrays = given["query_input"], given["source_input"]
    causal = case.parameters.get("causal", False)
    options = {"use_causal_mask": causal, "return_attention_scores": True}
    outputs = {"output": made.call(*arrays, **options)[0]}
    if "d_output" in given:
        found = made.backward(given["d_output"], *arrays, **options)
        d_query, d_key, d_value, d_output = found.d_weights
        outputs |= {"d_query_input": found.d_query, "d_source_input": found.d_value}
        outputs |= {"d_w_query": d_query, "d_w_key": d_key, "d_w_value": d_value}
        outputs = {
            name: array.swapaxes(0, 1) if name.startswith("d_w_") else array
            for name, array in outputs.items()
        } | {"d_w_output": d_output}
    _judged(name, outputs, dtype)
