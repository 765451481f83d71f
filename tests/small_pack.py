"""A pack of three small cases with a stand-in for the certifying engine."""

from typing import Any, NamedTuple

import numpy as np

from refattn.vectors.families import Draw
from refattn.vectors.generate import Engine
from refattn.vectors.recipes import CaseRecipe, plain


class Certificate(NamedTuple):
    outputs: dict[str, Any]
    units: dict[str, Any]
    magnitudes: dict[str, float]
    record: dict[str, Any]


def certify(op: str, inputs: Any, parameters: Any, conventions: Any) -> Certificate:
    """Return the dot scores, which float64 holds exactly for the inputs of these cases."""
    assert (op, parameters, conventions) == ("score", {"kind": "dot"}, {})
    scores = inputs["query"].astype(np.float64) @ inputs["key"].astype(np.float64).T
    record = {
        "engine": "stand-in",
        "version": "1",
        "precision_bits": 53,
        "largest_radius": 0.0,
        "elements": int(scores.size),
        "exact_elements": int(scores.size),
        "ambiguous": 0,
    }
    units = {"scores.unit": np.abs(scores), "scores.unit_logit": np.ones(scores.shape)}
    return Certificate({"scores": scores}, units, {"d": 3.0}, record)


def coefficients(op: str, profile: str, magnitudes: Any) -> dict[str, tuple[float, float, float]]:
    return {"scores": (1e-3, magnitudes["d"] * 1e-4, 0.0)}


ENGINE = Engine(certify, coefficients)


def recipe(name: str, n: int = 5) -> CaseRecipe:
    draws = {"query": Draw("normal", (n, 3)), "key": Draw("unit", (7, 3))}
    return plain(
        "score",
        name,
        "Dot scores of a small case.",
        ("SCORES-DOT1",),
        ("Score",),
        draws=draws,
        parameters={"kind": "dot"},
    )


RECIPES = [recipe("small-a"), recipe("small-b", 2), recipe("small-c", 3)]
