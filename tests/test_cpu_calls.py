"""The call path of the CPU backend: what is decided once a form, and threads that help."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from optional import require

require("numba")
from numba import types  # noqa: E402

import refattn  # noqa: E402
from refattn import cpu  # noqa: E402
from refattn.checks import RefattnError  # noqa: E402
from refattn.cpu import forms, pool  # noqa: E402
from refattn.cpu.attention import plan_job  # noqa: E402
from refattn.cpu.compiling import kernel  # noqa: E402
from refattn.cpu.helpers import ASLEEP, STATE  # noqa: E402
from refattn.cpu.plan import ADDRESSES, Plan, Tensor, entry, flatten  # noqa: E402
from refattn.cpu.simd import claim, pointer  # noqa: E402


def drawn(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def problem(n_q=7, n_k=11, d=5, h=2, dtype=np.float32):
    shapes = ((2, h, n_q, d), (2, h, n_k, d), (2, h, n_k, d))
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def refusal(*arrays, **options):
    """Return the sentence that refuses a call, or none."""
    try:
        cpu.attention(*arrays, **options)
    except RefattnError as refused:
        return f"{type(refused).__name__}: {refused}"
    return "none"


def agrees(arrays, options=None, tolerance=3e-6):
    """Tell whether the kernels and the reference agree."""
    options = options or {}
    found = cpu.attention(*arrays, **options)
    exact = refattn.attention(*arrays, **options)
    return all(np.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(found, exact, strict=True))


# ---- forms


TWINS = [
    ({"causal": True}, {"causal": 1}),
    ({"causal": False}, {"causal": 0.0}),
    ({"scale": 1.0}, {"scale": True}),
    ({"softcap": 1.0}, {"softcap": np.True_}),
    ({"alignment": 1}, {"alignment": True}),
    ({"alignment": 1}, {"alignment": 1.0}),
    ({"alignment": [1, 0]}, {"alignment": [True, False]}),
    ({"window": (1, 0)}, {"window": (True, False)}),
    ({"window": [1, 0]}, {"window": [1.0, 0.0]}),
    ({"keep_probability": 1.0}, {"keep_probability": True}),
    ({"head_map": "tile"}, {"head_map": "tiles"}),
    ({"scale": 0.5}, {"scale": float("nan")}),
    ({"slopes": np.ones(2, np.float32)}, {"slopes": np.ones(3, np.float32)}),
    ({"mask": np.ones((7, 11), bool)}, {"mask": np.ones((7, 11), np.uint8)}),
    ({"bias": np.ones((7, 11), np.float32)}, {"bias": np.ones((11, 7), np.float32)}),
    ({"key_lengths": np.array([3, 11])}, {"key_lengths": np.array([3, 12])}),
    ({"alignment": np.array([3, 1])}, {"alignment": np.array([3, 2**62 + 1])}),
]
"""A good call, and a bad one whose arguments compare equal, or nearly."""


@pytest.mark.parametrize(("good", "bad"), TWINS)
def test_a_good_call_lets_no_bad_one_pass(good, bad):
    forms._forms.clear()
    first = refusal(*problem(), **bad)
    assert first.startswith(("OptionError", "ShapeError", "DtypeError"))
    assert refusal(*problem(), **good) == refusal(*problem(), **good) == "none"
    assert refusal(*problem(), **bad) == refusal(*problem(), **bad) == first


def test_arrays_unlike_those_of_a_good_call_are_refused():
    query, key, value = problem()
    bad = [
        (query, key, value[:, :, :5]),
        (query.astype(np.float64), key, value),
        (query.astype(np.int32), key.astype(np.int32), value.astype(np.int32)),
        (query, key[..., :4], value),
        (query, np.ma.masked_array(key), value),
        (query, key.tolist(), value),
        (query[:1], key, value),
        (query.view("V4"), key.view("V4"), value.view("V4")),
        (query.astype("S0"), key.astype("S0"), value.astype("S0")),
    ]
    forms._forms.clear()
    sentences = [refusal(*arrays) for arrays in bad]
    assert refusal(query, key, value) == "none"
    assert [refusal(*arrays) for arrays in bad] == sentences
    assert "none" not in sentences


def shifted(array):
    """Return an array whose elements lie at no multiple of their size."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    odd = memory[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    return odd


LAYOUTS = {
    "at another address": np.copy,
    "from the end": lambda a: a[:, :, ::-1],
    "every second row": lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
    "by columns": lambda a: np.asfortranarray(a),
    "one row for all": lambda a: np.broadcast_to(a[:, :, :1], a.shape),
    "in float64": lambda a: a.astype(np.float64),
    "in the other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": shifted,
    "read only": lambda a: np.broadcast_to(a, a.shape),
    "again": lambda a: a,
}
"""Ways of laying out an array after a good call."""


@pytest.mark.parametrize("way", LAYOUTS)
def test_another_layout_of_an_array_is_noticed(way):
    assert agrees(problem())
    for _ in range(2):  # the first call of a form, and one that follows
        assert agrees([LAYOUTS[way](array) for array in problem()])
    for place in range(3):
        if way != "in float64":
            arrays = problem()
            arrays[place] = LAYOUTS[way](arrays[place])
            assert agrees(arrays)


def test_what_is_in_the_arrays_is_read_anew():
    arrays = problem()
    logits, vectors = drawn(2, 2, 7, 11), drawn(2, 2)
    for step in range(3):
        for array in arrays:
            array += 0.1
        options = {
            "mask": logits > 0.2 * step,
            "bias": logits[:, :, step : step + 1],
            "slopes": vectors[step % 2],
            "sinks": vectors[:, step % 2].copy(),
            "key_lengths": np.array([11 - step, 9]),
            "window": [3 + step, None],
            "alignment": [step, 4],
        }
        assert agrees(arrays, options)
        for name, option in options.items():
            assert agrees(arrays, {name: option}), name


def test_no_array_outlives_its_call():
    for options in ({}, {"mask": np.ones((7, 11), bool)}):
        arrays = [*problem(), *options.values()]
        found = cpu.attention(*arrays[:3], threads=3, **dict(zip(options, arrays[3:], strict=True)))
        watched = [weakref.ref(array) for array in (*arrays, *found)]
        options.clear()
        del arrays, found
        gc.collect()
        assert [array() for array in watched] == [None] * len(watched)


def test_forms_are_forgotten_before_they_are_many():
    assert agrees(problem())
    form = next(iter(forms._forms.values()))
    for i in range(2 * forms.KEPT + 3):
        forms.keep(("test", i), form)
        assert len(forms._forms) <= forms.KEPT
    assert agrees(problem())


def test_a_form_is_found_again_only_by_its_like():
    query, key, value = problem()
    forms._forms.clear()
    for options in ({}, {"causal": True}, {"causal": False}, {"scale": 1.0}, {"scale": 1}):
        for _ in range(3):
            plan_job("test", query, key, value, options)
    assert len(forms._forms) == 5
    plan_job("test", query, key, value, {"slopes": np.ones(2, np.float32)})
    plan_job("test", shifted(query), key, value, {})
    assert len(forms._forms) == 5
    plain, odd = (forms.key_of(a, key, value, {}) for a in (query, shifted(query)))
    assert plain != odd


def test_the_addresses_of_a_plan_are_where_they_are_written():
    names = ("query", "key", "value", "mask", "bias", "keep", "output")
    told = {name: Tensor(100 + i, 1, 2, 3, 4) for i, name in enumerate(names)}
    told |= {"logsumexp": 107}
    plan = Plan(*(told.get(name, 0) for name in Plan._fields))
    assert [flatten(plan)[at] for at in ADDRESSES] == list(range(100, 108))


# ---- threads that help


@kernel
def count_pieces_of_a_test(zero, scratch, job):
    """Add 1 to each of n numbers, one piece of work each, and to as many of this thread alone."""
    n, room = entry(job, 0, types.int64(0))[0], pointer(scratch, zero)
    found, claimed = entry(job, 1, zero), pointer(job, types.int64(0))
    t = claim(claimed)
    while t < n:
        for _ in range(50):
            room[t % 16] = found[t]
            found[t] = room[t % 16] + 1 / 50
        t = claim(claimed)
    return 0


def pieces(n, threads, dtype=np.float64):
    """Return how often each of n pieces of work was done."""
    found = np.zeros(n, dtype)
    pool.share(count_pieces_of_a_test, 16, found.dtype, (np.array([n]), found), threads)
    return np.round(found, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_piece_of_work_is_done_once(threads, dtype):
    for n in (0, 1, 2, 3, 997, 20011):
        assert np.array_equal(pieces(n, threads, dtype), np.ones(n))


def test_python_threads_that_call_at_once_have_helpers_of_their_own():
    wrong = []

    def call(seed):
        # every form is called by two threads
        arrays = [array * (1 + seed) for array in problem(n_q=61 + 6 * (seed % 2), n_k=127, d=16)]
        alone = cpu.attention(*arrays, causal=True, threads=1)
        for turn in range(200):
            done = pieces(101 + seed, 2 + turn % 3)
            found = cpu.attention(*arrays, causal=True, threads=1 + turn % 4)
            if not (done == 1).all() or not all(map(np.array_equal, alone, found)):
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_helpers_are_kept_and_not_started_again():
    pieces(997, 4)
    before = threading.active_count()
    for _ in range(100):
        pieces(997, 4)
    assert threading.active_count() == before


class Bell:
    """A helper's bell that counts."""

    def __init__(self, bell):
        self.bell, self.rung = bell, 0

    def release(self):
        self.rung += 1
        self.bell.release()


def test_a_helper_without_work_sleeps_and_small_work_leaves_it_asleep(monkeypatch):
    pieces(997, 2)
    helper = pool._idle[-1]
    bell = Bell(helper.bell)
    monkeypatch.setattr(pool, "_idle", [helper._replace(bell=bell)])
    for n, rung in ((64, 0), (512, 1), (64, 1), (512, 2)):
        while helper.mail[STATE] != ASLEEP:
            time.sleep(0.001)
        time.sleep(0.01)  # a job that follows another at once wakes helpers for the smallest work
        cpu.attention(*problem(n_q=n, n_k=n, d=64, h=2), threads=2)
        assert bell.rung == rung


def test_scratch_memory_is_nobody_elses_and_aligned():
    blocks = [pool.scratch(1000) for _ in range(3)]
    assert all(block.address % 64 == 0 and block.size >= 1000 for block in blocks)
    spans = sorted((block.address, block.address + block.size) for block in blocks)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_work_is_done_where_no_thread_can_be_started(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool, "_idle", [])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert np.array_equal(pieces(997, 3), np.ones(997))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer's signal")
def test_an_interrupted_call_leaves_the_next_ones_right():
    arrays = problem(n_q=2048, n_k=2048, d=64, h=4)
    alone = cpu.attention(*arrays, threads=1)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    gc.collect()
    gc.disable()  # llvmlite's objects do not survive an interrupt of their __del__
    try:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                while True:
                    signal.setitimer(signal.ITIMER_REAL, 0.005)
                    cpu.attention(*arrays, threads=3)
            found = cpu.attention(*arrays, threads=3)
            assert all(map(np.array_equal, alone, found))
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, previous)


RUN = """
import atexit, os, threading, warnings
import numpy as np
helping = lambda: [thread for thread in threading.enumerate() if thread.name == "refattn"]
atexit.register(lambda: helping() and os._exit(3))  # the last to be called
from refattn import cpu
from refattn.cpu import pool
warnings.simplefilter("ignore")
x = np.random.default_rng(0).standard_normal((1, 8, 256, 32), np.float32)
first = cpu.attention(x, x, x, threads=3)
"""
"""A program that has just called the kernels with helpers."""

FORKED = """
child = os.fork()
again = cpu.attention(x, x, x, threads=3)
assert all(map(np.array_equal, first, again))
assert pool._idle and all(helper.thread.is_alive() for helper in pool._idle)
if not child:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
"""What holds in a forked child, where no helper lives on, and in its parent."""


@pytest.mark.parametrize("rest", ["", pytest.param(FORKED, id="forked")])
def test_a_program_ends_quietly_with_helpers(rest):
    if rest and not hasattr(os, "fork"):
        pytest.skip("needs a system that forks")
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", RUN + rest], capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
