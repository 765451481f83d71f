"""torch's scaled_dot_product_attention on NumPy arrays, forward and backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from optional import require
from peers.agreement import Arrays

torch = require("torch")
require("torch.nn.attention")


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
