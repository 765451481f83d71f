"""Gradients of attention by the kernels of `sources/`: one of dQ, one of dK and dV."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Unpack

from refattn.arrays import Array, array_namespace, narrow
from refattn.attention import AttentionResult
from refattn.attention_backward import AttentionGradients, check_cotangents, sum_to
from refattn.checks import check_floats, check_shapes
from refattn.options import AttentionOptions
from refattn_gpu.cuda import emulate, machine
from refattn_gpu.cuda.attention import run_forward
from refattn_gpu.cuda.catalogue import BACKWARD, Tile, Variant, backward_variants
from refattn_gpu.cuda.problem import Problem, address, problem_of, rows_of

NAME = "cuda.attention_backward"
"""Of the function, in errors."""


class Gradients(NamedTuple):
    """What the kernels write, in the order in which a gradient's shape is restored."""

    dots: Array
    """D - dL, (b, h, n_q), float32."""
    d_query: Array
    """As bits, the last axis rounded up to whole chunks; so are the next two."""
    d_key: Array
    d_value: Array
    d_bias: Array
    """By cell, (b, h, n_q, n_k), float32; without numbers where there is no bias."""
    d_slopes: Array
    """By row, (b, h, n_q), float32; likewise."""


def attention_backward(
    d_output: Array,
    query: Array,
    key: Array,
    value: Array,
    *,
    d_logsumexp: Array | None = None,
    forward: AttentionResult | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of a loss that reads the output and the logsumexp.

    Spec: OWN-BACKWARD1, FA1-ALG4, OWN-GQA1, OWN-SINK1, OWN-EMPTY1, OWN-POISON1. Differs: weights
        and gradients of logits are rounded to query's dtype before they meet dO, K and Q, and D is
        made of the rounded O, as the profiles fp16 and bf16 permit; a product of float32 is three
        of TF32, to 2^-22 of its size.

        dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - D + dL),  D_i = Σ_x dO_ix O_ix
        dQ = scale · dX K,  dK = scale · dXᵀ Q,  dX = dS ∘ softcap′

    The weights are computed again from the logsumexp, tile by tile. The same bits in every run, and
    for an item whatever stands beside it.

    Args:
        d_output: dO, (..., h, n_q, d_v).
        query: Q, (..., h, n_q, d_k), at most four axes, float16, bfloat16 or float32.
        key: K, (..., h_k, n_k, d_k).
        value: V, (..., h_k, n_k, d_v).
        d_logsumexp: dL, (..., h, n_q); None = the loss does not read the logsumexp.
        forward: what `attention` returned for the same arguments; computed again if None.
        **options: as in the forward call.

    Returns:
        d_query, d_key, d_value: shapes and dtypes of query, key and value.
        d_bias: shape of bias, summed over its broadcast axes; it takes n_q x n_k numbers a head.
        d_slopes, d_sinks: (h,).

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
        BackendAbsent: nothing here runs a kernel.
    """
    machine.require()
    problem = problem_of(NAME, query, key, value, options, BACKWARD)
    check_cotangents(d_output, query, value, d_logsumexp)
    if forward is None:
        run_forward(problem)
    else:
        _check_forward(forward, query, value)
    gradients = prepare(problem, d_output, d_logsumexp, forward, options)
    for variant in backward_variants(problem.dtype, problem.features, problem.terms):
        if machine.on_device(query) or not machine.absent_device():
            reads = [*problem.arrays, problem.logsumexp]
            blocks = blocks_of(variant, problem)
            machine.launch(variant, problem.job, blocks, reads, list(gradients))
        else:
            emulated(variant, problem, gradients)
    return gradients_of(problem, gradients, (query, key, value), options)


def _check_forward(forward: AttentionResult, query: Array, value: Array) -> None:
    """Check that the results have the shapes and the dtype of what they were made from."""
    lead = " ".join(str(n) for n in query.shape[:-1])
    check_floats(NAME, query=query, output=forward.output)
    check_shapes(
        NAME,
        output=(forward.output, f"{lead} {value.shape[-1]}"),
        logsumexp=(forward.logsumexp, lead),
    )


def prepare(
    problem: Problem,
    d_output: Array,
    d_logsumexp: Array | None,
    forward: AttentionResult | None,
    options: AttentionOptions,
) -> Gradients:
    """Tell a problem, whose forward pass ran, what is known and where its gradients go."""
    xp, job = array_namespace(d_output), problem.job
    result = problem.output if forward is None else forward.output
    for name, array in (("d_output", d_output), ("result", result)):
        laid, rows = rows_of(array, xp)
        problem.arrays.append(laid)
        setattr(job, name, rows)
    by_row = (job.batch, job.heads, job.n_q)
    if forward is not None:
        problem.logsumexp[...] = xp.reshape(forward.logsumexp, by_row)
    if d_logsumexp is not None:
        numbers = xp.astype(xp.reshape(d_logsumexp, by_row), xp.float32)
        numbers = xp.ascontiguousarray(numbers)
        problem.arrays.append(numbers)
        job.d_logsumexp = address(numbers)
    gradients = _room(problem, options, xp)
    for name, array in gradients._asdict().items():
        setattr(job, name, address(array) if array.size else None)
    return gradients


def _room(problem: Problem, options: AttentionOptions, xp: Any) -> Gradients:
    """Return arrays for the gradients; the kernels write every number but those of `d_bias`."""
    job, bits = problem.job, problem.output.dtype
    b, h, n_q, n_k = job.batch, job.heads, job.n_q, job.n_k
    cells = (b, h, n_q, n_k) if options.get("bias") is not None else (0, 0, 0, 0)
    rows = (b, h, n_q) if options.get("slopes") is not None else (0, 0, 0)
    return Gradients(
        xp.empty((b, h, n_q), dtype=xp.float32),
        xp.zeros((b, h, n_q, job.d_k), dtype=bits),
        xp.zeros((b, job.key_heads, n_k, job.d_k), dtype=bits),
        xp.zeros((b, job.key_heads, n_k, job.d_v), dtype=bits),
        xp.zeros(cells, dtype=xp.float32),
        xp.zeros(rows, dtype=xp.float32),
    )


def emulated(
    variant: Variant,
    problem: Problem,
    gradients: Gradients,
    *,
    tile: Tile | None = None,
    texts: Mapping[str, str] | None = None,
    backwards: bool = False,
) -> None:
    """Run a kernel in the emulation.

    Args:
        variant: the kernel.
        problem: of NumPy's arrays.
        gradients: of `prepare`.
        tile: in place of the one that a device would be given.
        texts: other contents of some sources, by name.
        backwards: the order of threads.

    Raises:
        EmulationError: the emulation found one.
    """
    variant = variant._replace(tile=tile or variant.tile)
    code, blocks = emulate.compiled(variant, texts), blocks_of(variant, problem)
    reads = [*problem.arrays, problem.logsumexp]
    if variant.kernel != "backward_query":
        reads.append(gradients.dots)
    emulate.launch(code, problem.job, blocks, reads, backwards=backwards)


def blocks_of(variant: Variant, problem: Problem) -> int:
    """Return the blocks of the grid: one a tile of queries or keys, of every head of every item."""
    job = problem.job
    by_query = variant.kernel == "backward_query"
    heads, rows = (job.heads, job.n_q) if by_query else (job.key_heads, job.n_k)
    return int(job.batch * heads * math.ceil(rows / variant.tile.rows))


def gradients_of(
    problem: Problem,
    found: Gradients,
    inputs: tuple[Array, Array, Array],
    options: AttentionOptions,
) -> AttentionGradients:
    """Return the gradients in the shapes of the inputs."""
    query, xp = inputs[0], array_namespace(inputs[0])
    d_query, d_key, d_value = (
        xp.reshape(bits[..., : array.shape[-1]].view(array.dtype), array.shape)
        for bits, array in zip(found[1:4], inputs, strict=True)
    )
    d_bias = d_slopes = d_sinks = None
    if (bias := options.get("bias")) is not None:
        d_bias = narrow(sum_to(found.d_bias, bias.shape, xp), query)
    if options.get("slopes") is not None:
        d_slopes = narrow(xp.sum(found.d_slopes, axis=(0, 2)), query)
    if (sinks := options.get("sinks")) is not None:
        weights = xp.exp(xp.astype(sinks, xp.float32)[:, None] - problem.logsumexp)
        d_sinks = narrow(-xp.sum(weights * found.dots, axis=(0, 2)), query)
    return AttentionGradients(d_query, d_key, d_value, d_bias, d_slopes, d_sinks)
