"""Attention by the kernels of `sources/`, with the arguments and the results of the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

from refattn.arrays import Array, array_namespace
from refattn.attention import AttentionResult
from refattn.backends import Unsupported
from refattn.checks import check_option
from refattn.options import AttentionOptions
from refattn_gpu.cuda import emulate, machine
from refattn_gpu.cuda.catalogue import (
    FEATURES,
    FORWARD,
    HOPPER,
    Tile,
    Variant,
    forward_variants,
    has_variant,
    most_features,
    variant_of,
)
from refattn_gpu.cuda.problem import Problem, address, problem_of
from refattn_gpu.cuda.tensor_maps import mapped, maps_of


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    kernel: str | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionResult:
    """Return attention, computed on a device or in the emulation of one.

    Spec: FA1-ALG1, VAS-EQ1, VAS-S323b, ALIBI-S3a, OWN-SOFTCAP1, OWN-SINK1, OWN-EMPTY1, OWN-LSE1,
        OWN-ROUND1, OWN-POISON1, OWN-GQA1, OWN-LENGTH1. Differs: weights are rounded to query's
        dtype before they meet V and are divided, as the profiles fp16 and bf16 permit. On tensor
        cores a product of float32 is three of TF32, to 2^-22 of its size; numbers below 2^-114
        lose more, and weights below 2^-126 are 0. Kernel "ffma" loses neither.

        S = softcap(scale · Q Kᵀ) + alibi + bias;  O = softmax(S) V

    The same bits in every run, and for an item or a head whatever stands beside it.

    Args:
        query: Q, (..., h, n_q, d_k), at most four axes, float16, bfloat16 or float32.
        key: K, (..., h_k, n_k, d_k); h is a multiple of h_k.
        value: V, (..., h_k, n_k, d_v). Rows that do not begin at multiples of 16 bytes are copied.
        kernel: one of `FORWARD`: "forward" on tensor cores, at most 256 features, 128 of float32;
            "ffma" by multiply-adds of float32, at most 256; "split" on tensor cores for few
            queries, keys shared out in splits of a fixed size; "hopper" by the instructions of
            compute capability 9.0, in 16 bits. None = the one that is meant (`kernel_for`).
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
        _check_device(kernel)
    candidates = FORWARD if kernel is None else (kernel,)
    problem = problem_of("cuda.attention", query, key, value, options, candidates)
    run_forward(problem, kernel)
    return result_of(problem, query, value)


def kernels(dtype: str) -> list[str]:
    """Return the kernels of `FORWARD` that take a format and run here."""
    return [name for name in FORWARD if most_features(dtype, (name,)) and _runs_here(name)]


def _runs_here(kernel: str) -> bool:
    """Return whether the device runs a kernel; the emulation is any device."""
    return kernel not in HOPPER or bool(machine.absent_device()) or machine.is_hopper()


def _check_device(kernel: str) -> None:
    """Refuse a kernel that the device cannot run."""
    if not _runs_here(kernel):
        raise Unsupported(
            f"the device has compute capability {machine.capability()}, but kernel {kernel} needs "
            f"{machine.HOPPER_CAPABILITY} [cuda.attention]"
        )


def run_forward(problem: Problem, kernel: str | None = None) -> None:
    """Run a problem on the device, or in the emulation where there is none."""
    kernel = kernel or kernel_for(problem)
    about = problem.dtype, problem.features, problem.terms
    if not machine.on_device(problem.output) and machine.absent_device():
        emulated(problem, variant_of(*about, kernel).tile, kernel=kernel)
        return
    problem = mapped(problem) if kernel in HOPPER else problem
    parts: list[Array] = []
    for variant in forward_variants(*about, kernel):
        parts = parts or parts_of(variant, problem)
        writes = parts if variant.kernel == "split" else [problem.output, problem.logsumexp]
        reads = [*problem.arrays, *(parts if variant.kernel == "merge" else [])]
        machine.launch(variant, problem.job, blocks_of(variant, problem), reads, writes)


def parts_of(variant: Variant, problem: Problem) -> list[Array]:
    """Return room for the parts of rows, and tell the job; nothing where a kernel makes none.

    A row has as many parts as warps times splits of the keys, of d_v + 2 numbers of 4 bytes each.
    """
    job, tile, xp = problem.job, variant.tile, array_namespace(problem.output)
    if not tile.split:
        return []
    count = job.batch * job.heads * job.n_q * math.ceil(job.n_k / tile.split) * tile.warps
    outputs = xp.empty((count, job.d_v), dtype=xp.float32)
    states = xp.empty((count, 2), dtype=xp.float32)
    job.part_outputs, job.part_states = address(outputs), address(states)
    return [outputs, states]


def kernel_for(problem: Problem) -> str:
    """Return the kernel that is meant for a problem; it depends neither on the batch nor on n_k.

    It is "split" where the queries that read the same keys fit one of its tiles; else a Hopper's
    own for its heads of more than 32 features, of which one of 32 would be half of zeros; else the
    first of `FORWARD` with a variant: tensor cores, but for heads of float32 whose parts do
    not fit registers.
    """
    about = problem.dtype, problem.features, problem.terms
    rows = problem.job.n_q * problem.job.heads // max(1, problem.job.key_heads)
    if has_variant(*about, "split") and rows <= variant_of(*about, "split").tile.rows:
        return "split"
    if has_variant(*about, "hopper") and problem.features > FEATURES[0] and machine.is_hopper():
        return "hopper"
    return next(kernel for kernel in FORWARD if has_variant(*about, kernel))


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
    maps, parts = None, list[Array]()
    if kernel in HOPPER:
        problem = mapped(problem)
    for variant in forward_variants(problem.dtype, problem.features, problem.terms, kernel):
        variant = variant._replace(tile=tile)
        code, blocks = emulate.compiled(variant, texts), blocks_of(variant, problem)
        if kernel in HOPPER:
            maps = maps_of(variant, problem.job)
        parts = parts or parts_of(variant, problem)
        for part in parts if variant.kernel == "split" else ():
            part.fill(math.nan)  # what nobody writes is no number
        reads = [*problem.arrays, *(parts if variant.kernel == "merge" else [])]
        emulate.launch(code, problem.job, blocks, reads, maps=maps, backwards=backwards)


def blocks_of(variant: Variant, problem: Problem) -> int:
    """Return the blocks of the grid: one a tile of queries, of every head of every item.

    Where keys are split, one a tile of the rows that read them and a split; and then one for as
    many rows as there are warps.
    """
    job, tile = problem.job, variant.tile
    if variant.kernel == "merge":
        return -(-int(job.batch * job.heads * job.n_q) // tile.warps)
    if variant.kernel == "split":
        rows = job.n_q * job.heads // max(1, job.key_heads)
        tiles, splits = math.ceil(rows / tile.rows), math.ceil(job.n_k / tile.split)
        return int(job.batch * job.key_heads * tiles * splits)
    return int(job.batch * job.heads * math.ceil(job.n_q / tile.rows))


def result_of(problem: Problem, query: Array, value: Array) -> AttentionResult:
    """Return what a problem holds after it ran, in the shapes of the reference."""
    shape: tuple[Any, ...] = (*query.shape[:-1], value.shape[-1])
    output = problem.output[..., : value.shape[-1]].view(query.dtype)
    return AttentionResult(output.reshape(shape), problem.logsumexp.reshape(query.shape[:-1]))
