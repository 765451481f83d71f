"""Memory of a call, measured in fresh processes: what is measured, and that ours stays linear."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from optional import require

require("numba")
from refattn.bench import machine, memory, shapes  # noqa: E402
from refattn.cli import main  # noqa: E402
from refattn.cpu.decode import PART  # noqa: E402

if not memory.measurable():
    pytest.skip("this system does not tell the peak of a call", allow_module_level=True)

MIB = 2**20

NOISE = MIB // 4
"""Bytes by which the system's count of resident memory may be off: it is kept by core."""

CALL = """
import json, sys, threading
import numpy as np
from refattn import cpu
from refattn.bench.memory import peak_growth

n_q, n_k, d, threads, left = json.loads(sys.argv[1])
options = {} if left is None else {"window": (left, 0)}

def draw(n_q, n_k):
    return [np.ones((1, 1, n, d), np.float32) for n in (n_q, n_k, n_k)]

small, large = draw(min(n_q, 256), 256), draw(n_q, n_k)
warm = threading.Thread(target=lambda: cpu.attention(*small, threads=threads, **options))
warm.start()
warm.join()
print(peak_growth(lambda: cpu.attention(*large, threads=threads, **options)))
"""
"""Prints by how many bytes a process grows in one call of ours, its results included."""


def extra(n_q: int, n_k: int, d: int, threads: int, left: int | None) -> int:
    """Return the bytes that a call takes beyond its output and its logsumexp."""
    words = json.dumps([n_q, n_k, d, threads, left])
    command = [sys.executable, "-c", CALL, words]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(child.stdout) - 4 * n_q * (d + 1)


def test_what_a_call_takes_and_gives_back_is_measured():
    def call():
        np.ones(32 * MIB, np.uint8).sum()
        return np.ones(8 * MIB, np.uint8)

    assert abs(memory.peak_growth(call) - 32 * MIB) < 2 * MIB
    assert memory.peak_growth(lambda: None) < MIB


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.clause("FA1-THM1")
def test_extra_memory_at_65536_tokens_is_within_twice_that_at_8192(threads):
    # a narrow window, for time: a hidden copy of one tensor would be 16 MiB
    short, long = (extra(n, n, 64, threads, 127) for n in (8192, 65536))
    assert long <= 2 * max(short, NOISE)
    assert short <= threads * MIB


def test_extra_memory_of_a_few_queries_grows_by_one_result_a_part_of_the_keys():
    short, long = (extra(61, n, 128, 2, None) for n in (8192, 65536))
    results = 61 * (65536 // PART) * (128 + 16) * 4  # a row of values, its maximum and its sum
    assert long <= 2 * max(short, NOISE) + results
    assert results < 2 * 65536 * 128 * 4 / 8  # an eighth of keys and values


def test_a_subject_that_forms_all_pairs_is_seen_to():
    shape = shapes.Shape(1, 2, 1031, 1031, 8)
    threads = min(machine.BLAS_THREADS, machine.cores())
    asked = {"causal": False, "backward": False, "dtype": "float32", "threads": threads}
    matrix = 2 * 1031**2 * 4
    assert memory.measure("numpy", shape, **asked).call > matrix - NOISE
    assert memory.measure("numba", shape, **asked).call < matrix / 2


def test_a_subject_that_cannot_be_measured_is_left_open():
    shape = shapes.Shape(1, 1, 3, 3, 2)
    grown = memory.measure(
        "nobody", shape, causal=False, backward=False, dtype="float32", threads=1
    )
    assert np.isnan(grown).all()


def test_the_command_prints_the_memory_of_each_row(capsys):
    words = ["bench", "--shape", "1,2,257,8", "--peer", "numba", "--seconds", "0.01", "--memory"]
    assert main([*words, "--mask", "full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].endswith("extra MiB")
    assert 0 <= float(lines[4].split()[-1]) < 8
    assert any(line.startswith("extra MiB: growth of a fresh process") for line in lines)
