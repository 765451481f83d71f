"""The list of recipes of each size: core, kept in the repository, and full, made on demand."""

from __future__ import annotations

from itertools import cycle, pairwise, product

from refattn.errors import RefattnError
from refattn.vectors import (
    cases_features,
    cases_masks,
    cases_modules,
    cases_other,
    cases_plain,
    cases_poison,
    cases_rope,
)
from refattn.vectors.cases_plain import EDGES, HEAD_SIZES, WORDS
from refattn.vectors.recipes import FAMILY_FLAGS, CaseRecipe, attention

SIZES = ("core", "full")
"""Sizes of a pack; full contains core."""


class RecipeError(RefattnError):
    """A size that is unknown, or two recipes of one id."""


def grid() -> list[CaseRecipe]:
    """Return the larger grid: lengths x families x head sizes, forward and backward."""
    found = []
    kinds = [k for k in FAMILY_FLAGS if k != "one_key"]
    for (n_q, n_k), kind in product(((17, 67), (129, 130), (1, 257), (61, 31)), kinds):
        # With 1/√64 the largest of steep logits would be a rounding tie but for e^-1000.
        for d, causal in ((32, False), (80 if kind == "steep" else 64, True)):
            found.append(
                attention(
                    f"grid-{kind.replace('_', '-')}-{n_q}x{n_k}-{d}",
                    f"{n_q} queries, {n_k} keys, head size {d}: {WORDS[kind]}.",
                    n_q=n_q,
                    n_k=n_k,
                    h=2,
                    d=d,
                    kind=kind,
                    parameters={"causal": True} if causal else {},
                    conventions={"alignment": "bottom_right"} if causal else {},
                    backward=True,
                    clauses=["OWN-EMPTY1"] if causal and n_q > n_k else [],
                )
            )
    turn = cycle(("normal", "rising", "negative", "outliers"))
    for n, d in product(EDGES, HEAD_SIZES):
        found.append(
            attention(
                f"grid-edge-{n}-{d}",
                f"Causal self-attention over {n} tokens, head size {d}.",
                n_q=n,
                n_k=n,
                d=d,
                kind=next(turn),
                parameters={"causal": True},
                flags=["TileEdge", "HeadSize"],
            )
        )
    for n_q, n_k in ((31, 64), (65, 48), (16, 129), (100, 100)):
        for order in ("before_bias", "after_bias"):
            found.append(cases_features.everything(n_q, n_k, 32, 24, order))
    return found


def recipes(size: str) -> list[CaseRecipe]:
    """Return the recipes of a size, in the order of their ids.

    Args:
        size: "core" or "full".

    Raises:
        RecipeError: unknown size, or an id that stands twice.
    """
    if size not in SIZES:
        raise RecipeError(f"size is {size!r}, but it must be one of {', '.join(SIZES)}")
    rooms = (
        cases_plain,
        cases_masks,
        cases_poison,
        cases_features,
        cases_rope,
        cases_other,
        cases_modules,
    )
    found = [recipe for room in rooms for recipe in room.core()]
    if size == "full":
        found += grid()
    found.sort(key=lambda recipe: recipe.id)
    for first, second in pairwise(found):
        if first.id == second.id:
            raise RecipeError(f"two recipes have the id {first.id}")
    return found
