"""GPT's causal module beside a torch text of our own, forward and all gradients, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from optional import require
from refattn.causal_module import causal_self_attention
from refattn.causal_module_backward import causal_self_attention_backward
from refattn.dropout import keep_mask

torch = require("torch")

B, T, H, D = 2, 7, 3, 5
C, BLOCK = H * D, 11


def make_module(bias: bool, projected: bool, seed: int) -> torch.nn.ModuleDict:
    """Return the layers of the module with drawn weights, and its buffer beside them."""
    torch.manual_seed(seed)
    layers = {"attn": torch.nn.Linear(C, 3 * C, bias=bias)}
    if projected:
        layers["proj"] = torch.nn.Linear(C, C, bias=bias)
    module = torch.nn.ModuleDict(layers).double()
    lower = torch.ones(BLOCK, BLOCK, dtype=torch.float64).tril()
    module.register_buffer("mask", lower.reshape(1, 1, BLOCK, BLOCK))
    return module


def run_module(module, x, keep=None, chance=1.0, output_keep=None, output_chance=1.0):
    """Run the module: fused projection, heads, masked fill, softmax, merge, projection out."""
    by_head = [
        part.unflatten(-1, (H, D)).transpose(-2, -3) for part in module["attn"](x).split(C, -1)
    ]
    query, key, value = by_head
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / D**0.5
    scores = scores.masked_fill(module.mask[..., : x.shape[1], : x.shape[1]] == 0, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    if keep is not None:
        weights = weights * torch.from_numpy(keep) / chance
    merged = (weights @ value).transpose(-2, -3).flatten(-2)
    output = module["proj"](merged) if "proj" in module else merged
    if output_keep is not None:
        output = output * torch.from_numpy(output_keep) / output_chance
    return output


def as_ours(module, *, gradient: bool = False) -> dict[str, np.ndarray]:
    """Return torch's parameters, or their gradients, as ours: a Linear stores W transposed."""
    found = {}
    for layer, name in (("attn", "qkv"), ("proj", "output")):
        if layer not in module:
            continue
        for parameter, letter in ((module[layer].weight, "w"), (module[layer].bias, "b")):
            if parameter is not None:
                tensor = parameter.grad if gradient else parameter.detach()
                found[f"{letter}_{name}"] = tensor.numpy().T
    return found


@pytest.mark.peer("torch")
@pytest.mark.clause("GPT-MODULE1", "GPT-BUFFER1", "GPT-DROPOUT1")
@pytest.mark.parametrize("dropped", [False, True], ids=["all kept", "dropout"])
@pytest.mark.parametrize("projected", [False, True], ids=["merged heads", "projected"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("length", [1, T, BLOCK])
def test_a_torch_module_gives_the_same_output_and_gradients(length, bias, projected, dropped):
    module = make_module(bias, projected, seed=length)
    rng = np.random.default_rng(length)
    x, d_output = rng.normal(size=(B, length, C)), rng.normal(size=(B, length, C))
    options, masks = {}, ()
    if dropped:
        keep = keep_mask((B, H, length, length), seed=1, keep_probability=0.75)
        output_keep = keep_mask((B, length, C), seed=2, keep_probability=0.5)
        masks = (keep, 0.75, output_keep, 0.5)
        names = ("keep", "keep_probability", "output_keep", "output_keep_probability")
        options = dict(zip(names, masks, strict=True))
    leaf = torch.from_numpy(x).requires_grad_()
    theirs = run_module(module, leaf, *masks)
    theirs.backward(torch.from_numpy(d_output))

    parameters = as_ours(module)
    options |= {"heads": H, "block_size": BLOCK}
    ours = causal_self_attention(x, **parameters, **options)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-11, atol=1e-13)
    gradients = causal_self_attention_backward(d_output, x, **parameters, **options)
    expected = {"x": leaf.grad.numpy(), **as_ours(module, gradient=True)}
    assert {n for n, g in gradients._asdict().items() if g is not None} == {
        f"d_{name}" for name in expected
    }
    for name, wanted in expected.items():
        actual = getattr(gradients, f"d_{name}")
        np.testing.assert_allclose(actual, wanted, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.peer("torch")
@pytest.mark.clause("GPT-MODULE1", "OWN-POISON1")
def test_a_torch_module_reads_the_future_where_it_is_not_a_number():
    # 0 · NaN: the weight of a future token is 0, but its value is read; ours reads nothing of it
    module = make_module(True, True, seed=3)
    x = np.random.default_rng(4).normal(size=(B, T, C))
    x[:, -1] = np.nan
    with torch.no_grad():
        theirs = run_module(module, torch.from_numpy(x)).numpy()
    ours = causal_self_attention(x, **as_ours(module), heads=H, block_size=BLOCK)
    assert np.isnan(theirs).all()
    assert np.isfinite(ours[:, :-1]).all()
