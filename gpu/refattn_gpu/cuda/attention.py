"""Attention by the kernels of `sources/`, with the arguments and the results of the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

from refattn.arrays import Array
from refattn.attention import AttentionResult
from refattn.backends import Unsupported
from refattn.checks import check_option
from refattn.options import AttentionOptions
from refattn_gpu.cuda import emulate, machine
from refattn_gpu.cuda.catalogue import FORMATS, FORWARD, HOPPER, Tile, Variant, tiles_of, variant_of
from refattn_gpu.cuda.problem import Problem, problem_of
from refattn_gpu.cuda.tensor_maps import mapped, maps_of


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    kernel: str | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionResult:
    """Return attention, computed on tensor cores or in their emulation.

    Spec: FA1-ALG1, VAS-EQ1, VAS-S323b, ALIBI-S3a, OWN-SOFTCAP1, OWN-SINK1, OWN-EMPTY1, OWN-LSE1,
        OWN-ROUND1, OWN-POISON1, OWN-GQA1, OWN-LENGTH1. Differs: weights are rounded to query's
        dtype before they meet V and are divided, as the profiles fp16 and bf16 permit; a
        product of float32 is three of TF32, to 2^-22 of its size.

        S = softcap(scale · Q Kᵀ) + alibi + bias;  O = softmax(S) V

    The same bits in every run, and for an item or a head whatever stands beside it.

    Args:
        query: Q, (..., h, n_q, d_k), at most four axes, float16, bfloat16 or float32.
        key: K, (..., h_k, n_k, d_k); h is a multiple of h_k.
        value: V, (..., h_k, n_k, d_v). Rows that do not begin at multiples of 16 bytes are copied.
        kernel: one of `FORWARD`; None = the one that is meant for the problem and the device.
        **options: see `refattn.options.AttentionOptions`.

    Returns:
        output: O, (..., h, n_q, d_v), in query's dtype.
        logsumexp: (..., h, n_q), nats, float32; -∞ for an empty row.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
        BackendAbsent: nothing here runs a kernel.
    """
    machine.require()
    if kernel is not None:
        check_option("cuda.attention", "kernel", kernel, FORWARD)
    problem = problem_of("cuda.attention", query, key, value, options)
    if kernel is not None:
        _check_kernel(kernel, problem)
    run_forward(problem, kernel)
    return result_of(problem, query, value)


def _check_kernel(kernel: str, problem: Problem) -> None:
    """Refuse a kernel that has no variant for a problem, or that the device cannot run."""
    if not tiles_of(kernel, problem.dtype, problem.terms):
        has = ", ".join(name for name in FORMATS if tiles_of(kernel, name, problem.terms))
        raise Unsupported(
            f"query has dtype {problem.dtype}, but kernel {kernel} supports {has} [cuda.attention]"
        )
    if kernel in HOPPER and not machine.absent_device() and not machine.is_hopper():
        raise Unsupported(
            f"the device has compute capability {machine.capability()}, but kernel {kernel} needs "
            f"{machine.HOPPER_CAPABILITY} [cuda.attention]"
        )


def run_forward(problem: Problem, kernel: str | None = None) -> None:
    """Run a problem on the device, or in the emulation where there is none."""
    kernel = kernel or kernel_for(problem)
    variant = variant_of(problem.dtype, problem.features, problem.terms, kernel)
    problem = mapped(problem) if kernel in HOPPER else problem
    if machine.on_device(problem.output) or not machine.absent_device():
        results = [problem.output, problem.logsumexp]
        machine.launch(variant, problem.job, blocks_of(variant, problem), problem.arrays, results)
    else:
        emulated(problem, variant.tile, kernel=kernel)


def kernel_for(problem: Problem) -> str:
    """Return the kernel that is meant for a problem; it depends neither on the batch nor on n_k.

    A Hopper's own kernel has no smaller head than 64 features: one of 32 would be half of zeros.
    """
    has = tiles_of("hopper", problem.dtype, problem.terms)
    if has and min(has) // 2 < problem.features and machine.is_hopper():
        return "hopper"
    return FORWARD[0]


def emulated(
    problem: Problem,
    tile: Tile,
    *,
    kernel: str = FORWARD[0],
    texts: Mapping[str, str] | None = None,
    backwards: bool = False,
) -> None:
    """Run a problem in the emulation.

    Args:
        problem: of NumPy's arrays.
        tile: in place of the one that a device would be given.
        kernel: one of `FORWARD`.
        texts: other contents of some sources, by name.
        backwards: the order of threads.

    Raises:
        EmulationError: the emulation found one.
    """
    variant = variant_of(problem.dtype, problem.features, problem.terms, kernel)
    variant = variant._replace(tile=tile)
    code = emulate.compiled(variant, texts)
    blocks, maps = blocks_of(variant, problem), None
    if kernel in HOPPER:
        problem = mapped(problem)
        maps = maps_of(variant, problem.job)
    emulate.launch(code, problem.job, blocks, problem.arrays, maps=maps, backwards=backwards)


def blocks_of(variant: Variant, problem: Problem) -> int:
    """Return the blocks of the grid: one a tile of queries, of every head of every item."""
    job = problem.job
    return int(job.batch * job.heads * math.ceil(job.n_q / variant.tile.rows))


def result_of(problem: Problem, query: Array, value: Array) -> AttentionResult:
    """Return what a problem holds after it ran, in the shapes of the reference."""
    shape: tuple[Any, ...] = (*query.shape[:-1], value.shape[-1])
    output = problem.output[..., : value.shape[-1]].view(query.dtype)
    return AttentionResult(output.reshape(shape), problem.logsumexp.reshape(query.shape[:-1]))
