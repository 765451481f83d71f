"""The frequency variants beside those of Hugging Face transformers.

Its frequencies are computed in float32, ours in decimal arithmetic: a power and two products may
differ by a few units in the last place of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optional import require
from refattn.rope_frequencies import rope_frequencies

utilities = require("transformers.modeling_rope_utils")
transformers = require("transformers")

D, BASE, TRAINED, LONGEST = 34, 20011.0, 211, 811
"""Features of a head, base, trained length, longest length of every test."""

SHORT = [1.0 + 0.0625 * i for i in range(D // 2)]
LONG = [2.0 + 0.125 * i for i in range(D // 2)]

ORIGINAL = {"original_max_position_embeddings": TRAINED}

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int | None]] = {
    "linear": ("linear", {"factor": 3.0}, {"factor": 3.0}, None),
    "dynamic, short": (
        "dynamic",
        {"factor": 3.0},
        {"factor": 3.0, "original_length": LONGEST, "length": 800},
        800,
    ),
    "dynamic, long": (
        "dynamic",
        {"factor": 3.0},
        {"factor": 3.0, "original_length": LONGEST, "length": 1601},
        1601,
    ),
    "yarn": (
        "yarn",
        {"factor": 5.0, **ORIGINAL},
        {"factor": 5.0, "original_length": TRAINED},
        None,
    ),
    "yarn, not truncated": (
        "yarn",
        {"factor": 5.0, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0, **ORIGINAL},
        {
            "factor": 5.0,
            "original_length": TRAINED,
            "truncate": False,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
        },
        None,
    ),
    "yarn, mscale": (
        "yarn",
        {"factor": 5.0, "mscale": 0.75, "mscale_all_dim": 1.5, **ORIGINAL},
        {"factor": 5.0, "original_length": TRAINED, "mscale": 0.75, "mscale_all_dim": 1.5},
        None,
    ),
    "yarn, attention factor": (
        "yarn",
        {"factor": 5.0, "attention_factor": 1.25, **ORIGINAL},
        {"factor": 5.0, "original_length": TRAINED, "attention_factor": 1.25},
        None,
    ),
    "longrope, short": (
        "longrope",
        {"short_factor": SHORT, "long_factor": LONG, "factor": 4.0, **ORIGINAL},
        {
            "short_factor": SHORT,
            "long_factor": LONG,
            "factor": 4.0,
            "original_length": TRAINED,
            "length": TRAINED,
        },
        TRAINED,
    ),
    "longrope, long": (
        "longrope",
        {"short_factor": SHORT, "long_factor": LONG, "factor": 4.0, **ORIGINAL},
        {
            "short_factor": SHORT,
            "long_factor": LONG,
            "factor": 4.0,
            "original_length": TRAINED,
            "length": TRAINED + 1,
        },
        TRAINED + 1,
    ),
    "llama3": (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_length": TRAINED,
        },
        None,
    ),
    "proportional": (
        "proportional",
        {"partial_rotary_factor": 0.5, "factor": 2.0},
        {"partial_rotary_factor": 0.5, "factor": 2.0},
        None,
    ),
}
"""Kind, the parameters of transformers, the same in our words, and the length of the text."""


def test_every_variant_of_transformers_is_compared() -> None:
    assert {kind for kind, *_ in VARIANTS.values()} == set(utilities.ROPE_INIT_FUNCTIONS)


@pytest.mark.clause("OWN-ROPE4")
@pytest.mark.parametrize("name", VARIANTS)
def test_frequencies_agree_with_transformers(name: str) -> None:
    kind, parameters, numbers, length = VARIANTS[name]
    config = transformers.LlamaConfig(
        hidden_size=3 * D,
        num_attention_heads=3,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": kind, "rope_theta": BASE, **parameters},
    )
    theirs, factor = utilities.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    ours = rope_frequencies(D, base=BASE, variant={"kind": kind, **numbers})
    theta = np.array([float(t) for t in ours.theta])
    assert theta.shape == tuple(theirs.shape)
    np.testing.assert_allclose(theirs.numpy(), theta, rtol=2.0**-20, atol=0)
    assert float(ours.attention_factor) == pytest.approx(factor, rel=2**-50)
    plain = np.array([float(t) for t in rope_frequencies(D, base=BASE).theta])
    assert name == "dynamic, short" or not np.allclose(theta, plain, rtol=1e-3)
