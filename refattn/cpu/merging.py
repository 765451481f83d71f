"""Merging what the queries of one key-value head found in the parts of its keys, in their order.

A part's result is a row of numbers: the output not divided by its sum, whole vectors, then one
vector that begins with the largest logit and the sum.
"""

from __future__ import annotations

import math

from numba import njit, types

from refattn.cpu.copying import fill
from refattn.cpu.plan import head_reading, to_powers
from refattn.cpu.products import up
from refattn.cpu.simd import advance, fma, lane_count, load, pointer, splat, store


@njit(error_model="numpy")
def leave_part(zero, numbers, rows, parts, row_step, d):
    """Write that some rows see no key of a part."""
    for r in range(rows):
        fill(zero, advance(parts, r * row_step), 0, 1, d + lane_count(zero))
        parts[r * row_step + d] = -numbers.infinity


@njit(error_model="numpy")
def merge_parts(zero, numbers, factor, sunk, sink, parts, count, d, O):
    """Merge the parts of one query into O, and return its logsumexp.

    Spec: FA1-ALG1 lines 11-13, OWN-SINK1, OWN-EMPTY1.
    """
    stride = d + lane_count(zero)
    m = -numbers.infinity
    for s in range(count):
        m = max(m, parts[s * stride + d])
    shift, top = m if m > -numbers.infinity else zero, m * factor
    total = rest = zero
    if sunk and sink > -numbers.infinity:
        top = max(top, sink * numbers.log2_e)
        total += 2.0 ** (sink * numbers.log2_e - top)
        rest = shift * factor - top
    fill(zero, O, 0, 1, d)
    for s in range(count):
        at = s * stride
        parts[at + d] = 2.0 ** ((parts[at + d] - shift) * factor + rest)
        weight = parts[at + d]
        total += weight * parts[at + d + 1]
        for x in range(0, d, lane_count(zero)):
            store(O, x, fma(splat(weight), load(parts, at + x), load(O, x)))
    if total != zero:
        for x in range(d):
            O[x] /= total
    return top * 0.6931471805599453 + math.log(types.float64(total))


@njit(error_model="numpy")
def merge_head(zero, plan, numbers, b, g, sinks, valid, parts, count, O):
    """Write output and logsumexp of every query that reads one key-value head.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: likewise.
        b: batch item.
        g: key-value head.
        sinks: by query head.
        valid: query rows within the query length; the others saw nothing.
        parts: results of the head, (heads of the group · valid, count, ...), by pointer.
        count: parts.
        O: scratch, a row of the output in whole vectors, by pointer.
    """
    group, d = plan.heads // plan.key_heads, up(plan.d_v, lane_count(zero))
    factor = to_powers(plan, numbers)
    L, out = pointer(plan.logsumexp, zero), pointer(plan.output.address, zero)
    for member in range(group):
        h = head_reading(plan, g, member)
        for i in range(plan.n_q):
            seen, r = count if i < valid else 0, member * valid + i
            found = advance(parts, r * count * (d + lane_count(zero)))
            at = (b * plan.heads + h) * plan.n_q + i
            sunk, sink = plan.sinks != 0, sinks[h]
            L[at] = merge_parts(zero, numbers, factor, sunk, sink, found, seen, d, O)
            for x in range(plan.d_v):
                out[at * plan.d_v + x] = O[x]
