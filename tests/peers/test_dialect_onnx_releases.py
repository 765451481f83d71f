"""The dialects of earlier releases of ONNX beside their evaluators, each in a process of its own.

REFATTN_ONNX_RELEASES names a folder with one folder a release, as
`pip install --no-deps --target FOLDER/1.18.0 onnx==1.18.0` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optional import ONNX_RELEASES, lacking
from peers.sameness import assert_same, ours_or_error
from refattn.dialects import onnx_releases

pytestmark = pytest.mark.skipif(bool(lacking("onnx_releases")), reason=lacking("onnx_releases"))

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value")
"""Names of a node's inputs, in the order of its schema."""

RELEASES = {
    "1.18.0": onnx_releases.attention_23_1_18,
    "1.20.1": onnx_releases.attention_23_1_20,
    "1.21.0": onnx_releases.attention_23_1_20,
    "1.22.0": onnx_releases.attention_23_1_22,
}
"""Releases by their full version, and our function of each."""

B, N_Q, N_NEW, D, D_V = 2, 3, 5, 4, 6

COUNT = 240
"""Drawn nodes a release."""

ANSWERED = {"1.18.0": 172, "1.20.1": 240, "1.21.0": 240, "1.22.0": 240}
"""How many of them a release answers: 1.18 refuses a mask beside is_causal."""


def node(seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Draw the inputs and the attributes of a node."""
    rng = np.random.default_rng([23, seed])
    heads, key_heads = [(4, 2), (2, 2), (6, 2), (3, 1)][rng.integers(4)]
    past = int(rng.integers(0, 3))
    n_k = N_NEW + past
    inputs = {
        "Q": rng.normal(size=(B, heads, N_Q, D)),
        "K": rng.normal(size=(B, key_heads, N_NEW, D)),
        "V": rng.normal(size=(B, key_heads, N_NEW, D_V)),
    }
    attributes: dict[str, Any] = {"is_causal": int(rng.random() < 0.4), "scale": 0.25}
    attributes["qk_matmul_output_mode"] = int(rng.integers(4))
    if rng.random() < 0.5:
        attributes["softcap"] = float(rng.choice([0.5, 4.0]))
    if rng.random() < 0.4:
        for name in ("Q", "K", "V"):
            rows = inputs[name].swapaxes(1, 2)
            inputs[name] = np.ascontiguousarray(rows.reshape(*rows.shape[:2], -1))
        attributes |= {"q_num_heads": heads, "kv_num_heads": key_heads}
    if past:
        inputs["past_key"] = rng.normal(size=(B, key_heads, past, D))
        inputs["past_value"] = rng.normal(size=(B, key_heads, past, D_V))
    kind = rng.integers(4)
    chosen = rng.random((N_Q, n_k)) < 0.6
    chosen[1] &= bool(rng.random() < 0.7)
    if kind == 1:
        inputs["attn_mask"] = chosen
    if kind >= 2:
        numbers = rng.normal(size=chosen.shape)
        inputs["attn_mask"] = np.where(chosen, numbers, -np.inf) if kind == 2 else numbers
    return inputs, attributes


NODES = [node(seed) for seed in range(COUNT)]


def evaluated(version: str, folder: Path) -> dict[str, np.ndarray]:
    """Return what a release answers to every node, by its index and the output's name."""
    source, target = folder / "nodes.npz", folder / "answers.npz"
    arrays = {f"{i}/{n}": a for i, (inputs, _) in enumerate(NODES) for n, a in inputs.items()}
    np.savez(source, attributes=json.dumps([attributes for _, attributes in NODES]), **arrays)
    program = Path(__file__).parent / "onnx_release_child.py"
    subprocess.run(
        [sys.executable, "-W", "ignore", program, source, target],
        env=os.environ | {"PYTHONPATH": str(Path(ONNX_RELEASES) / version)},
        check=True,
    )
    with np.load(target) as stored:
        return dict(stored)


@pytest.mark.clause("OWN-GQA1", "OWN-CAUSAL1", "OWN-SOFTCAP1", "OWN-EMPTY1", "OWN-CACHE1")
@pytest.mark.parametrize("version", RELEASES)
def test_the_dialect_of_a_release_answers_as_its_evaluator(version: str, tmp_path: Path) -> None:
    theirs = evaluated(version, tmp_path)
    assert str(theirs["version"]) == version
    agreed = 0
    for index, (inputs, attributes) in enumerate(NODES):
        arrays = [inputs.get(name) for name in INPUTS]
        ours = ours_or_error(partial(RELEASES[version], *arrays, **attributes))
        assert isinstance(ours, Exception) == (f"{index}/Y" not in theirs), (index, ours)
        if isinstance(ours, Exception):
            continue
        expected = {name: theirs[f"{index}/{name}"] for name in ours._fields}
        assert_same(ours._asdict(), expected)
        agreed += 1
    assert agreed == ANSWERED[version]
