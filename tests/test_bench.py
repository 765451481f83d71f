"""The bench: what it counts, what it refuses, and that its errors are errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from optional import require

require("numba")
from refattn import bench  # noqa: E402
from refattn.bench_subjects import SUBJECTS, installed  # noqa: E402
from refattn.checks import OptionError  # noqa: E402
from refattn.cli import main  # noqa: E402

SMALL = "1,2,37:53,16"


def test_a_shape_is_read_and_written():
    assert bench.read_shape("1,2,3,4") == (1, 2, 3, 3, 4)
    assert bench.read_shape(SMALL) == (1, 2, 37, 53, 16)
    assert str(bench.read_shape(SMALL)) == SMALL
    for wrong in ("1,2,3", "1,2,x,4", "1,2,0,4", ""):
        with pytest.raises(OptionError, match="it must be batch,heads,length,features"):
            bench.read_shape(wrong)


def test_operations_are_counted_pair_by_pair():
    shape = bench.Shape(2, 3, 5, 7, 11)
    allowed = sum(1 for i in range(5) for j in range(7) if j <= i + 2)
    assert bench.operations(shape, False, False) == 4 * 2 * 3 * 11 * 35
    assert bench.operations(shape, True, False) == 4 * 2 * 3 * 11 * allowed
    assert bench.operations(shape, False, True) == 3.5 * bench.operations(shape, False, False)


@pytest.mark.parametrize("causal", [False, True])
def test_a_wrong_output_has_the_error_that_was_put_in(causal):
    problem = bench.draw(bench.Shape(1, 2, 9, 9, 4), "float64", causal, False, 1)
    right = SUBJECTS["numpy"].array(SUBJECTS["numpy"].prepare(problem)())
    assert bench.errors(problem, right)[1] < 1e-14
    right[0, 1, 4, 2] += 0.25
    rms, largest = bench.errors(problem, right)
    assert largest == pytest.approx(0.25)
    assert rms == pytest.approx(0.25 / math.sqrt(2 * 9 * 4))


@pytest.mark.filterwarnings("ignore")  # what a library says while it loads
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_that_is_installed_is_right(name):
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    for causal in (False, True):
        problem = bench.draw(bench.Shape(1, 2, 33, 33, 16), "float32", causal, False, 2)
        output = SUBJECTS[name].array(SUBJECTS[name].prepare(problem)())
        assert bench.errors(problem, output)[1] < 1e-5


def test_turns_are_as_many_for_each_subject():
    found = bench.turns({"a": lambda: None, "b": lambda: None}, 0.0)
    assert len(found["a"]) == len(found["b"]) >= 3


def test_the_command_prints_a_table_and_json(capsys):
    words = ["bench", "--shape", SMALL, "--peer", "numpy", "--seconds", "0.01", "--threads", "1"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "peak of multiply-adds" in table and "numpy" in table and SMALL in table
    assert main([*words, "--json", "--mask", "causal"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["subject"] for row in data["rows"]] == ["numba", "numpy"]
    assert all(row["max_error"] < 1e-5 and row["seconds"] > 0 for row in data["rows"])
    assert data["versions"]["numpy"] == np.__version__


def test_gradients_are_timed_beside_those_that_have_them(capsys):
    words = ["bench", "--shape", SMALL, "--seconds", "0.01", "--peer", "numpy", "--backward"]
    assert main([*words, "--mask", "full"]) == 0
    assert f"not run: numpy on {SMALL} full fwd+bwd: its gradients are not timed" in (
        capsys.readouterr().out
    )


def test_a_bad_word_is_refused(capsys):
    assert main(["bench", "--peer", "nobody"]) == 2
    assert "peer is 'nobody', but it must be one of those installed here" in capsys.readouterr().err
    assert main(["bench", "--mask", "half"]) == 2
