"""Why rotated products fade with distance: the paper's complex sum, and its bound.

Summation by parts splits the product of a query and a key into differences of their features,
which do not depend on the distance, and sums of phases, which do.
"""

from __future__ import annotations

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import OptionError, check_floats, check_shapes
from refattn.rope import table_dtype
from refattn.rope_tables import rope_tables


def rope_decay(distances: Array, *, d: int, base: float = 10000.0, dtype: str = "float64") -> Array:
    """Return the mean magnitude of the phase sums: how far the bound fades with distance.

    Spec: ROPE-EQ37.

        decay(s) = 1/(d/2) Σ_{i=1}^{d/2} |S_i|,  S_i = Σ_{j<i} e^{i s θ_j}

    Args:
        distances: s = m - n, (k,), integers, tokens.
        d: number of features, even.
        base: base of the frequencies.
        dtype: "float64" or "float32", of the result.

    Returns:
        decay: (k,).

    Raises:
        OptionError: d is odd, or an option is refused.
        DtypeError: distances are not integers.
    """
    S = phase_sums(distances, d=d, base=base, dtype=dtype)
    xp = array_namespace(S)
    return xp.sum(xp.abs(S), axis=-1) / (d // 2)


def phase_sums(distances: Array, *, d: int, base: float = 10000.0, dtype: str = "float64") -> Array:
    """Return the partial sums of the phases of every distance.

    Spec: ROPE-EQ36, OWN-ROPE5.

        S_j = Σ_{i=0}^{j-1} e^{i s θ_i},  j = 1 ... d/2

    Args:
        distances: s = m - n, (..., k), integers, tokens.
        d: number of features, even.
        base: base of the frequencies.
        dtype: "float64" or "float32": complex numbers of two such.

    Returns:
        S: (..., k, d/2), complex.

    Raises:
        OptionError: d is odd, or an option is refused.
        DtypeError: distances are not integers.
    """
    phases = _phases(distances, d, base, dtype)
    return array_namespace(phases).cumulative_sum(phases, axis=-1)


@np.errstate(all="ignore")
def complex_scores(query: Array, key: Array, distances: Array, *, base: float = 10000.0) -> Array:
    """Return the products of rotated queries and keys as a sum of complex numbers.

    Spec: ROPE-EQ35, OWN-ROUND1.

        (R_m q)ᵀ (R_n k) = Re Σ_{i=0}^{d/2-1} h_i e^{i(m-n)θ_i},  h_i = q_[2i:2i+1] k*_[2i:2i+1]

    Args:
        query: q, (k, d), d even, one row a distance.
        key: k, (k, d).
        distances: m - n, (k,), integers, tokens.
        base: base of the frequencies.

    Returns:
        scores: (k,), in query's dtype.

    Raises:
        RefattnError: two shapes do not fit, dtypes differ, or an option is refused.
    """
    q, k = _pairs("complex_scores", query, key, distances)
    xp = array_namespace(query)
    phases = _phases(distances, query.shape[-1], base, table_dtype(query))
    return narrow(xp.real(xp.sum(q * xp.conj(k) * phases, axis=-1)), query)


@np.errstate(all="ignore")
def complex_scores_backward(
    d_scores: Array, query: Array, key: Array, distances: Array, *, base: float = 10000.0
) -> tuple[Array, Array]:
    """Return the gradients of the complex sum.

    Spec: ROPE-EQ35, OWN-ROUND1.

        dq_i = ds k_i e^{-i(m-n)θ_i};  dk_i = ds q_i e^{i(m-n)θ_i},  pairs as complex numbers

    Args:
        d_scores: ds, (k,).
        query: as in `complex_scores`, and so are all others.
        key: (k, d).
        distances: (k,).
        base: base of the frequencies.

    Returns:
        d_query, d_key: (k, d).

    Raises:
        RefattnError: as `complex_scores`.
    """
    name = "complex_scores_backward"
    check_shapes(name, d_scores=(d_scores, "k"), query=(query, "k d"))
    check_floats(name, query=query, d_scores=d_scores)
    q, k = _pairs(name, query, key, distances)
    xp = array_namespace(query)
    phases = _phases(distances, query.shape[-1], base, table_dtype(query))
    ds = widen(d_scores)[:, None]
    return _features(ds * (k * xp.conj(phases)), query), _features(ds * (q * phases), key)


@np.errstate(all="ignore")
def abel_scores(query: Array, key: Array, distances: Array, *, base: float = 10000.0) -> Array:
    """Return the same products after summation by parts.

    Spec: ROPE-EQ36, OWN-ROUND1.

        Σ h_i (S_{i+1} - S_i) = -Σ S_{i+1} (h_{i+1} - h_i),  h_{d/2} = 0, S_0 = 0

    Args:
        query: as in `complex_scores`, and so are all others.
        key: (k, d).
        distances: (k,).
        base: base of the frequencies.

    Returns:
        scores: (k,), the real part, in query's dtype.

    Raises:
        RefattnError: as `complex_scores`.
    """
    steps = _feature_steps("abel_scores", query, key, distances)
    xp = array_namespace(query)
    S = phase_sums(distances, d=query.shape[-1], base=base, dtype=table_dtype(query))
    return narrow(-xp.real(xp.sum(S * steps, axis=-1)), query)


@np.errstate(all="ignore")
def score_bound(query: Array, key: Array, distances: Array, *, base: float = 10000.0) -> Array:
    """Return the bound of the products that fades with distance.

    Spec: ROPE-EQ37, OWN-ROUND1.

        |Σ S_{i+1} (h_{i+1} - h_i)| ≤ max_i |h_{i+1} - h_i| · Σ_{i=0}^{d/2-1} |S_{i+1}|

    Args:
        query: as in `complex_scores`, and so are all others.
        key: (k, d).
        distances: (k,).
        base: base of the frequencies.

    Returns:
        bound: (k,), in query's dtype.

    Raises:
        RefattnError: as `complex_scores`.
    """
    steps = _feature_steps("score_bound", query, key, distances)
    xp = array_namespace(query)
    S = phase_sums(distances, d=query.shape[-1], base=base, dtype=table_dtype(query))
    return narrow(xp.max(xp.abs(steps), axis=-1) * xp.sum(xp.abs(S), axis=-1), query)


def _phases(distances: Array, d: int, base: float, dtype: str) -> Array:
    """Return e^{i s θ} for every distance and frequency, (..., k, d/2)."""
    tables = rope_tables(distances, rotary_dim=d, base=base, dtype=dtype)
    return tables.cosine + 1j * tables.sine


def _pairs(function: str, query: Array, key: Array, distances: Array) -> tuple[Array, Array]:
    """Return queries and keys as complex numbers, (k, d/2)."""
    sizes = check_shapes(
        function, query=(query, "k d"), key=(key, "k d"), distances=(distances, "k")
    )
    check_floats(function, query=query, key=key)
    if sizes["d"] % 2:
        raise OptionError(f"query has d={sizes['d']}, but d must be even [{function}]")
    q, k = widen(query), widen(key)
    return q[:, 0::2] + 1j * q[:, 1::2], k[:, 0::2] + 1j * k[:, 1::2]


def _feature_steps(function: str, query: Array, key: Array, distances: Array) -> Array:
    """Return h_{i+1} - h_i for i = 0 ... d/2-1, with h_{d/2} = 0, (k, d/2)."""
    q, k = _pairs(function, query, key, distances)
    xp = array_namespace(query)
    h = q * xp.conj(k)
    return xp.concat([h[:, 1:], xp.zeros_like(h[:, :1])], axis=-1) - h


def _features(pairs: Array, like: Array) -> Array:
    """Return complex numbers (k, d/2) as features (k, d) of the dtype of `like`."""
    xp = array_namespace(pairs)
    both = xp.stack([xp.real(pairs), xp.imag(pairs)], axis=-1)
    return narrow(xp.reshape(both, like.shape), like)
