"""Softmax over the allowed keys of each row, with the results that are exact by structure.

Keys of a row whose logits are exactly equal form a group. A weighted mean over the row is a
rational number if and only if the means of all groups coincide (OWN-EXACT1).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from flint import arb, fmpq

from refattn.certify.exact import ZERO, Value


class Row(NamedTuple):
    """One row of logits: the keys it may attend to, in groups of exactly equal logits."""

    groups: list[list[int]]
    frozen: bool
    """Weights are uniform by policy, whatever the logits: no gradient reaches them."""

    def keys(self) -> list[int]:
        """List the keys of the row."""
        return [j for group in self.groups for j in group]

    def weight(self) -> fmpq | None:
        """Return the common weight 1/k when all logits are equal, else None."""
        return fmpq(1, len(self.groups[0])) if len(self.groups) == 1 else None


class Weights(NamedTuple):
    """The softmax of one row: weights by key, and log Σ exp(S - S_r) of the row's reference r."""

    by_key: dict[int, Value]
    reference: int
    log_sum: Value


def row_of(allowed: Sequence[int], identity: Callable[[int], Hashable]) -> Row:
    """Group the allowed keys of a row by the exact identity of their logits."""
    groups: dict[Hashable, list[int]] = {}
    for j in allowed:
        groups.setdefault(identity(j), []).append(j)
    return Row(list(groups.values()), False)


def uniform_row(count: int) -> Row:
    """Return the row that an empty row becomes under the uniform policy."""
    return Row([list(range(count))], True)


def exact_mean(row: Row, value: Callable[[int], Any]) -> fmpq | None:
    """Return Σ_j P_j x_j if it is rational by structure, else None.

    That is the common mean of x over every group, if there is one.
    """
    first = row.groups[0]
    if len(first) == 1:
        shared = value(first[0])
        for group in row.groups:
            if len(group) == 1:
                if value(group[0]) != shared:
                    return None
            elif sum((value(j) for j in group), 0) != shared * len(group):
                return None
        return fmpq(shared)
    shared = fmpq(sum((value(j) for j in first), 0)) / len(first)
    for group in row.groups[1:]:
        if fmpq(sum((value(j) for j in group), 0)) / len(group) != shared:
            return None
    return shared


def weigh(row: Row, logit: Callable[[int], arb]) -> Weights:
    """Compute the weights of a row at the present precision.

    P_j = exp(S_j - S_r) / Σ_k exp(S_k - S_r),  r a key whose logit is largest or nearly so.
    """
    equal = row.weight()
    if equal is not None:
        keys = row.groups[0]
        log_sum: Value = ZERO if len(keys) == 1 else arb(len(keys)).log()
        return Weights(dict.fromkeys(keys, equal), keys[0], log_sum)
    logits = [(group, logit(group[0])) for group in row.groups]
    top, S_top = logits[0]
    for group, S_g in logits:
        if S_g.mid() > S_top.mid():
            top, S_top = group, S_g
    powers = [(group, (S_g - S_top).exp()) for group, S_g in logits if group is not top]
    rest = sum((e * len(group) for group, e in powers), arb(len(top) - 1))
    inverse = 1 / (1 + rest)
    by_key: dict[int, Value] = dict.fromkeys(top, inverse)
    for group, e in powers:
        by_key.update(dict.fromkeys(group, e * inverse))
    return Weights(by_key, top[0], rest.log1p())
