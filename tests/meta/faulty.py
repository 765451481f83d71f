"""A plain attention, written apart from the reference, into which known faults can be planted.

Each fault is modelled on bugs that were found in public attention code; its name says what is
wrong. With no fault planted, this text must agree with every certified vector it is run on.
"""

import math

import ml_dtypes
import numpy as np

TILE = 16
"""Rows of a tile in the faults that only tiled code can have."""

FORWARD_FAULTS = (
    *("causal_topleft", "causal_strict", "causal_plus1", "q_index_local", "causal_forced"),
    *("causal_dropped_with_mask", "mask_dropped_with_causal", "mask_inverted", "mask_added_as_01"),
    *("mask_batch0", "mask_head0", "mask_first_tile", "mask_row0", "mask_finite_min"),
    *("mask_to_prefix_length", "window_left_plus1", "window_left_minus1", "window_right_dropped"),
    *("window_zero_unlimited", "window_dropped_in_decode", "window_offset_lost"),
    *("empty_nan", "empty_mean", "sentinel_maximum", "payload_leak", "tail_padded_with_zero"),
    *("tail_tile_skipped", "causal_loop_floor", "no_rescale", "row_sum_not_rescaled"),
    *("normalised_each_tile", "constant_maximum", "row_sum_half", "logits_half", "output_half"),
    *("weights_bfloat16", "inputs_10_bits", "lse_base2", "lse_without_maximum", "lse_empty_inf"),
    *("lse_empty_zero", "lse_without_sink", "scale_missing", "scale_ignored", "scale_from_d_v"),
    *("scale_on_bias", "alibi_sign", "alibi_not_absolute", "alibi_offset_lost", "alibi_dropped"),
    *("alibi_distance_bfloat16", "softcap_formula", "softcap_after_bias", "softcap_ignored"),
    *("heads_tiled", "heads_divided_by_kv", "features_64_only", "sink_dropped", "sink_by_row"),
    *("keep_ignored", "keep_not_scaled", "bottom_right_by_maximum", "bias_ignored"),
    *("key_lengths_ignored", "last_key_dropped"),
)
"""Faults of the forward pass."""

BACKWARD_FAULTS = (
    *("causal_ignored", "group_not_summed", "dropout_scaled_by_p", "gradient_not_dropped"),
    *("delta_sign", "delta_dropped", "d_lse_ignored", "softcap_factor_missing", "d_bias_scaled"),
    *("d_bias_not_summed", "sink_not_in_weights", "d_sink_zero", "d_query_unscaled"),
    *("d_value_from_undropped", "d_slopes_unsigned"),
)
"""Faults of the backward pass; the forward pass stays right."""


def _offsets(case, inputs, fault):
    b, _, n_q, _ = inputs["query"].shape
    n_k = inputs["key"].shape[2]
    alignment = case.conventions.get("alignment", "top_left")
    if alignment == "top_left":
        return np.zeros(b, dtype=int)
    if alignment == "bottom_right":
        if fault == "bottom_right_by_maximum":
            return np.full(b, n_k - n_q)
        keys = inputs.get("key_lengths", np.full(b, n_k))
        return keys - inputs.get("query_lengths", np.full(b, n_q))
    return np.broadcast_to(np.asarray(alignment), (b,))


def _relative(case, inputs, fault):
    """Return j - p_i as (b, 1, n_q, n_k)."""
    n_q, n_k = inputs["query"].shape[2], inputs["key"].shape[2]
    i = np.arange(n_q)[:, None]
    if fault == "q_index_local":
        i = i % TILE
    return np.arange(n_k) - (i + _offsets(case, inputs, fault)[:, None, None, None])


def _mask(case, inputs, fault):
    query = inputs["query"]
    b, h, n_q, _ = query.shape
    n_k = inputs["key"].shape[2]
    mask = np.broadcast_to(inputs["mask"], (b, h, n_q, n_k)).copy()
    given = np.broadcast_to(mask, mask.shape).copy()
    if fault == "mask_inverted":
        return ~mask
    if fault == "mask_batch0":
        mask[:] = given[:1]
    if fault == "mask_head0":
        mask[:, 1:] = True
    if fault == "mask_first_tile":
        mask[..., TILE:] = True
    if fault == "mask_row0":
        mask[..., 1:, :] = True
    if fault == "mask_to_prefix_length":
        mask = np.arange(n_k) < given.sum(axis=-1, keepdims=True)
    return mask


def _allowed(case, inputs, fault):
    parameters, query = case.parameters, inputs["query"]
    shape = (*query.shape[:3], inputs["key"].shape[2])
    relative = _relative(case, inputs, fault)
    allowed = np.ones(shape, dtype=bool)
    causal = parameters.get("causal", False) or fault == "causal_forced"
    if causal and not (fault == "causal_dropped_with_mask" and "mask" in inputs):
        r = relative
        if fault == "causal_topleft":
            r = r + _offsets(case, inputs, fault)[:, None, None, None]
        limit = {"causal_strict": -1, "causal_plus1": 1}.get(fault, 0)
        allowed &= r <= limit
        if fault == "causal_loop_floor":
            position = np.arange(shape[3]) - r + 1
            allowed &= np.arange(shape[3]) < position // TILE * TILE
    if parameters.get("window") is not None:
        allowed &= _window(case, inputs, relative, causal, fault)
    if "mask" in inputs and fault not in ("mask_added_as_01",):
        if not (fault == "mask_dropped_with_causal" and causal):
            allowed &= _mask(case, inputs, fault)
    if "bias" in inputs:
        allowed &= inputs["bias"] != -np.inf
    if "key_lengths" in inputs and fault != "key_lengths_ignored":
        allowed &= np.arange(shape[3]) < inputs["key_lengths"][:, None, None, None]
    if "query_lengths" in inputs:
        allowed &= np.arange(shape[2])[:, None] < inputs["query_lengths"][:, None, None, None]
    if fault == "tail_tile_skipped" and shape[3] > TILE:
        allowed[..., shape[3] // TILE * TILE :] = False
    if fault == "last_key_dropped":
        allowed[..., -1] = False
    return allowed


def _window(case, inputs, relative, causal, fault):
    left, right = case.parameters["window"]
    if fault == "window_dropped_in_decode" and relative.shape[2] == 1:
        return True
    if fault == "window_offset_lost":
        relative = relative + _offsets(case, inputs, fault)[:, None, None, None]
    if fault == "window_left_plus1" and left is not None:
        left += 1
    if fault == "window_left_minus1" and left is not None:
        left -= 1
    if (fault == "window_right_dropped" and not causal) or right is None:
        right = relative.size
    if left is None or (fault == "window_zero_unlimited" and left == 0):
        left = relative.size
    return (relative >= -left) & (relative <= right)


def _to_heads(array, h, conventions, fault):
    """Key-value heads as the query heads read them."""
    h_k = array.shape[1]
    group = h // h_k
    head = np.arange(h)
    tiled = conventions.get("head_map") == "tile"
    if fault == "heads_tiled":
        tiled = not tiled
    owner = head % h_k if tiled else head // group
    if fault == "heads_divided_by_kv":
        owner = np.minimum(head // h_k, h_k - 1)
    return array[:, owner], owner


def _logits(case, inputs, fault):
    """Return S and what the softcap acted on, in the working dtype."""
    q, parameters, conventions = inputs["query"], case.parameters, case.conventions
    k, _ = _to_heads(inputs["key"], q.shape[1], conventions, fault)
    d_v = inputs["value"].shape[-1]
    if fault == "features_64_only":
        q, k = q[..., :64], k[..., :64]
    if fault == "inputs_10_bits":
        q, k = (_truncate(a) for a in (q, k))
    scale = parameters.get("scale", 1 / math.sqrt(inputs["query"].shape[-1]))
    if fault == "scale_ignored":
        scale = 1 / math.sqrt(inputs["query"].shape[-1])
    if fault == "scale_from_d_v":
        scale = 1 / math.sqrt(d_v)
    if fault == "scale_missing":
        scale = 1.0
    X = (q @ k.swapaxes(-1, -2)).astype(q.dtype)
    if fault == "logits_half":
        X = X.astype(np.float16).astype(q.dtype)
    X = X * q.dtype.type(scale)
    added = np.zeros_like(X)
    if "slopes" in inputs and fault != "alibi_dropped":
        added = added + _alibi(case, inputs, fault)
    if "bias" in inputs and fault != "bias_ignored":
        added = added + np.where(inputs["bias"] == -np.inf, 0, inputs["bias"])
    if fault == "scale_on_bias":
        added = added * q.dtype.type(scale)
    if fault == "mask_added_as_01" and "mask" in inputs:
        added = added + inputs["mask"]
    cap = parameters.get("softcap")
    if cap is None or fault == "softcap_ignored":
        return X + added, X
    before = conventions.get("softcap_order", "before_bias") == "before_bias"
    if fault == "softcap_after_bias":
        before = not before
    front = X if fault == "softcap_formula" else cap
    if before:
        return (front * np.tanh(X / cap)).astype(q.dtype) + added, X
    X = X + added
    return ((X if fault == "softcap_formula" else cap) * np.tanh(X / cap)).astype(q.dtype), X


def _truncate(array):
    """Keep 11 significant bits, as TF32 does."""
    bits = array.astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(array.dtype)


def _alibi(case, inputs, fault):
    form = case.conventions.get("distance", "absolute")
    r = _relative(case, inputs, fault)
    if fault == "alibi_offset_lost":
        r = r + _offsets(case, inputs, fault)[:, None, None, None]
    steps = {"absolute": -np.abs(r), "signed": r, "column": np.arange(r.shape[-1])}[form]
    if fault == "alibi_not_absolute" and form == "absolute":
        steps = r
    if fault == "alibi_sign":
        steps = -steps
    if fault == "alibi_distance_bfloat16":
        steps = steps.astype(ml_dtypes.bfloat16).astype(np.float64)
    return (inputs["slopes"][:, None, None] * steps).astype(inputs["query"].dtype)


def _row_maximum(S, allowed, sink, fault):
    m = np.where(allowed, S, -np.inf).max(axis=-1, keepdims=True)
    if sink is not None and fault != "sink_dropped":
        m = np.maximum(m, sink)
    if fault == "sentinel_maximum":
        m = np.maximum(m, -5e4)
    if fault == "constant_maximum":
        m = np.full_like(m, 10.0)
    return m


def _weights(case, inputs, S, allowed, fault):
    """P and the logsumexp."""
    h, n_k = S.shape[1], S.shape[-1]
    sink = inputs.get("sinks")
    if sink is not None:
        sink = sink[:, None, None]
        if fault == "sink_by_row":
            sink = inputs["sinks"][np.arange(S.shape[2]) % h][None, :, None]
    if fault == "mask_finite_min":
        S, allowed = np.where(allowed, S, S.dtype.type(-3e38)), np.ones_like(allowed)
    m = _row_maximum(S, allowed, sink, fault)
    shift = m if fault == "empty_nan" else np.where(np.isinf(m), 0, m)
    E = np.where(allowed, np.exp(S - shift), 0).astype(S.dtype)
    if fault == "empty_nan":
        E = np.where(np.isinf(m), np.nan, E)
    ell = E.sum(axis=-1, keepdims=True)
    if fault == "row_sum_half":
        ell = np.cumsum(E.astype(np.float16), axis=-1, dtype=np.float16)[..., -1:].astype(S.dtype)
    if fault == "tail_padded_with_zero":
        ell = ell + (-n_k % TILE) * np.exp(-shift)
    if sink is not None and fault != "sink_dropped":
        ell = ell + np.exp(sink - shift)
    empty = ~allowed.any(axis=-1, keepdims=True)
    if sink is not None:
        empty = np.zeros_like(empty)
    policy = case.conventions.get("empty_row", "zero")
    fill = {"zero": 0.0, "nan": np.nan, "uniform": 1 / n_k}[policy]
    if fault == "empty_mean":
        fill = 1 / n_k
    P = np.where(empty & (fault != "empty_nan"), S.dtype.type(fill), E / ell).astype(S.dtype)
    L = np.where(empty, -np.inf, shift + np.log(ell))
    if fault == "lse_base2":
        L = L / math.log(2)
    if fault == "lse_without_maximum":
        L = np.where(empty, -np.inf, np.log(ell))
    if fault == "lse_empty_inf":
        L = np.where(empty, np.inf, L)
    if fault == "lse_empty_zero":
        L = np.where(empty, 0.0, L)
    if fault == "lse_without_sink" and sink is not None:
        L = shift + np.log(E.sum(axis=-1, keepdims=True))
    return P, L[..., 0].astype(S.dtype)


def _tiled(S, allowed, V, fault):
    """The online softmax with its rescale left out in one of three ways."""
    m = np.full((*S.shape[:3], 1), -np.inf, S.dtype)
    ell, O = np.zeros_like(m), np.zeros((*S.shape[:3], V.shape[-1]), S.dtype)
    for j in range(0, S.shape[-1], TILE):
        cell = allowed[..., j : j + TILE]
        s = np.where(cell, S[..., j : j + TILE], -np.inf)
        new = np.maximum(m, s.max(axis=-1, keepdims=True))
        shift = np.where(np.isinf(new), 0, new)
        rescale = np.where(np.isinf(m), 0, np.exp(np.where(np.isinf(m), 0, m) - shift))
        e = np.where(cell, np.exp(s - shift), 0)
        ell = ell * (1 if fault in ("no_rescale", "row_sum_not_rescaled") else rescale)
        ell = ell + e.sum(axis=-1, keepdims=True)
        O = O * (1 if fault == "no_rescale" else rescale) + e @ V[..., j : j + TILE, :]
        if fault == "normalised_each_tile":
            O = O / np.where(ell == 0, 1, ell)
        m = new
    ell = np.where((ell == 0) | (fault == "normalised_each_tile"), 1, ell)
    return O / ell


def _read(allowed, cells, rows):
    """Σ_j cells_ij rows_j over what may be read."""
    if np.isfinite(rows).all():
        return cells @ rows
    terms = cells[..., None] * rows[..., None, :, :]
    return np.where(allowed[..., None], terms, 0).sum(axis=-2)


def _group_sum(array, owner, h_k, fault):
    summed = np.zeros((array.shape[0], h_k, *array.shape[2:]), array.dtype)
    for head, target in enumerate(owner):
        if fault == "group_not_summed":
            summed[:, target] = array[:, head]
        else:
            summed[:, target] += array[:, head]
    return summed


@np.errstate(all="ignore")
def run(case, fault=None, dtype=np.float32):
    """Return the outputs of an `attention` case as a machine with this fault gives them."""
    inputs = {
        name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in case.inputs.items()
    }
    h = inputs["query"].shape[1]
    V, owner = _to_heads(inputs["value"], h, case.conventions, fault)
    allowed = _allowed(case, inputs, fault)
    S, X = _logits(case, inputs, fault)
    P, L = _weights(case, inputs, S, allowed, fault)
    if case.conventions.get("masked") == "add":  # -∞ does not silence a NaN in its cell
        lost = np.isnan(S).any(axis=-1)
        P, L = np.where(lost[..., None], np.nan, P), np.where(lost, np.nan, L)
    chance = case.parameters.get("keep_probability", 1.0)
    keep = inputs.get("keep", np.ones_like(allowed))
    kept = P if fault == "keep_ignored" else np.where(keep, P, 0)
    dropped = kept if fault == "keep_not_scaled" else (kept / chance).astype(dtype)
    if fault == "weights_bfloat16":
        dropped = dropped.astype(ml_dtypes.bfloat16).astype(dtype)
    filled = allowed | (~allowed.any(-1, keepdims=True) & ("sinks" not in inputs))
    if case.conventions.get("empty_row", "zero") == "zero":
        filled = allowed
    read = np.ones_like(filled) if fault == "payload_leak" else filled
    if case.conventions.get("masked") == "add":
        read = np.ones_like(filled)
    output = _read(read, dropped, V)
    if fault in ("no_rescale", "row_sum_not_rescaled", "normalised_each_tile"):
        output = _tiled(S, allowed, V, fault)
    if fault == "output_half":
        output = output.astype(np.float16)
    outputs = {"output": output.astype(dtype), "logsumexp": L}
    if "d_output" in inputs:
        state = (inputs, V, owner, filled, allowed, S, X, P, L, dropped, keep, chance)
        outputs |= _backward(case, state, fault)
    return outputs


def _backward(case, state, fault):
    inputs, V, owner, filled, allowed, S, X, P, L, dropped, keep, chance = state
    if fault == "causal_ignored" and case.parameters.get("causal"):
        P = np.exp(np.where(np.isfinite(L)[..., None], S - L[..., None], -np.inf))
        filled, dropped = np.ones_like(filled), np.where(keep, P, 0) / chance
    if fault == "sink_not_in_weights" and "sinks" in inputs:
        total = P.sum(axis=-1, keepdims=True)
        P = P / np.where(total == 0, 1, total)
    q, dO = inputs["query"], inputs["d_output"]
    h_k = inputs["key"].shape[1]
    K, _ = _to_heads(inputs["key"], q.shape[1], case.conventions, None)
    if fault == "d_value_from_undropped":
        dropped = P
    if fault == "dropout_scaled_by_p":
        dropped = np.where(keep, P, 0) * chance
    dV = _read(filled.swapaxes(-1, -2), dropped.swapaxes(-1, -2), dO)
    dP = np.where(filled, dO @ V.swapaxes(-1, -2), 0)
    if fault != "gradient_not_dropped":
        dP = np.where(keep, dP, 0)
    dP = dP * chance if fault == "dropout_scaled_by_p" else dP / chance
    D = (P * dP).sum(axis=-1, keepdims=True)
    if fault == "delta_sign":
        D = -D
    if fault == "delta_dropped":
        D = np.zeros_like(D)
    if "d_logsumexp" in inputs and fault != "d_lse_ignored":
        D = D - inputs["d_logsumexp"][..., None]
    empty = ~allowed.any(-1, keepdims=True) & ("sinks" not in inputs)
    dS = P * (dP - D)
    if case.conventions.get("empty_row") == "uniform":
        dS = np.where(empty, 0, dS)
    cap, dX = case.parameters.get("softcap"), dS
    if cap is not None and fault != "softcap_factor_missing":
        dX = np.where(filled, dS * (1 - np.tanh(X / cap) ** 2), 0)
    scale = case.parameters.get("scale", 1 / math.sqrt(q.shape[-1]))
    d_query = _read(filled, dX, K) * (1 if fault == "d_query_unscaled" else scale)
    d_key = _read(filled.swapaxes(-1, -2), dX.swapaxes(-1, -2), q) * scale
    outputs = {
        "d_query": d_query,
        "d_key": _group_sum(d_key, owner, h_k, fault),
        "d_value": _group_sum(dV, owner, h_k, fault),
    }
    after = case.conventions.get("softcap_order") == "after_bias"
    d_added = dX if after else dS
    if "bias" in inputs:
        outputs["d_bias"] = _d_bias(inputs["bias"], d_added, scale, fault)
    if "slopes" in inputs:
        steps = _alibi(case, inputs | {"slopes": np.ones_like(inputs["slopes"])}, None)
        steps = np.abs(steps) if fault == "d_slopes_unsigned" else steps
        outputs["d_slopes"] = (d_added * steps).sum(axis=(0, 2, 3))
    if "sinks" in inputs:
        d_sink = -np.exp(inputs["sinks"][:, None] - L) * D[..., 0]
        outputs["d_sinks"] = d_sink.sum(axis=(0, 2)) * (fault != "d_sink_zero")
    return {name: a.astype(q.dtype) for name, a in outputs.items()}


def _d_bias(bias, d_added, scale, fault):
    lead = d_added.ndim - bias.ndim
    full = (1,) * lead + bias.shape
    axes = tuple(a for a in range(4) if full[a] == 1 and d_added.shape[a] != 1)
    if fault == "d_bias_not_summed":
        summed = d_added[tuple(slice(-1, None) if a in axes else slice(None) for a in range(4))]
    else:
        summed = d_added.sum(axis=axes, keepdims=True)
    return summed.reshape(bias.shape) * (scale if fault == "d_bias_scaled" else 1)
