"""torch's scaled_dot_product_attention and ours on the same arrays, forward and backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from optional import require
from refattn.attention import attention
from refattn.attention_backward import attention_backward

torch = require("torch")
require("torch.nn.attention")

Arrays = dict[str, np.ndarray]


def run_torch(
    arrays: Arrays,
    d_output: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    math: bool = False,
    **options: Any,
) -> Arrays:
    """Return torch's output, and its gradients by autograd for every float input.

    A float mask is torch's name for a bias: it is in arrays, as `bias`. `math` asks for the
    formula in matrix form; else torch chooses its kernel.
    """
    leaves = {name: torch.from_numpy(a.copy()).requires_grad_() for name, a in arrays.items()}
    inputs = dict(leaves)
    if mask is not None:
        inputs["attn_mask"] = torch.from_numpy(mask.copy())
    elif "bias" in inputs:
        inputs["attn_mask"] = inputs.pop("bias")
    matrix_form = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with matrix_form if math else nullcontext():
        output = torch.nn.functional.scaled_dot_product_attention(**inputs, **options)
    output.backward(torch.from_numpy(d_output.copy()))
    gradients = {f"d_{name}": leaf.grad.numpy() for name, leaf in leaves.items()}
    return {"output": output.detach().numpy(), **gradients}


def run_ours(arrays: Arrays, d_output: np.ndarray, **options: Any) -> Arrays:
    """Return our output, and our gradients for the same inputs."""
    bias = {"bias": arrays["bias"]} if "bias" in arrays else {}
    features = {name: arrays[name] for name in ("query", "key", "value")}
    result = attention(**features, **bias, **options)
    gradients = attention_backward(d_output, **features, **bias, **options)
    names = [f"d_{name}" for name in arrays]
    return {"output": result.output, **{name: getattr(gradients, name) for name in names}}


def assert_agree(ours: Arrays, theirs: Arrays, tolerances: dict[str, float]) -> None:
    """Assert that both have the same names, shapes, and values to an absolute tolerance."""
    assert set(ours) == set(theirs) == set(tolerances)
    for name, actual in ours.items():
        assert actual.shape == theirs[name].shape
        np.testing.assert_allclose(
            actual, theirs[name], rtol=0, atol=tolerances[name], err_msg=name
        )


def tolerances(
    arrays: Arrays, d_output: np.ndarray, scale: float | None = None
) -> dict[str, float]:
    """Return how far two float64 runs may be apart, from the size of what is summed.

    A logit's error is u(d_k + 2) Σ|q||k|·scale, and it multiplies a weight; every other stage is
    a sum whose error is u times its terms times their size. Both runs have it: a factor 2, and
    another 2 for the second order.
    """
    q, k, v = (np.abs(arrays[name]).max() for name in ("query", "key", "value"))
    d_k, d_v, n_q, n_k = (
        arrays["query"].shape[-1],
        arrays["value"].shape[-1],
        arrays["query"].shape[-2],
        arrays["key"].shape[-2],
    )
    s = abs(scale) if scale is not None else d_k**-0.5
    bias = arrays.get("bias", np.zeros(1))
    logit = d_k * q * k * s + np.abs(bias[np.isfinite(bias)]).max(initial=0)
    relative = 4 * 2.0**-53 * ((d_k + 4) * logit + 2 * n_k + d_v + n_q + 8)
    d_o = np.abs(d_output).max()
    d_logit = 2 * d_v * d_o * v  # |dP - D|
    heads = arrays["query"].shape[-3] if arrays["query"].ndim > 2 else 1
    batch = int(np.prod(arrays["query"].shape[:-3]))
    return {
        name: relative * size
        for name, size in {
            "output": v,
            "d_query": d_logit * k * s,
            "d_key": d_logit * q * s * n_q * heads,
            "d_value": d_o * n_q * heads,
            "d_bias": d_logit * heads * batch,
        }.items()
        if name != "d_bias" or "bias" in arrays
    }
