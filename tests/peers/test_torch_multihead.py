"""Multi-head attention beside torch's nn.MultiheadAttention, forward and backward, in float64."""

import numpy as np
import pytest

from optional import require
from refattn.multihead import multihead_attention
from refattn.multihead_backward import multihead_attention_backward
from refattn.projections import unpack_output, unpack_projection

torch = require("torch")

B, N_Q, N_K, E, E_S, H = 2, 5, 7, 12, 11, 3


def _module_and_inputs(source_features, n_k, seed):
    torch.manual_seed(seed)
    module = torch.nn.MultiheadAttention(
        E, H, bias=False, kdim=source_features, vdim=source_features, batch_first=True
    ).double()
    draw = np.random.default_rng(seed).normal
    return module, draw(size=(B, N_Q, E)), draw(size=(B, n_k, source_features))


def _projections(module):
    """Return torch's matrices as ours: it stores them transposed, all heads in one."""
    if module.in_proj_weight is not None:
        packed = np.split(module.in_proj_weight.detach().numpy(), 3)
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        packed = [getattr(module, name).detach().numpy() for name in names]
    output = unpack_output(module.out_proj.weight.detach().numpy().T, H)
    return (*(unpack_projection(w.T, H) for w in packed), output)


@pytest.mark.peer("torch")
@pytest.mark.clause("VAS-S322a", "VAS-S322b", "VAS-S323a", "VAS-S323b")
@pytest.mark.parametrize("weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("source", [(E, N_Q), (E_S, N_K)], ids=["self-sized", "cross-sized"])
def test_torch_gives_the_same_output_and_input_gradients(source, causal, weights):
    module, query_input, source_input = _module_and_inputs(*source, seed=1)
    X, Y = (torch.from_numpy(a).requires_grad_() for a in (query_input, source_input))
    forbidden = np.triu(np.ones((N_Q, source[1]), dtype=bool), k=1)  # torch: True = ignore
    mask = torch.from_numpy(forbidden) if causal else None
    theirs, _ = module(X, Y, Y, attn_mask=mask, need_weights=weights)
    d_output = np.random.default_rng(2).normal(size=(B, N_Q, E))
    theirs.backward(torch.from_numpy(d_output))

    arguments = (query_input, source_input, *_projections(module))
    ours = multihead_attention(*arguments, causal=causal)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-10, atol=1e-13)
    gradients = multihead_attention_backward(d_output, *arguments, causal=causal)
    np.testing.assert_allclose(gradients.d_query_input, X.grad.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradients.d_source_input, Y.grad.numpy(), rtol=1e-9, atol=1e-12)
    d_w_output = unpack_output(module.out_proj.weight.grad.numpy().T, H)
    np.testing.assert_allclose(gradients.d_w_output, d_w_output, rtol=1e-9, atol=1e-12)
