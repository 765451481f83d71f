"""The modules, written apart from the reference, into which known faults can be planted.

Plain NumPy, one item after the other, forward only; gradients are left to the vectors' other
outputs. With no fault planted, this text must agree with every certified output.
"""

import math

import numpy as np
from scipy import special

CAUSAL_FAULTS = (
    *("not_causal", "causal_strict", "mask_after_softmax", "view_without_transpose"),
    *("heads_interleaved", "scale_missing", "scale_of_model", "keys_and_values_swapped"),
    *("weight_transposed", "bias_missing", "bias_of_output_missing", "merge_without_transpose"),
    *("keep_ignored", "keep_not_scaled", "output_keep_ignored", "bias_after_dropout"),
)
"""Faults of the causal module."""

GATED_FAULTS = (
    *("gate_without_tanh", "gates_swapped", "residual_missing", "text_not_normed"),
    *("media_not_normed", "variance_unbiased", "epsilon_on_deviation", "beta_missing"),
    *("second_norm_of_the_text", "preceding_for_immediate", "immediate_for_preceding"),
    *("marker_sees_the_last_medium", "leak_uniform", "leak_everything", "no_leak"),
    *("cached_ignored", "feed_forward_not_closed", "relu", "gelu_by_tanh", "gelu_for_relu"),
    *("scale_ignored", "feed_forward_missing", "attention_missing", "one_gate_for_all"),
)
"""Faults of the gated block."""


def run(case, fault=""):
    """Return the output of a case, in float64."""
    x = {n: a if a.dtype == bool else a.astype(np.float64) for n, a in case.inputs.items()}
    body = causal if case.op == "causal_module" else gated
    return body(x, {**case.parameters, **case.conventions}, fault)


def softmax(S):
    e = np.exp(S - S.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def to_heads(rows, heads, fault):
    n, e = rows.shape
    if fault == "view_without_transpose":
        return rows.reshape(heads, n, e // heads)
    if fault == "heads_interleaved":
        return rows.reshape(n, e // heads, heads).transpose(2, 0, 1)
    return rows.reshape(n, heads, e // heads).transpose(1, 0, 2)


def causal(x, p, fault):
    b, n, e = x["x"].shape
    heads, outputs = p["heads"], []
    W = x["w_qkv"]
    if fault == "weight_transposed":
        W = np.hstack([part.T for part in np.split(W, 3, axis=1)])
    for item in range(b):
        qkv = x["x"][item] @ W
        if fault != "bias_missing":
            qkv = qkv + x.get("b_qkv", 0.0)
        Q, K, V = (to_heads(part, heads, fault) for part in np.split(qkv, 3, axis=1))
        if fault == "keys_and_values_swapped":
            K, V = V, K
        scale = {"scale_missing": 1.0, "scale_of_model": 1 / math.sqrt(e)}
        S = Q @ K.swapaxes(1, 2) * scale.get(fault, 1 / math.sqrt(e // heads))
        allowed = np.tri(n, k=-1 if fault == "causal_strict" else 0, dtype=bool)
        allowed[0, 0] = True
        if fault == "mask_after_softmax":
            P = softmax(S) * allowed
        else:
            P = softmax(S if fault == "not_causal" else np.where(allowed, S, -np.inf))
        if "keep" in x and fault != "keep_ignored":
            P = P * x["keep"][item]
            P = P if fault == "keep_not_scaled" else P / p["keep_probability"]
        Y = P @ V
        Y = Y if fault == "merge_without_transpose" else Y.transpose(1, 0, 2)
        outputs.append(_out(Y.reshape(n, e), x, p, item, fault))
    return np.stack(outputs)


def _out(Y, x, p, item, fault):
    Z = Y @ x["w_output"] if "w_output" in x else Y
    bias = 0.0 if fault == "bias_of_output_missing" else x.get("b_output", 0.0)
    late = fault == "bias_after_dropout"
    Z = Z if late else Z + bias
    if "output_keep" in x and fault != "output_keep_ignored":
        Z = Z * x["output_keep"][item] / p["output_keep_probability"]
    return Z + bias if late else Z


def norm(rows, weight, bias, epsilon, fault):
    centred = rows - rows.mean(axis=-1, keepdims=True)
    variance = (centred**2).sum(axis=-1, keepdims=True)
    variance = variance / (rows.shape[-1] - (fault == "variance_unbiased"))
    deviation = np.sqrt(variance + epsilon)
    if fault == "epsilon_on_deviation":
        deviation = np.sqrt(variance) + math.sqrt(epsilon)
    return centred / deviation * weight + (0.0 if fault == "beta_missing" else bias)


def activated(U, kind, fault):
    if fault == "relu":
        return np.maximum(U, 0)
    if kind == "gelu" and fault == "gelu_by_tanh":
        return 0.5 * U * (1 + np.tanh(math.sqrt(2 / math.pi) * (U + 0.044715 * U**3)))
    if kind == "gelu" or fault == "gelu_for_relu":
        return 0.5 * U * (1 + special.erf(U / math.sqrt(2)))
    return np.maximum(U, 0) ** 2


def _phi(x, p, item, n, fault):
    if "media_locations" not in x:
        return None
    marks = x["media_locations"][item].astype(int)
    if p["cached_media"] and fault != "cached_ignored":
        return np.full(n, marks.sum())
    phi = np.cumsum(marks)
    phi = phi - marks if fault == "marker_sees_the_last_medium" else phi
    return np.resize(phi, n)


def _seen(x, p, item, n, m, fault):
    """Return the allowed media (n, m), and the rows that no medium precedes."""
    phi = _phi(x, p, item, n, fault)
    if phi is None:
        return np.ones((n, m), dtype=bool), np.zeros(n, dtype=bool)
    order = np.arange(1, m + 1)
    immediate = p["attend"] == "immediate"
    immediate = immediate or fault == "immediate_for_preceding"
    immediate = immediate and fault != "preceding_for_immediate"
    seen = phi[:, None] == order if immediate else phi[:, None] >= order
    return seen, phi == 0


def _leak(p, fault):
    named = {"leak_uniform": "uniform", "leak_everything": "everything", "no_leak": "zero"}
    return named.get(fault, p["before_media"])


def gated(x, p, fault):
    outputs = []
    b, n, _ = x["query_input"].shape
    m, n_m, e_m = x["media"].shape[1:]
    gates = [np.tanh(x[name]) for name in ("attention_gate", "feed_forward_gate")]
    if fault == "gate_without_tanh":
        gates = [x[name] for name in ("attention_gate", "feed_forward_gate")]
    if fault == "gates_swapped":
        gates.reverse()
    if fault == "one_gate_for_all":
        gates[1] = gates[0]
    for item in range(b):
        Y, tokens = x["query_input"][item], x["media"][item].reshape(-1, e_m)
        seen, before = _seen(x, p, item, n, m, fault)
        if "media_norm_weight" in x and fault != "media_not_normed":
            weights = (x["media_norm_weight"], x["media_norm_bias"])
            tokens = norm(tokens, *weights, p["norm_epsilon"], fault)
        text = norm(Y, x["norm_weight"], x["norm_bias"], p["norm_epsilon"], fault)
        text = Y if fault == "text_not_normed" else text
        A = _attend(x, p, text, tokens, np.repeat(seen, n_m, axis=1), before, fault)
        A = 0.0 if fault == "attention_missing" else A
        middle = (0.0 if fault == "residual_missing" else Y) + gates[0] * A
        weights = (x["feed_forward_norm_weight"], x["feed_forward_norm_bias"])
        base = Y if fault == "second_norm_of_the_text" else middle
        U = norm(base, *weights, p["norm_epsilon"], fault) @ x["w_up"]
        F = activated(U, p["activation"], fault) @ x["w_down"]
        if _leak(p, fault) == "everything" and fault != "feed_forward_not_closed":
            F = np.where(before[:, None], 0.0, F)
        outputs.append(middle + (0.0 if fault == "feed_forward_missing" else gates[1] * F))
    return np.stack(outputs)


def _attend(x, p, text, tokens, seen, before, fault):
    total, leak = 0.0, _leak(p, fault)
    for h in range(len(x["w_query"])):
        Q, K, V = text @ x["w_query"][h], tokens @ x["w_key"][h], tokens @ x["w_value"][h]
        scale = p.get("scale", 1 / math.sqrt(Q.shape[1]))
        scale = 1 / math.sqrt(Q.shape[1]) if fault == "scale_ignored" else scale
        S = Q @ K.T * scale
        allowed = seen | (before[:, None] & (leak == "everything"))
        empty = ~allowed.any(axis=1, keepdims=True)
        P = softmax(np.where(allowed | empty, S, -np.inf))
        fill = 1 / S.shape[1] if leak == "uniform" else 0.0
        P = np.where(empty, fill * np.ones_like(P), P)
        total = total + P @ V @ x["w_output"][h]
    return total
