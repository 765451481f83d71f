"""Cases of what changes logits or weights: softcap, sinks, ALiBi, grouped heads, dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.vectors.cases_masks import lengths
from refattn.vectors.families import Draw
from refattn.vectors.recipes import CaseRecipe, attention


def softcaps() -> list[CaseRecipe]:
    """Return caps above, near and far below the logits, in both orders."""
    found = []
    for name, cap, kind in (
        ("wide", 30.0, "normal"),
        ("tight", 0.5, "normal"),
        ("steep", 5.0, "steep"),
    ):
        found.append(
            attention(
                f"attention-softcap-{name}",
                f"A softcap of {cap} on {'steep' if kind == 'steep' else 'ordinary'} logits.",
                n_q=9,
                n_k=19,
                h=2,
                kind=kind,
                parameters={"softcap": cap},
                backward=True,
                flags=["SoftcapOrder"],
            )
        )
    for order in ("before_bias", "after_bias"):
        for name, inputs, parameters in (
            ("bias", {"bias": Draw("bias", (1, 2, 9, 19), {"shift": 1, "barred_eighths": 2})}, {}),
            ("mask", {"mask": Draw("mask", (1, 2, 9, 19))}, {"causal": True}),
            ("alibi", {"slopes": Draw("given", (2,), {"values": [0.5, 0.0625]})}, {}),
        ):
            found.append(
                attention(
                    f"attention-softcap-{order.replace('_', '-')}-{name}",
                    f"A softcap of 2 {order.replace('_', ' ')}, beside {name}.",
                    n_q=9,
                    n_k=19,
                    h=2,
                    d=8,
                    inputs=inputs,
                    parameters={"softcap": 2.0, **parameters},
                    conventions={"softcap_order": order},
                    backward=True,
                    flags=["SoftcapOrder"],
                )
            )
    return found


def sinks() -> list[CaseRecipe]:
    """Return ordinary, dominant and vanishing sinks, and sinks of empty rows."""
    found = []
    ways: Mapping[str, tuple[list[float], dict[str, Draw], dict[str, Any]]] = {
        "ordinary": ([0.5, -1.25, 2.0], {}, {}),
        "dominant": ([40.0, 12.0, 100.0], {}, {}),
        "vanishing": ([-40.0, -12.0, -300.0], {}, {}),
        "causal": ([0.0, 1.0, -1.0], {}, {"causal": True}),
        "empty-rows": (
            [0.5, -1.25, 2.0],
            {"mask": Draw("mask", (1, 1, 7, 13), {"empty_rows": [0, 4]})},
            {},
        ),
        "softcap": ([3.0, 1.0, -2.0], {}, {"softcap": 1.5}),
    }
    for name, (values, inputs, parameters) in ways.items():
        for backward in (False, True):
            found.append(
                attention(
                    f"attention-sinks-{name}{'-backward' if backward else ''}",
                    f"Sinks {values}: {name.replace('-', ' ')}.",
                    n_q=7,
                    n_k=13,
                    h=3,
                    d=8,
                    inputs={"sinks": Draw("given", (3,), {"values": values}), **inputs},
                    parameters=parameters,
                    backward=backward,
                    clauses=["OWN-LSE1"] + ["OWN-EMPTY1"] * ("empty" in name),
                    flags=["EmptyRow"] * ("empty" in name),
                )
            )
    return found


def alibi() -> list[CaseRecipe]:
    """Return every distance form, with and without the causal rule, at both corners."""
    found = []
    slopes = {"slopes": Draw("given", (3,), {"values": [0.5, 0.0625, 0.00390625]})}
    for distance in ("absolute", "signed", "column"):
        for causal in (False, True):
            for name, alignment in (("", "top_left"), ("-corner", "bottom_right")):
                found.append(
                    attention(
                        f"attention-alibi-{distance}{'-causal' if causal else ''}{name}",
                        f"A linear bias by {distance} distance, aligned {alignment}.",
                        n_q=7,
                        n_k=13,
                        h=3,
                        d=8,
                        inputs=slopes,
                        parameters={"causal": causal},
                        conventions={"distance": distance, "alignment": alignment},
                        backward=True,
                    )
                )
    found.append(
        attention(
            "attention-alibi-far",
            "A linear bias over 300 keys, with slopes of eight bits that are no powers of two.",
            n_q=2,
            n_k=300,
            h=2,
            inputs={"slopes": Draw("given", (2,), {"values": [0.0107421875, 0.2490234375]})},
            conventions={"alignment": "bottom_right"},
        )
    )
    found.append(
        attention(
            "attention-alibi-decode",
            "A linear bias on one query over 515 keys, causal: odd distances beyond 256 count.",
            n_q=1,
            n_k=515,
            d=8,
            inputs={"slopes": Draw("given", (1,), {"values": [0.0068359375]})},
            parameters={"causal": True},
            conventions={"alignment": "bottom_right"},
            clauses=["OWN-CACHE1"],
            flags=["Decode"],
        )
    )
    found.append(
        attention(
            "attention-alibi-items",
            "A linear bias with a query offset for each of three items.",
            b=3,
            n_q=5,
            n_k=9,
            h=2,
            d=8,
            inputs={"slopes": Draw("positive", (2,), {"shift": -3})},
            parameters={"causal": True},
            conventions={"alignment": [4, 0, 2]},
            backward=True,
        )
    )
    return found


def grouped_heads() -> list[CaseRecipe]:
    """Return groups of two and three heads, one group of all, both maps, with gradients."""
    found = []
    for h, h_k in ((4, 2), (6, 3), (6, 2), (5, 1)):
        for head_map in ("interleave", "tile"):
            if h_k == 1 and head_map == "tile":
                continue
            found.append(
                attention(
                    f"attention-grouped-{h}-{h_k}-{head_map}",
                    f"{h} query heads over {h_k} key-value heads, mapped by {head_map}.",
                    b=2,
                    n_q=5,
                    n_k=7,
                    h=h,
                    h_k=h_k,
                    d=8,
                    conventions={"head_map": head_map},
                    backward=True,
                )
            )
    found.append(
        attention(
            "attention-grouped-mask",
            "Two batch items with masks of their own over grouped heads.",
            b=2,
            n_q=5,
            n_k=7,
            h=4,
            h_k=2,
            d=8,
            inputs={"mask": Draw("mask", (2, 1, 5, 7))},
            backward=True,
            flags=["MaskBroadcast"],
        )
    )
    return found


def dropout() -> list[CaseRecipe]:
    """Return several keep probabilities, a row without a kept weight, and the causal rule."""
    found = []
    for name, probability, eighths, parameters in (
        ("half", 0.5, 4, {}),
        ("most", 0.875, 7, {}),
        ("nine-tenths", 0.9, 7, {}),
        ("causal", 0.75, 6, {"causal": True}),
        ("none", 1.0, 8, {}),
    ):
        found.append(
            attention(
                f"attention-dropout-{name}",
                f"Weights kept with probability {probability} by a given mask.",
                n_q=9,
                n_k=13,
                h=2,
                d=8,
                inputs={"keep": Draw("bernoulli", (1, 2, 9, 13), {"eighths": eighths})},
                parameters={"keep_probability": probability, **parameters},
                backward=True,
            )
        )
    found.append(
        attention(
            "attention-dropout-all",
            "No weight is kept: zeros, while the logsumexp stays.",
            n_q=3,
            n_k=5,
            d=8,
            inputs={"keep": Draw("bernoulli", (1, 1, 3, 5), {"eighths": 0})},
            parameters={"keep_probability": 0.5},
            backward=True,
            clauses=["OWN-EXACT1"],
        )
    )
    return found


def logsumexp_gradients() -> list[CaseRecipe]:
    """Return gradients through the logsumexp, alone, beside the output's, and with features."""
    found = []
    shape = (1, 2, 7, 11)
    ways: Mapping[str, tuple[dict[str, Draw], dict[str, Any], dict[str, Any]]] = {
        "both": ({}, {}, {}),
        "alone": ({"d_output": Draw("given", (*shape[:3], 8), {"values": [0.0] * 112})}, {}, {}),
        "causal": ({}, {"causal": True}, {"alignment": "bottom_right"}),
        "empty": ({"mask": Draw("mask", (1, 1, 7, 11), {"empty_rows": [2]})}, {}, {}),
        "sinks": ({"sinks": Draw("given", (2,), {"values": [0.5, -1.0]})}, {}, {}),
        "bias": ({"bias": Draw("bias", (1, 1, 1, 11))}, {"softcap": 3.0}, {}),
        "dropout": (
            {"keep": Draw("bernoulli", shape, {"eighths": 6})},
            {"keep_probability": 0.75},
            {},
        ),
    }
    for name, (inputs, parameters, conventions) in ways.items():
        found.append(
            attention(
                f"attention-lse-gradient-{name}",
                f"A gradient through the logsumexp: {name}.",
                n_q=7,
                n_k=11,
                h=2,
                d=8,
                inputs={**inputs, "d_logsumexp": Draw("normal", shape[:3])},
                parameters=parameters,
                conventions=conventions,
                backward=True,
                clauses=["OWN-BACKWARD1"] + ["OWN-EMPTY1"] * (name == "empty"),
            )
        )
    return found


def everything(n_q: int, n_k: int, d: int, d_v: int, softcap_order: str) -> CaseRecipe:
    """Return a case with every feature that can hold together."""
    b, h, h_k = 2, 4, 2
    return attention(
        f"attention-everything-{n_q}x{n_k}-{softcap_order.replace('_', '-')}",
        "Causal, window, lengths, mask, bias, ALiBi, softcap, sinks, groups and dropout at once.",
        b=b,
        n_q=n_q,
        n_k=n_k,
        h=h,
        h_k=h_k,
        d=d,
        d_v=d_v,
        inputs={
            "mask": Draw("mask", (b, 1, n_q, n_k), {"eighths": 6}),
            "bias": Draw("bias", (1, h, n_q, n_k), {"barred_eighths": 1}),
            "slopes": Draw("given", (h,), {"values": [0.5, 0.25, 0.125, 0.0625]}),
            "sinks": Draw("given", (h,), {"values": [0.5, -0.5, 1.0, -2.0]}),
            "key_lengths": lengths([n_k, n_k - 3]),
            "query_lengths": lengths([n_q - 1, n_q]),
            "keep": Draw("bernoulli", (b, h, n_q, n_k), {"eighths": 6}),
            "d_logsumexp": Draw("normal", (b, h, n_q)),
        },
        parameters={
            "scale": 0.375,
            "causal": True,
            "window": [9, 1],
            "softcap": 4.0,
            "keep_probability": 0.75,
        },
        conventions={
            "alignment": "bottom_right",
            "softcap_order": softcap_order,
            "distance": "signed" if softcap_order == "after_bias" else "absolute",
        },
        backward=True,
        clauses=["OWN-EMPTY1"],
        flags=["Combined"],
    )


def core() -> list[CaseRecipe]:
    """Return the core cases of this file."""
    groups = (softcaps, sinks, alibi, grouped_heads, dropout, logsumexp_gradients)
    found = [recipe for make in groups for recipe in make()]
    return [
        *found,
        everything(7, 13, 8, 6, "before_bias"),
        everything(13, 7, 8, 6, "after_bias"),
        everything(5, 19, 16, 16, "after_bias"),
    ]
