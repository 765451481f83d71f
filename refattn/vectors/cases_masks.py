"""Cases of which query sees which key: causal, masks, bias, windows, lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from refattn.vectors.families import Draw
from refattn.vectors.recipes import CaseRecipe, attention

B, H, N_Q, N_K = 2, 3, 5, 11
"""Sizes of the cases over broadcast shapes: distinct, so that no two axes can be mistaken."""

BROADCASTS = {
    "full": (B, H, N_Q, N_K),
    "heads-shared": (B, 1, N_Q, N_K),
    "batch-shared": (1, H, N_Q, N_K),
    "matrix": (1, 1, N_Q, N_K),
    "bare-matrix": (N_Q, N_K),
    "keys-only": (B, 1, 1, N_K),
    "head-keys": (1, H, 1, N_K),
    "queries-only": (B, 1, N_Q, 1),
}
"""Shapes that broadcast to (b, h, n_q, n_k)."""


def lengths(values: Iterable[int]) -> Draw:
    """Return given int64 lengths, one a batch item."""
    listed = list(values)
    return Draw("given", (len(listed),), {"values": listed, "dtype": "int64"})


def causal() -> list[CaseRecipe]:
    """Return every alignment, with more keys, fewer keys and as many keys as queries."""
    found = []
    for n_q, n_k in ((11, 11), (7, 13), (13, 7)):
        for name, alignment in (("top-left", "top_left"), ("bottom-right", "bottom_right")):
            empty = name == "bottom-right" and n_q > n_k
            found.append(
                attention(
                    f"attention-causal-{name}-{n_q}x{n_k}",
                    f"Causal, aligned {name}: {n_q} queries, {n_k} keys.",
                    n_q=n_q,
                    n_k=n_k,
                    h=2,
                    parameters={"causal": True},
                    conventions={"alignment": alignment},
                    backward=True,
                    clauses=["OWN-EMPTY1"] if empty else ["OWN-CACHE1"] if n_q < n_k else [],
                    flags=["EmptyRow"] * empty + ["CausalAlignment"] * (n_q != n_k),
                )
            )
    offsets: tuple[tuple[str, int | list[int], int], ...] = (
        ("plus-3", 3, 1),
        ("minus-2", -2, 1),
        ("items", [0, 4, -1], 3),
    )
    for name, offset, b in offsets:
        empty = name != "plus-3"
        found.append(
            attention(
                f"attention-causal-offset-{name}",
                f"Causal with the query offset {offset}.",
                b=b,
                n_q=7,
                n_k=9,
                h=2,
                d=8,
                parameters={"causal": True},
                conventions={"alignment": offset},
                backward=True,
                clauses=["OWN-CACHE1"] + ["OWN-EMPTY1"] * empty,
                flags=["CausalAlignment"] + ["EmptyRow"] * empty,
            )
        )
    return found


def empty_rows() -> list[CaseRecipe]:
    """Return every policy of rows without a key, by mask, by bias and by the causal rule."""
    found = []
    ways: dict[str, tuple[dict[str, Draw], dict[str, Any], dict[str, Any]]] = {
        "mask": ({"mask": Draw("mask", (1, 1, 7, 9), {"empty_rows": [0, 3]})}, {}, {}),
        "causal": ({}, {"causal": True}, {"alignment": -3}),
        "lengths": ({"query_lengths": lengths([5]), "key_lengths": lengths([8])}, {}, {}),
    }
    for way, (inputs, parameters, conventions) in ways.items():
        for policy in ("zero", "nan", "uniform"):
            for backward in (False, True):
                found.append(
                    attention(
                        f"attention-empty-{way}-{policy}{'-backward' if backward else ''}",
                        f"Rows emptied by {way} under the policy {policy}.",
                        n_q=7,
                        n_k=9,
                        h=2,
                        d=8,
                        inputs=inputs,
                        parameters=parameters,
                        conventions={**conventions, "empty_row": policy},
                        backward=backward,
                        clauses=["OWN-EMPTY1", "OWN-LSE1"],
                        flags=["EmptyRow"],
                    )
                )
    return found


def masks() -> list[CaseRecipe]:
    """Return every broadcast shape of a mask, and masks together with the causal rule."""
    found = [
        attention(
            f"attention-mask-{name}",
            f"A mask of shape {shape}.",
            b=B,
            n_q=N_Q,
            n_k=N_K,
            h=H,
            d=8,
            inputs={"mask": _mask(shape)},
            flags=["MaskBroadcast", "MaskHoles"],
        )
        for name, shape in BROADCASTS.items()
    ]
    sized: Mapping[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
        "causal": (13, 13, {}, {"causal": True}),
        "causal-offset": (5, 11, {"eighths": 6}, {"causal": True}),
        "several-tiles": (5, 150, {"eighths": 2}, {}),
        "sparse": (9, 33, {"eighths": 0}, {}),
        "left-padding": (7, 13, {"key_ranges": [[4, 13]]}, {}),
        "right-padding": (7, 13, {"key_ranges": [[0, 6]]}, {}),
        "first-tiles-barred": (5, 150, {"key_ranges": [[131, 150]]}, {}),
    }
    for name, (n_q, n_k, options, parameters) in sized.items():
        offset = {"alignment": "bottom_right"} if name == "causal-offset" else {}
        flags = ["MaskAndCausal"] if parameters else ["MaskHoles"]
        found.append(
            attention(
                f"attention-mask-{name}",
                f"A mask: {name.replace('-', ' ')}.",
                n_q=n_q,
                n_k=n_k,
                h=2,
                parameters=parameters,
                inputs={"mask": Draw("mask", (1, 1, n_q, n_k), options)},
                conventions=offset,
                backward=n_k < 100,
                clauses=["OWN-EMPTY1"] * bool(parameters) + ["OWN-EXACT1"] * (name == "sparse"),
                flags=flags,
            )
        )
    return found


def _mask(shape: tuple[int, ...]) -> Draw:
    """Return a mask with holes; one that is constant along the keys empties whole rows."""
    return Draw("mask", shape, {"empty_rows": [2]} if shape[-1] == 1 else {})


def biases() -> list[CaseRecipe]:
    """Return every broadcast shape of a bias with its gradient, barred cells, large biases."""
    found = [
        attention(
            f"attention-bias-{name}",
            f"A bias of shape {shape}; its gradient has the same shape.",
            b=B,
            n_q=N_Q,
            n_k=N_K,
            h=H,
            d=8,
            inputs={"bias": Draw("bias", shape)},
            backward=True,
            flags=["MaskBroadcast", "BroadcastGradient"],
        )
        for name, shape in BROADCASTS.items()
    ]
    for name, shift, barred, more in (
        ("barred", 0, 3, ["BarredBias"]),
        ("barred-most", 1, 7, ["BarredBias"]),
        ("large", 6, 0, ["LargeBias"]),
        ("large-barred", 6, 2, ["LargeBias", "BarredBias"]),
    ):
        found.append(
            attention(
                f"attention-bias-{name}",
                f"A bias: {name.replace('-', ' ')}.",
                n_q=9,
                n_k=19,
                h=2,
                inputs={
                    "bias": Draw("bias", (1, 2, 9, 19), {"shift": shift, "barred_eighths": barred})
                },
                backward=True,
                clauses=["OWN-MASK1"] * bool(barred),
                flags=more,
            )
        )
    return found


def windows() -> list[CaseRecipe]:
    """Return windows with either end open, closed and zero, and with the causal rule."""
    found = []
    listed = ([0, 0], [0, None], [None, 0], [3, 0], [2, 1], [None, 2], [4, 4])
    for n_q, n_k, alignment in ((13, 13, "top_left"), (5, 13, "bottom_right")):
        for causal_rule in (False, True):
            for left, right in listed:
                if causal_rule and right == 0:
                    continue
                ends = "-".join("open" if e is None else str(e) for e in (left, right))
                name = f"{ends}{'-causal' if causal_rule else ''}{'-offset' if n_q == 5 else ''}"
                exact = [left, right] in ([0, 0],) or (causal_rule and left == 0)
                found.append(
                    attention(
                        f"attention-window-{name}",
                        f"The window {left}, {right}{', causal' if causal_rule else ''}, "
                        f"aligned {alignment}.",
                        n_q=n_q,
                        n_k=n_k,
                        d=8,
                        parameters={"window": [left, right], "causal": causal_rule},
                        conventions={"alignment": alignment},
                        backward=n_q == 13 and not causal_rule,
                        clauses=["OWN-EXACT1"] * exact,
                    )
                )
    for name, n_q, n_k in (("decode", 1, 97), ("decode-short", 1, 33), ("long", 9, 130)):
        found.append(
            attention(
                f"attention-window-{name}",
                f"A window of 17 keys to the left: {n_q} queries, {n_k} keys.",
                n_q=n_q,
                n_k=n_k,
                parameters={"window": [17, 0], "causal": True},
                conventions={"alignment": "bottom_right"},
                clauses=["OWN-CACHE1"],
                flags=["Decode"],
            )
        )
    return found


def variable_lengths() -> list[CaseRecipe]:
    """Return items with lengths of their own, zero among them, and diagonals of their own."""
    found = []
    keys, queries = [5, 0, 33, 1], [7, 3, 9, 1]
    ways: Mapping[str, tuple[dict[str, Draw], bool, str]] = {
        "keys": ({"key_lengths": lengths(keys)}, False, "top_left"),
        "queries": ({"query_lengths": lengths([7, 0, 9, 1])}, False, "top_left"),
        "both": (
            {"key_lengths": lengths(keys), "query_lengths": lengths(queries)},
            False,
            "top_left",
        ),
        "causal": ({"key_lengths": lengths(keys)}, True, "top_left"),
        "causal-corner": (
            {"key_lengths": lengths(keys), "query_lengths": lengths(queries)},
            True,
            "bottom_right",
        ),
    }
    for name, (inputs, causal_rule, alignment) in ways.items():
        for backward in (False, True):
            found.append(
                attention(
                    f"attention-lengths-{name}{'-backward' if backward else ''}",
                    f"Four items of unequal lengths: {name.replace('-', ' ')}.",
                    b=4,
                    n_q=9,
                    n_k=33,
                    d=8,
                    inputs=inputs,
                    parameters={"causal": True} if causal_rule else {},
                    conventions={"alignment": alignment},
                    backward=backward,
                    clauses=["OWN-EMPTY1"],
                    flags=["EmptyRow"] + ["CausalAlignment"] * causal_rule,
                )
            )
    return found


def core() -> list[CaseRecipe]:
    """Return the core cases of this file."""
    groups = (causal, empty_rows, masks, biases, windows, variable_lengths)
    return [recipe for make in groups for recipe in make()]
