"""Cases of the modules: GPT's causal module and gated cross-attention, weights and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.vectors.families import Draw
from refattn.vectors.recipes import CaseRecipe, plain

EPSILON = 1e-5
"""The ε of the layer normalisations."""

WHOLE = ("query_input", "media", "d_output", "norm_weight", "feed_forward_norm_weight")
"""Tensors of the gated block that are drawn with deviation 1."""


def fused_draws(*, b: int, n: int, e: int, parameters: tuple[str, ...]) -> dict[str, Draw]:
    """Return the inputs of the causal module, its parameters by name, and a gradient."""
    shapes = {"w_qkv": (e, 3 * e), "b_qkv": (3 * e,), "w_output": (e, e), "b_output": (e,)}
    return {
        "x": Draw("normal", (b, n, e)),
        **{name: Draw("normal", shapes[name], {"shift": -1}) for name in parameters},
        "d_output": Draw("normal", (b, n, e)),
    }


def causal_module() -> list[CaseRecipe]:
    """Return the whole module, parts of it, one token, a full block, and dropout."""
    whole = ("w_qkv", "b_qkv", "w_output", "b_output")
    concat = ("GPT-MODULE1", "GPT-BUFFER1", "VAS-S322b", "VAS-S323b", "OWN-BACKWARD1", "NUM-OTHER1")
    ways: Mapping[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
        "whole": ({"b": 2, "n": 7, "e": 6, "parameters": whole}, {"block_size": 11}, ("Plain",)),
        "merged-heads": (
            {"b": 2, "n": 5, "e": 8, "parameters": whole[:2]},
            {"block_size": 8},
            ("Plain",),
        ),
        "without-biases": (
            {"b": 1, "n": 7, "e": 6, "parameters": ("w_qkv", "w_output")},
            {"block_size": 7},
            ("Plain",),
        ),
        "one-token": (
            {"b": 2, "n": 1, "e": 6, "parameters": whole},
            {"block_size": 1},
            ("OneKey",),
        ),
    }
    found = [
        plain(
            "causal_module",
            f"causal-module-{name}",
            f"The causal module with its gradients: {name.replace('-', ' ')}.",
            concat,
            flags,
            draws=fused_draws(**sizes),
            parameters={"heads": 2 if sizes["e"] == 8 else 3, **parameters},
        )
        for name, (sizes, parameters, flags) in ways.items()
    ]
    return found + dropped()


def dropped() -> list[CaseRecipe]:
    """Return the whole module in training, in two sizes: both keep masks."""
    parameters = ("w_qkv", "b_qkv", "w_output", "b_output")
    found = []
    for name, b, n, e, heads in (("dropout", 2, 5, 6, 3), ("dropout-wide", 1, 7, 8, 2)):
        draws = fused_draws(b=b, n=n, e=e, parameters=parameters)
        draws["keep"] = Draw("bernoulli", (b, heads, n, n), {"eighths": 6})
        draws["output_keep"] = Draw("bernoulli", (b, n, e), {"eighths": 5})
        found.append(
            plain(
                "causal_module",
                f"causal-module-{name}",
                "The causal module in training: weights and output are dropped.",
                ("GPT-MODULE1", "GPT-DROPOUT1", "OWN-DROPOUT1", "OWN-BACKWARD1", "NUM-OTHER1"),
                ("Dropout",),
                draws=draws,
                parameters={
                    "heads": heads,
                    "block_size": 8,
                    "keep_probability": 0.75,
                    "output_keep_probability": 0.625,
                },
            )
        )
    return found


def block_draws(
    *, m: int = 3, n_m: int = 2, gates: int = 1, closed: bool = False, media_norm: bool = True
) -> dict[str, Draw]:
    """Return the inputs and parameters of the gated block, and a gradient."""
    b, n, e, e_m, h, d_k, d_v, f = 2, 5, 6, 4, 2, 3, 2, 7
    shapes: dict[str, tuple[int, ...]] = {
        "query_input": (b, n, e),
        "media": (b, m, n_m, e_m),
        "norm_weight": (e,),
        "norm_bias": (e,),
        "w_query": (h, e, d_k),
        "w_key": (h, e_m, d_k),
        "w_value": (h, e_m, d_v),
        "w_output": (h, d_v, e),
        "feed_forward_norm_weight": (e,),
        "feed_forward_norm_bias": (e,),
        "w_up": (e, f),
        "w_down": (f, e),
        "d_output": (b, n, e),
    }
    if media_norm:
        shapes |= {"media_norm_weight": (e_m,), "media_norm_bias": (e_m,)}
    # small weights keep the errors of one stage small beside the variance of the next
    shifts = {name: -2 if name.startswith("w_") else -1 for name in shapes if name not in WHOLE}
    draws = {
        name: Draw("normal", shape, {"shift": shifts[name]} if name in shifts else {})
        for name, shape in shapes.items()
    }
    for gate in ("attention_gate", "feed_forward_gate"):
        zeros = {"values": [0.0] * gates}
        draws[gate] = (
            Draw("given", (gates,), zeros) if closed else Draw("normal", (gates,), {"shift": -1})
        )
    return draws


def marks(*places: tuple[int, ...], rows: int = 5) -> Draw:
    """Return which positions of each item's text hold a medium."""
    values = [[position in item for position in range(rows)] for item in places]
    return Draw("given", (len(places), rows), {"values": values, "dtype": "bool"})


COMMON = (
    *("FLA-S22", "FLA-S23", "OWN-MEDIA1", "OWN-NORM1", "OWN-ACTIVATION1", "OWN-BACKWARD1"),
    "NUM-OTHER1",
)
"""Clauses of every case of the gated block."""


def block(
    name: str,
    draws: dict[str, Draw],
    conventions: Mapping[str, Any],
    flags: tuple[str, ...],
    clauses: tuple[str, ...] = (),
    scale: float | None = None,
) -> CaseRecipe:
    """Return the recipe of one case of the gated block."""
    return plain(
        "gated_cross_attention",
        f"gated-{name}",
        f"Gated cross-attention with its gradients: {name.replace('-', ' ')}.",
        COMMON + clauses,
        flags,
        draws=draws,
        parameters={"norm_epsilon": EPSILON} | ({} if scale is None else {"scale": scale}),
        conventions=conventions,
    )


def seen() -> list[CaseRecipe]:
    """Return both modes, both activations, one token a medium, no markers, cached media."""
    some = {"media_locations": marks((1, 3), (0, 2, 4))}
    plain_block = block_draws(media_norm=False)
    earlier = {"media_locations": marks((0, 2, 5), (6,), rows=7)}
    gelu, scaled = {"activation": "gelu"}, ("OWN-SCALE1",)
    both = gelu | {"attend": "preceding"}
    cached = {"cached_media": True}
    return [
        block("immediate", block_draws() | some, {}, ("Media",)),
        block("preceding-gelu", block_draws(gates=6, media_norm=False) | some, both, ("Media",)),
        block("one-token-a-medium", block_draws(n_m=1) | some, {}, ("Media", "OneKey")),
        block("unmarked", block_draws(m=2, media_norm=False), gelu, ("Plain",), scaled, 0.5),
        block(
            "cached",
            block_draws() | earlier,
            cached | {"attend": "preceding"},
            ("Media",),
            ("OWN-MEDIA2",),
        ),
        block(
            "cached-immediate",
            plain_block | earlier,
            cached | gelu,
            ("Media", "GivenScale"),
            ("OWN-MEDIA2", *scaled),
            -0.75,
        ),
    ]


def unseen() -> list[CaseRecipe]:
    """Return tokens before any medium under each convention, no media at all, closed gates."""
    some = {"media_locations": marks((1, 3), (0, 2, 4))}
    late = {"media_locations": marks((2, 3), (1,))}
    nowhere = {"media_locations": marks((), ())}
    bare = block_draws(media_norm=False)
    shut, shut_by_feature = block_draws(closed=True), block_draws(closed=True, gates=6)
    gelu, preceding, empty = {"activation": "gelu"}, {"attend": "preceding"}, ("OWN-EMPTY1",)
    uniform, everything = {"before_media": "uniform"}, {"before_media": "everything"}
    return [
        block("leak-uniform", bare | late, preceding | uniform | gelu, ("MediaLeak",), empty),
        block("leak-everything", block_draws() | late, everything, ("MediaLeak",)),
        block(
            "leak-everything-preceding",
            bare | late,
            everything | preceding | gelu,
            ("MediaLeak",),
        ),
        block("without-media", block_draws() | nowhere, gelu, ("EmptyRow",), empty),
        block("closed", shut | some, gelu, ("ClosedGate",)),
        block("closed-by-feature", shut_by_feature | late, preceding, ("ClosedGate",)),
    ]


def core() -> list[CaseRecipe]:
    """Return the core cases of this file."""
    return [*causal_module(), *seen(), *unseen()]
