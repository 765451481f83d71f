"""The scalar rules, bound for kernels of one format, and the rules of a cell that read arrays."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from refattn import rules
from refattn_gpu.device import leaf

sees, keys_seen, rows_seeing = leaf(rules.sees), leaf(rules.keys_seen), leaf(rules.rows_seeing)
key_head, query_head, steps = leaf(rules.key_head), leaf(rules.query_head), leaf(rules.steps)
soften, softcap_slope = leaf(rules.soften), leaf(rules.softcap_slope)
rescale = leaf(rules.rescale)


@leaf
def entry(array, b, h, i, j):
    """Return a cell of a mask or a bias, whose axes of size 1 stand for every index."""
    return array[
        b if array.shape[0] > 1 else 0,
        h if array.shape[1] > 1 else 0,
        i if array.shape[2] > 1 else 0,
        j if array.shape[3] > 1 else 0,
    ]


def cell_rules(real: Any) -> SimpleNamespace:
    """Return the rules of a cell for kernels that compute in a format.

    Args:
        real: NumPy's type of the format.

    Returns:
        allowed, logit, dropped, gradients: device functions.
    """
    lowest, zero, one = real(-float("inf")), real(0), real(1)

    @leaf
    def allowed(band, terms, b, h, i, j):
        """Return whether query row i may read key row j.

        Spec: OWN-MASK1, OWN-CAUSAL1, OWN-WINDOW1, OWN-LENGTH1, OWN-BIAS1.
        """
        if i >= band.query_lengths[b] or j >= band.key_lengths[b]:
            return False
        if not sees(band.left, band.right, band.offsets[b] + i, j):
            return False
        if terms.mask.size and not entry(terms.mask, b, h, i, j):
            return False
        return not (terms.bias.size and entry(terms.bias, b, h, i, j) == lowest)

    @leaf
    def added(band, terms, b, h, i, j):
        """Return what is added to a product: the bias, and ALiBi's.

        Spec: OWN-BIAS1, ALIBI-S3a, OWN-ALIBI1.
        """
        total = zero
        if terms.bias.size:
            total = entry(terms.bias, b, h, i, j)
        if terms.slopes.size:
            total += terms.slopes[h] * real(steps(terms.distance, band.offsets[b] + i, j))
        return total

    @leaf
    def logit(band, terms, b, h, i, j, product):
        """Return the logit of a cell from q · k.

        Spec: VAS-EQ1, OWN-SOFTCAP1, OWN-BIAS1, ALIBI-FN10.
        """
        x = product * terms.scale
        if terms.softcap_order == 1:  # before the bias
            x = soften(x, terms.softcap)
        if terms.bias.size or terms.slopes.size:
            x += added(band, terms, b, h, i, j)
        if terms.softcap_order == 2:  # after it
            x = soften(x, terms.softcap)
        return x

    @leaf
    def bend(band, terms, b, h, i, j, product):
        """Return the derivative of the softcap at a cell.

        Spec: OWN-SOFTCAP1, OWN-BACKWARD1.
        """
        if terms.softcap_order == 0:
            return one
        x = product * terms.scale
        if terms.softcap_order == 2:
            x += added(band, terms, b, h, i, j)
        return softcap_slope(x, terms.softcap, one)

    @leaf
    def dropped(terms, b, h, i, j, weight):
        """Return a weight after dropout.

        Spec: FA1-ALG2 line 14, OWN-DROPOUT1.
        """
        if not terms.keep.size:
            return weight
        return weight * terms.kept if entry(terms.keep, b, h, i, j) else weight * zero

    @leaf
    def gradients(band, terms, b, h, i, j, product, dP, L, D):
        """Return a cell's weight after dropout, and its gradients.

        Spec: FA1-ALG4 lines 11-20, OWN-BACKWARD1.

        Args:
            band: of the attention.
            terms: likewise.
            b: batch item of the cell.
            h: query head.
            i: query row.
            j: key row.
            product: q · k.
            dP: dO · v.
            L: logsumexp of the row.
            D: D - dL of the row.

        Returns:
            weight: P after dropout.
            d_added: of what is added to the logit.
            d_product: of q · k.
        """
        S = logit(band, terms, b, h, i, j, product)  # lines 11 and 12
        P = math.exp(S - L)  # line 13
        dP = dropped(terms, b, h, i, j, dP)  # lines 14 and 18
        dS = P * (dP - D)  # line 20
        dX = dS * bend(band, terms, b, h, i, j, product)
        d_added = dX if terms.softcap_order == 2 else dS
        return dropped(terms, b, h, i, j, P), d_added, dX * terms.scale  # line 15

    return SimpleNamespace(allowed=allowed, logit=logit, dropped=dropped, gradients=gradients)
