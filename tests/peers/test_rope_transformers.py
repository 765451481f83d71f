"""Our frequency variants and rotations beside those of Hugging Face transformers.

Transformers computes in float32: its frequencies are compared to a few units of float32, its
rotations at small positions, where its angles still hold.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from refattn.rope import rope
from refattn.rope_frequencies import rope_frequencies

HEAD_DIM = 64
SHORT, LONG = [1.0 + i / 100 for i in range(32)], [1.0 + i / 2 for i in range(32)]
YARN = {"factor": 40.0, "original_length": 4096}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
}
LONGROPE = {"short_factor": SHORT, "long_factor": LONG, "original_length": 4096}

CASES = {
    "linear": ("linear", {"factor": 8.0}, {}),
    "dynamic, short": ("dynamic", {"factor": 2.0, "original_length": 2048}, {}),
    "dynamic, long": ("dynamic", {"factor": 2.0, "original_length": 2048, "length": 9000}, {}),
    "yarn": ("yarn", YARN, {}),
    "yarn, not truncated": ("yarn", {**YARN, "truncate": False}, {}),
    "yarn, betas": ("yarn", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, {}),
    "yarn, mscale": ("yarn", {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}, {}),
    "yarn, one mscale": ("yarn", {**YARN, "mscale": 0.707}, {}),
    "yarn, attention factor": ("yarn", {**YARN, "attention_factor": 1.5}, {}),
    "yarn, shrinking": ("yarn", {**YARN, "factor": 0.5}, {}),
    "yarn, long": ("yarn", {**YARN, "original_length": 10**6}, {}),
    "yarn, a step": ("yarn", {**YARN, "original_length": 6}, {}),
    "longrope, short": ("longrope", {**LONGROPE, "factor": 32.0}, {}),
    "longrope, edge": ("longrope", {**LONGROPE, "factor": 32.0, "length": 4096}, {}),
    "longrope, long": ("longrope", {**LONGROPE, "factor": 32.0, "length": 4097}, {}),
    "longrope, attention factor": ("longrope", {**LONGROPE, "attention_factor": 1.25}, {}),
    "llama3": ("llama3", LLAMA3, {"base": 500000.0}),
    "llama3, factor 32": ("llama3", {**LLAMA3, "factor": 32.0}, {"base": 500000.0}),
    "proportional": ("proportional", {"partial_rotary_factor": 0.25}, {"base": 1000000.0}),
    "proportional, 0.7": ("proportional", {"partial_rotary_factor": 0.7, "factor": 2.0}, {}),
    "partial linear": ("linear", {"factor": 8.0}, {"rotary_dim": 32}),
    "partial llama3": ("llama3", LLAMA3, {"rotary_dim": 16}),
    "partial yarn": ("yarn", YARN, {"rotary_dim": 48}),
}


def their_config(kind, numbers, *, base=10000.0, rotary_dim=HEAD_DIM):
    """A configuration with what transformers' functions read, and nothing else."""
    parameters = {"rope_type": kind, "rope_theta": base, **numbers}
    parameters.pop("length", None)
    parameters.setdefault("factor", 1.0 if kind == "longrope" else None)
    if "original_length" in parameters:
        parameters["original_max_position_embeddings"] = parameters.pop("original_length")
    if rotary_dim != HEAD_DIM:
        parameters["partial_rotary_factor"] = rotary_dim / HEAD_DIM
    if parameters["factor"] is None:
        del parameters["factor"]
    return SimpleNamespace(
        head_dim=HEAD_DIM,
        hidden_size=8 * HEAD_DIM,
        num_attention_heads=8,
        max_position_embeddings=parameters.get("original_max_position_embeddings"),
        rope_parameters=parameters,
        standardize_rope_params=lambda: None,
    )


@pytest.mark.peer("transformers")
@pytest.mark.clause("OWN-ROPE4", "OWN-ROPE2")
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(require, case):
    utils = require("transformers.modeling_rope_utils")
    kind, numbers, options = CASES[case]
    config = their_config(kind, numbers, **options)
    theirs, their_factor = utils.ROPE_INIT_FUNCTIONS[kind](config, seq_len=numbers.get("length"))
    rotary_dim = options.get("rotary_dim", HEAD_DIM)
    ours = rope_frequencies(
        rotary_dim, base=options.get("base", 10000.0), variant={"kind": kind, **numbers}
    )
    frequencies = [float(t) for t in ours.theta]
    assert len(frequencies) == rotary_dim // 2
    np.testing.assert_allclose(frequencies, theirs.numpy(), rtol=2e-6, atol=0)
    assert float(ours.attention_factor) == pytest.approx(their_factor, rel=1e-14)


@pytest.mark.peer("transformers")
@pytest.mark.clause("OWN-ROPE4")
def test_every_variant_of_transformers_is_covered(require):
    utils = require("transformers.modeling_rope_utils")
    assert set(utils.ROPE_INIT_FUNCTIONS) == {kind for kind, _, _ in CASES.values()}


@pytest.mark.peer("transformers")
@pytest.mark.clause("ROPE-EQ34", "OWN-ROPE1")
@pytest.mark.parametrize(("model", "pairing"), [("llama", "half_split"), ("cohere", "interleaved")])
def test_rotations_are_those_of_a_model_of_each_pairing(require, model, pairing):
    torch = require("torch")
    theirs = require(f"transformers.models.{model}.modeling_{model}")
    config_class = getattr(require(f"transformers.models.{model}"), f"{model.capitalize()}Config")
    config = config_class(
        hidden_size=2 * HEAD_DIM, num_attention_heads=2, num_hidden_layers=1, vocab_size=8
    )
    rotary = getattr(theirs, f"{model.capitalize()}RotaryEmbedding")(config)
    base = config.rope_parameters["rope_theta"]
    x = np.random.default_rng(0).normal(size=(2, 3, 7, HEAD_DIM)).astype(np.float32)
    positions = np.arange(7) + 5
    cosine, sine = rotary(torch.asarray(x), torch.asarray(positions)[None])
    rotated, _ = theirs.apply_rotary_pos_emb(torch.asarray(x), torch.asarray(x), cosine, sine)
    ours = rope(x, positions, base=base, pairing=pairing)
    np.testing.assert_allclose(ours.output, rotated.numpy(), rtol=0, atol=2e-5)


@pytest.mark.peer("torch")
@pytest.mark.clause("ROPE-EQ34", "OWN-ROPE5")
def test_the_same_text_runs_on_torch(require):
    torch = require("torch")
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 8))
    positions = np.array([0, 1, 131071, -4, 2**31])
    for dtype, limit in ((torch.float64, 1e-15), (torch.bfloat16, 2.0**-6)):
        ours = rope(torch.asarray(x).to(dtype), torch.asarray(positions))
        assert ours.output.dtype == dtype
        expected = rope(torch.asarray(x).to(dtype).to(torch.float64).numpy(), positions).output
        np.testing.assert_allclose(ours.output.to(torch.float64).numpy(), expected, atol=limit)
