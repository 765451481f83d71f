"""Gated cross-attention beside torch, forward and all gradients, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from optional import require
from peers.torch_gated import run_block
from refattn.gated import GatedParameters, gated_cross_attention
from refattn.gated_backward import gated_cross_attention_backward
from refattn.projections import unpack_output, unpack_projection

torch = require("torch")

B, N, E, M, N_M, E_M, H, D_K, D_V, F = 2, 7, 5, 3, 2, 4, 3, 2, 3, 11
MARKED = np.zeros((B, N), dtype=bool)
MARKED[0, [2, 4]] = True
MARKED[1, [0, 1, 5]] = True


def drawn(gates: int, normed_media: bool, seed: int) -> dict[str, np.ndarray]:
    shapes = {
        "norm_weight": (E,), "norm_bias": (E,), "w_query": (H, E, D_K), "w_key": (H, E_M, D_K),
        "w_value": (H, E_M, D_V), "w_output": (H, D_V, E), "attention_gate": (gates,),
        "feed_forward_norm_weight": (E,), "feed_forward_norm_bias": (E,), "w_up": (E, F),
        "w_down": (F, E), "feed_forward_gate": (gates,),
    }  # fmt: skip
    if normed_media:
        shapes |= {"media_norm_weight": (E_M,), "media_norm_bias": (E_M,)}
    draw = np.random.default_rng(seed).normal
    return {name: draw(size=shape) for name, shape in shapes.items()}


@pytest.mark.peer("torch")
@pytest.mark.clause("FLA-S22", "FLA-S23", "OWN-MEDIA1", "OWN-MEDIA2", "OWN-NORM1")
@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
@pytest.mark.parametrize("cached", [False, True], ids=["in line", "cached"])
@pytest.mark.parametrize("before", ["zero", "uniform", "everything"])
@pytest.mark.parametrize("attend", ["immediate", "preceding"])
def test_a_torch_block_gives_the_same_output_and_gradients(attend, before, cached, activation):
    gates, normed = (1, True) if activation == "gelu" else (E, cached)
    parameters = drawn(gates, normed, seed=1)
    rng = np.random.default_rng(2)
    inputs = {"query_input": rng.normal(size=(B, N, E)), "media": rng.normal(size=(B, M, N_M, E_M))}
    d_output = rng.normal(size=(B, N, E))
    marks = MARKED & (np.arange(B) == 0)[:, None]  # item 1 has no medium before any token
    options = {
        "media_locations": marks, "attend": attend, "before_media": before,
        "cached_media": cached, "activation": activation,
    }  # fmt: skip
    leaves = {n: torch.from_numpy(a).requires_grad_() for n, a in (inputs | parameters).items()}
    weights = {name: leaves[name] for name in parameters}
    theirs = run_block(leaves["query_input"], leaves["media"], weights, **options)
    theirs.backward(torch.from_numpy(d_output))

    ours = gated_cross_attention(**inputs, parameters=GatedParameters(**parameters), **options)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-10, atol=1e-12)
    gradients = gated_cross_attention_backward(
        d_output, **inputs, parameters=GatedParameters(**parameters), **options
    )
    for name, leaf in leaves.items():
        actual = getattr(gradients, f"d_{name}")
        wanted = np.zeros_like(actual) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-11, err_msg=name)


def as_ours(block, *, gradient: bool = False) -> dict[str, np.ndarray]:
    """Return the parameters of flamingo-pytorch's block, or their gradients, in our shapes."""

    def read(parameter) -> np.ndarray:
        return (parameter.grad if gradient else parameter.detach()).numpy()

    attn, norm, up, down = block.attn, block.ff[0], block.ff[1], block.ff[3]
    w_key, w_value = np.split(read(attn.to_kv.weight).T, 2, axis=1)
    return {
        "norm_weight": read(attn.norm.weight),
        "norm_bias": read(attn.norm.bias),
        "w_query": unpack_projection(read(attn.to_q.weight).T, H),
        "w_key": unpack_projection(w_key, H),
        "w_value": unpack_projection(w_value, H),
        "w_output": unpack_output(read(attn.to_out.weight).T, H),
        "attention_gate": read(block.attn_gate),
        "feed_forward_norm_weight": read(norm.weight),
        "feed_forward_norm_bias": read(norm.bias),
        "w_up": read(up.weight).T,
        "w_down": read(down.weight).T,
        "feed_forward_gate": read(block.ff_gate),
    }


@pytest.mark.peer("flamingo_pytorch")
@pytest.mark.clause("FLA-S22", "FLA-S23", "OWN-MEDIA1")
@pytest.mark.parametrize("open_gates", [False, True], ids=["gates at 0", "gates open"])
@pytest.mark.parametrize("immediate", [True, False])
def test_flamingo_pytorch_gives_the_same_and_leaks_by_the_convention_uniform(immediate, open_gates):
    package = require("flamingo_pytorch.flamingo_pytorch")
    torch.manual_seed(3)
    block = package.GatedCrossAttentionBlock(
        dim=E, dim_head=D_K, heads=H, ff_mult=2, only_attend_immediate_media=immediate
    ).double()
    if open_gates:
        with torch.no_grad():
            block.attn_gate.fill_(0.75)
            block.ff_gate.fill_(-1.25)
    rng = np.random.default_rng(4)
    inputs = {"query_input": rng.normal(size=(B, N, E)), "media": rng.normal(size=(B, M, N_M, E))}
    d_output = rng.normal(size=(B, N, E))
    leaves = {name: torch.from_numpy(a).requires_grad_() for name, a in inputs.items()}
    theirs = block(leaves["query_input"], leaves["media"], media_locations=torch.from_numpy(MARKED))
    theirs.backward(torch.from_numpy(d_output))

    options = {
        "media_locations": MARKED, "activation": "gelu",
        "attend": "immediate" if immediate else "preceding",
        "before_media": "zero" if immediate else "uniform",
    }  # fmt: skip
    parameters = GatedParameters(**as_ours(block))
    ours = gated_cross_attention(**inputs, parameters=parameters, **options)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-11, atol=1e-13)
    gradients = gated_cross_attention_backward(d_output, **inputs, parameters=parameters, **options)
    expected = as_ours(block, gradient=True)
    expected |= {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    for name, wanted in expected.items():
        actual = getattr(gradients, f"d_{name}")
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-12, err_msg=name)
