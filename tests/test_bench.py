"""The bench: what it counts, what it refuses, and that its errors are errors."""

from __future__ import annotations

import json
import math
import sys
import threading
import time

import numpy as np
import pytest

from optional import require

require("numba")
from refattn.bench import bench, fastest_peer, machine, problem, shapes, subjects, timing  # noqa: E402
from refattn.bench.subjects import SUBJECTS, installed  # noqa: E402
from refattn.checks import OptionError  # noqa: E402
from refattn.cli import main  # noqa: E402

SMALL = "1,2,37:53,16"

THREADS = min(machine.BLAS_THREADS, machine.cores())
"""As NumPy has, so that it takes part."""

QUICK = ("bench", "--peer", "numpy", "--seconds", "0.01", "--threads", str(THREADS))


def test_a_shape_is_read_and_written():
    assert shapes.read_shape("1,2,3,4") == (1, 2, 3, 3, 4)
    assert shapes.read_shape(SMALL) == (1, 2, 37, 53, 16)
    assert str(shapes.read_shape(SMALL)) == SMALL
    for wrong in ("1,2,3", "1,2,x,4", "1,2,0,4", ""):
        with pytest.raises(OptionError, match="it must be batch,heads,length,features"):
            shapes.read_shape(wrong)


def test_every_shape_meets_every_mask_once_and_one_query_only_the_first():
    todo = shapes.read_todo(("1,2,3,4", "1,2,1:7,4", "1,2,3:3,4"), ("full", "causal"))
    assert [(str(s), m) for s, m in todo] == [
        ("1,2,3,4", "full"),
        ("1,2,3,4", "causal"),
        ("1,2,1:7,4", "full"),
    ]


def test_operations_are_counted_pair_by_pair():
    shape = shapes.Shape(2, 3, 5, 7, 11)
    allowed = sum(1 for i in range(5) for j in range(7) if j <= i + 2)
    assert shapes.operations(shape, False, False) == 4 * 2 * 3 * 11 * 35
    assert shapes.operations(shape, True, False) == 4 * 2 * 3 * 11 * allowed
    assert shapes.operations(shape, False, True) == 3.5 * shapes.operations(shape, False, False)


def test_the_result_is_the_output_and_with_gradients_four_tensors():
    shape = shapes.Shape(2, 3, 5, 7, 11)
    output, keys = 2 * 3 * 5 * 11, 2 * 3 * 7 * 11
    assert shapes.result_bytes(shape, 4, False) == 4 * output
    assert shapes.result_bytes(shape, 8, True) == 8 * (2 * output + 2 * keys)


@pytest.mark.parametrize("causal", [False, True])
def test_a_wrong_output_has_the_error_that_was_put_in(causal):
    drawn = problem.draw(shapes.Shape(1, 2, 9, 11, 4), "float64", causal, False, THREADS)
    right = subjects.prepare("numpy", drawn)()
    assert problem.errors(drawn, right)[1] < 1e-14
    right[0, 1, 4, 2] += 0.25
    rms, largest = problem.errors(drawn, right)
    assert largest == pytest.approx(0.25)
    assert rms == pytest.approx(0.25 / math.sqrt(2 * 9 * 4))


@pytest.mark.filterwarnings("ignore")  # what a library says while it loads
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("lengths", [(33, 33), (13, 37)])
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_that_is_installed_is_right(name, lengths, backward):
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    if backward and not SUBJECTS[name].backward:
        with pytest.raises(problem.Unable, match="gradients are not timed"):
            subjects.prepare(name, problem.draw(shapes.Shape(1, 1, 2, 2, 2), "float32", 0, 1, 1))
        return
    threads = THREADS if name == "numpy" else machine.cores()
    for causal in (False, True):
        drawn = problem.draw(shapes.Shape(1, 2, *lengths, 16), "float32", causal, backward, threads)
        call = subjects.prepare(name, drawn)
        call()
        result = SUBJECTS[name].array(call())
        assert problem.errors(drawn, result)[1] < 1e-5


def test_what_forms_every_pair_is_refused_at_16384_tokens_without_forming_it():
    head = np.zeros((1, 4, 1, 1), np.float32)
    long = np.broadcast_to(head, (1, 4, 16384, 64))
    drawn = problem.Problem(long, long, long, None, False, THREADS)
    with pytest.raises(problem.Unable, match="it forms matrices of 16384 by 16384"):
        subjects.prepare("numpy", drawn)


def test_turns_follow_each_other_and_the_slow_have_only_the_first():
    order = []

    def ready(name, seconds):
        return timing.Ready(lambda: (order.append(name), time.sleep(seconds)), 1.0, (0, 0))

    found = timing.turns({"a": ready("a", 0.02), "b": ready("b", 0.2), "c": ready("c", 0.02)}, 0.0)
    assert {name: len(times) for name, times in found.items()} == {
        "a": timing.LEAST_TURNS,
        "b": timing.ALL_TURNS,
        "c": timing.LEAST_TURNS,
    }
    rest = timing.LEAST_TURNS - timing.ALL_TURNS
    assert order == list("abc") * timing.ALL_TURNS + list("ac") * rest


def test_ours_is_timed_to_the_end_even_if_it_is_slow():
    assert timing.contenders({"numba": [9.0], "torch": [1.0, 1.1], "jax": [3.0]}) == [
        "numba",
        "torch",
    ]
    assert timing.contenders({}) == []


def test_a_subject_waits_until_the_threads_of_the_last_one_sleep():
    ended = []

    def spin():
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            np.dot(np.ones(1000), np.ones(1000))
        ended.append(time.perf_counter())

    spinner = threading.Thread(target=spin)
    spinner.start()
    machine.settle()
    assert ended
    spinner.join()


def test_a_peer_that_fails_or_takes_too_long_is_left_out_with_its_reason(monkeypatch):
    def broken(_):
        raise RuntimeError("no such kernel\nat line 3")

    slow = timing.SUBJECTS["numpy"]._replace(prepare=lambda p: lambda: time.sleep(0.02) or p.query)
    monkeypatch.setitem(SUBJECTS, "torch", slow._replace(prepare=broken))
    monkeypatch.setitem(SUBJECTS, "jax", slow)
    drawn = problem.draw(shapes.read_shape(SMALL), "float32", False, False, 1)
    rows = timing.time_problem(drawn, ["numba", "torch", "jax"], seconds=0.01, limit=0.01)
    assert [row.subject for row in rows] == ["numba", "torch", "jax"]
    assert rows[0].seconds > 0 and rows[0].ratio == 1
    assert rows[1].note == "it fails: RuntimeError: no such kernel"
    assert rows[2].note.endswith("but the limit is 0.01 s") and math.isnan(rows[2].seconds)


def test_the_fastest_peer_is_the_one_of_least_time_and_none_where_none_ran():
    def row(subject, seconds, ratio):
        return {"shape": "s", "mask": "full", "subject": subject, "seconds": seconds,
                "ratio": ratio, "spread": (1, 2), "turns": 3}  # fmt: skip

    rows = [row("numba", 1, 1), row("torch", 3, 3.0), row("jax", 2, 2.0), row("numpy", None, None)]
    assert [(r["subject"], r["ratio"]) for r in fastest_peer(rows)] == [("jax", 2.0)]
    assert fastest_peer(rows[:1]) == []


def test_the_command_prints_each_row_and_the_fastest_peer(capsys):
    assert main([*QUICK, "--shape", SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "multiply-adds peak at" in lines[2]
    assert [line.split()[:3] for line in lines[4:8]] == [
        [SMALL, mask, subject] for mask in ("full", "causal") for subject in ("numba", "numpy")
    ]
    end = lines.index("")
    assert lines[end + 1].split()[:4] == ["shape", "mask", "fastest", "peer"]
    assert lines[end + 2].split()[:3] == [SMALL, "full", "numpy"]


def test_json_is_one_document_with_every_figure(capsys):
    assert main([*QUICK, "--shape", SMALL, "--json", "--mask", "causal"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["subject"] for row in data["rows"]] == ["numba", "numpy"]
    assert all(row["max_error"] < 1e-5 and row["seconds"] > 0 for row in data["rows"])
    shares = [row["gflops"] / data["peak_gflops"] for row in data["rows"]]
    assert [row["peak_share"] for row in data["rows"]] == shares
    assert data["rows"][0]["memory_mib"] is None
    assert data["complete"] is True and data["product_gflops"] > 0
    assert data["versions"]["numpy"] == np.__version__


def test_rows_are_shown_when_they_are_known_and_kept_when_the_user_interrupts(monkeypatch):
    seen = []

    def show(data):
        seen.append(len(data["rows"]))
        if len(data["rows"]) == 2:
            raise KeyboardInterrupt

    data = bench(
        shapes=[SMALL, "1,1,5,3"], peers=["numpy"], masks=["full"], threads=THREADS, seconds=0.01,
        show=show,
    )  # fmt: skip
    assert seen == [0, 2]
    assert data["complete"] is False and len(data["rows"]) == 2 and len(data["todo"]) == 2


def test_an_interrupted_command_says_how_far_it_came_and_ends_with_130(monkeypatch, capsys):
    import refattn.bench as room

    timed, done = room.time_problem, []

    def interrupted(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return timed(*arguments, **options)

    monkeypatch.setattr(room, "time_problem", interrupted)
    assert main([*QUICK, "--shape", SMALL]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "interrupted: 1 of 2 shapes were timed"
    # its row, and the summary's
    assert [line.split()[:3] for line in lines].count([SMALL, "full", "numpy"]) == 2


def test_gradients_are_timed_beside_those_that_have_them(capsys):
    assert main([*QUICK, "--shape", SMALL, "--backward", "--mask", "full"]) == 0
    out = capsys.readouterr().out
    assert "forward and backward" in out
    (line,) = (line for line in out.splitlines() if "not run" in line)
    assert line.split(maxsplit=3) == [
        SMALL,
        "full",
        "numpy",
        "not run: its gradients are not timed",
    ]


def test_a_shape_that_ours_declines_is_a_row_with_the_reason(capsys):
    code = main([*QUICK, "--shape", "100000,1000,100000,512", "--mask", "full"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "not run" in line]
    assert code == 0
    assert len(lines) == 2 and all("GiB are free" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--peer", "nobody"], "peer is 'nobody', but it must be one of those installed here"),
        (["--mask", "half"], "mask is 'half', but it must be one of full, causal"),
        (["--dtype", "int8"], "dtype is 'int8', but it must be one of float32, float64"),
        (["--seconds", "0"], "seconds is 0.0, but it must be finite and above zero"),
        (["--seconds", "nan"], "seconds is nan, but it must be finite and above zero"),
        (["--limit", "-1"], "limit is -1.0, but it must be finite and above zero"),
        (["--threads", "0"], "threads is 0, but it must be an integer of at least 1"),
        (["--threads", "100000"], "threads is 100000, but this process may use"),
        (
            ["--shape", "1,1,9:4,8"],
            "shape is '1,1,9:4,8', but a causal mask needs at least as many",
        ),
        (["--plot", "a.pdf"], "plot is a.pdf, but its name must end in .svg or .png"),
    ],
)
def test_a_nonsense_option_is_refused_in_one_sentence(words, sentence, capsys):
    assert main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"refattn: {sentence}") and err.count("\n") == 1


def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_timed(capsys, tmp_path):
    require("matplotlib")
    for path in (tmp_path / "no" / "a.svg", tmp_path / "folder.png"):
        if path.suffix == ".png":
            path.mkdir()
        assert main([*QUICK, "--shape", SMALL, "--plot", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "cannot be written" in err and err.count("\n") == 1


def test_a_plot_without_matplotlib_names_the_command_that_installs_it(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "a.svg"
    assert main([*QUICK, "--shape", SMALL, "--plot", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and 'pip install "refattn[plot]"' in err
    assert not path.exists()
