import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refattn.vectors.canonical import canonical_json, sha256
from refattn.vectors.cases import RecipeError, recipes
from refattn.vectors.generate import SCRATCH, Engine, drawn, generate, make_case
from refattn.vectors.pack import PackError, core_pack, read_pack, root_hash
from refattn.vectors.verify import recipe_of, sampled, verify, verify_case
from refattn.vectors.write import case_bytes, write_case
from small_pack import ENGINE, RECIPES, certify, recipe

FEW = (
    "attention-one-key-1x16",
    "attention-family-cancelling-backward",
    "attention-everything-7x13-before-bias",
    "rope-interleaved-partial-64-16",
    "score-additive-small",
    "traffic-tiled-67x101x16-1000",
)
"""Cases of several ops that together certify in about a second."""


def _files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _counting():
    asked = []

    def count(op, inputs, parameters, conventions):
        asked.append(inputs["query"].shape[0])
        return certify(op, inputs, parameters, conventions)

    return Engine(count, ENGINE.coefficients), asked


def test_two_runs_give_the_same_bytes(tmp_path):
    hashes = [generate(tmp_path / n, only=RECIPES, with_=ENGINE) for n in ("one", "two")]
    assert hashes[0] == hashes[1]
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert not (tmp_path / "one" / SCRATCH).exists()


def test_the_order_of_recipes_does_not_matter(tmp_path):
    first = generate(tmp_path / "one", only=RECIPES, with_=ENGINE)
    assert generate(tmp_path / "two", only=RECIPES[::-1], with_=ENGINE) == first


def test_a_second_run_certifies_nothing_again(tmp_path):
    first = generate(tmp_path, only=RECIPES, with_=ENGINE)
    engine, asked = _counting()
    assert generate(tmp_path, only=RECIPES, with_=engine) == first
    assert asked == []
    assert generate(tmp_path, only=RECIPES, with_=engine, fresh=True) == first
    assert sorted(asked) == [2, 3, 5]


def test_what_broke_off_is_finished_without_doing_it_again(tmp_path):
    first = generate(tmp_path / "whole", only=RECIPES, with_=ENGINE)

    def break_off(op, inputs, parameters, conventions):
        if inputs["query"].shape[0] == 3:
            raise KeyboardInterrupt
        return certify(op, inputs, parameters, conventions)

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "x", only=RECIPES, with_=Engine(break_off, ENGINE.coefficients))
    assert not (tmp_path / "x" / "pack.json").exists()
    engine, asked = _counting()
    assert generate(tmp_path / "x", only=RECIPES, with_=engine) == first
    assert asked == [3]
    assert _files(tmp_path / "x") == _files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["case.json", "tensors.safetensors"])
def test_a_damaged_case_is_made_again(tmp_path, name):
    first = generate(tmp_path, only=RECIPES, with_=ENGINE)
    path = tmp_path / "part" / "small-b" / name
    path.write_bytes(path.read_bytes()[:-1])
    engine, asked = _counting()
    assert generate(tmp_path, only=RECIPES, with_=engine) == first
    assert asked == [2]
    assert read_pack(tmp_path).root_hash == first


def test_a_half_written_case_is_no_case(tmp_path):
    first = generate(tmp_path, only=RECIPES, with_=ENGINE)
    (tmp_path / "part" / "small-b" / "case.json").unlink()
    (tmp_path / "pack.json").unlink()
    assert generate(tmp_path, only=RECIPES, with_=ENGINE) == first


def test_a_changed_recipe_replaces_its_case(tmp_path):
    generate(tmp_path, only=RECIPES, with_=ENGINE)
    changed = [recipe("small-a", 11), *RECIPES[1:]]
    engine, asked = _counting()
    generate(tmp_path, only=changed, with_=engine)
    assert asked == [11]
    assert read_pack(tmp_path).cases[0].outputs["scores"].shape == (11, 7)


def test_a_case_that_no_recipe_makes_is_refused(tmp_path):
    generate(tmp_path, only=RECIPES, with_=ENGINE)
    with pytest.raises(PackError, match="small-c is made by no recipe; remove it first"):
        generate(tmp_path, only=RECIPES[:2], with_=ENGINE)
    assert len(read_pack(tmp_path).cases) == 3


def test_a_refused_generation_leaves_nothing_behind(tmp_path, monkeypatch):
    target = tmp_path / "new"
    monkeypatch.setitem(sys.modules, "flint", None)
    for name in [n for n in sys.modules if n.startswith("refattn.certify")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(PackError, match="certification needs flint"):
        generate(target)
    assert not target.exists()
    for stranger in (target / "part" / "small-z", target / "notes"):
        stranger.mkdir(parents=True)
        before = sorted(target.rglob("*"))
        with pytest.raises(PackError, match=f"{stranger.name} is made by no recipe"):
            generate(target, only=RECIPES, with_=ENGINE)
        assert sorted(target.rglob("*")) == before
        stranger.rmdir()


def test_a_file_as_target_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(PackError, match="x is a file, but it must be a folder"):
        generate(tmp_path / "x", only=RECIPES, with_=ENGINE)


@pytest.mark.parametrize("place", ["write_index", "_trusted", "_results"])
def test_a_disk_that_fails_anywhere_is_one_sentence(tmp_path, monkeypatch, place):
    def fail(*_words, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"refattn.vectors.generate.{place}", fail)
    with pytest.raises(PackError, match="cannot be written: No space left on device"):
        generate(tmp_path, only=RECIPES, with_=ENGINE)


def test_a_case_that_cannot_be_certified_is_named(tmp_path):
    def refuse(op, inputs, parameters, conventions):
        raise ValueError("scores[1, 2] is undecided at 4096 bits")

    with pytest.raises(PackError, match=r"^small-a cannot be certified: .*undecided"):
        generate(tmp_path, only=RECIPES, with_=Engine(refuse, ENGINE.coefficients))
    assert not (tmp_path / "part" / "small-a").exists()


def test_a_case_is_not_written_over_another(tmp_path):
    case = make_case(RECIPES[0], ENGINE)
    write_case(case, tmp_path / "small-a")
    before = _files(tmp_path)
    with pytest.raises(PackError, match="cannot be written"):
        write_case(case, tmp_path / "small-a")
    assert _files(tmp_path) == before


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    generate(tmp_path, only=RECIPES, with_=ENGINE, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3, "small-a"), (2, 3, "small-b"), (3, 3, "small-c")]


def test_an_unknown_size_is_refused():
    with pytest.raises(RecipeError, match="size is 'tiny', but it must be one of core, full"):
        recipes("tiny")


def test_full_contains_core_and_no_id_stands_twice():
    core, full = ({r.id for r in recipes(size)} for size in ("core", "full"))
    assert core < full
    assert len(full) == len(recipes("full"))


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
from refattn.vectors.cases import recipes
from refattn.vectors.generate import generate
few = [r for r in recipes("core") if r.id in sys.argv[3].split(",")]
def tell(done, total, id_):
    print(done, flush=True)
    if sys.argv[4] == "slow":
        import time
        time.sleep(0.3)
if __name__ == "__main__":
    print(generate(sys.argv[1], only=few, jobs=int(sys.argv[5]), progress=tell), flush=True)
"""


def _child(tmp_path, target, pace, jobs):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    words = [str(target), str(Path(__file__).parent), ",".join(FEW), pace, str(jobs)]
    return subprocess.Popen(
        [sys.executable, str(script), *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_midway_and_started_again_the_root_hash_is_the_same(tmp_path, jobs):
    few = [r for r in recipes("core") if r.id in FEW]
    whole = generate(tmp_path / "whole", only=few)
    child = _child(tmp_path, tmp_path / "killed", "slow", jobs)
    assert child.stdout.readline().strip() == "1"
    assert child.stdout.readline().strip() == "2"
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    time.sleep(0.1)
    assert not (tmp_path / "killed" / "pack.json").exists()
    assert any((tmp_path / "killed" / "part").iterdir())
    again = _child(tmp_path, tmp_path / "killed", "fast", jobs)
    out, _ = again.communicate(timeout=120)
    lines = out.split()
    assert lines[-1] == whole
    assert len(lines) - 1 < len(FEW)  # what was whole was kept
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


def _alive(pids):
    """Return the processes that still run; one that only waits to be reaped does not."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        found += [pid] if state != "Z" else []
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system has no /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    child = _child(tmp_path, tmp_path / "killed", "slow", 2)
    assert child.stdout.readline().strip() == "1"
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(children) >= 2
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    end = time.monotonic() + 20
    while _alive(children) and time.monotonic() < end:
        time.sleep(0.1)
    assert _alive(children) == []


def test_verification_makes_every_byte_again_and_proves_a_sample_twice(tmp_path):
    few = [r for r in recipes("core") if r.id in FEW]
    root = generate(tmp_path, only=few)
    found = verify(tmp_path, every=3)
    assert found == (root, len(FEW), len(FEW) // 3)


def test_a_forged_value_with_all_hashes_made_right_is_found(tmp_path):
    generate(tmp_path, only=RECIPES, with_=ENGINE)
    pack = read_pack(tmp_path)
    from dataclasses import replace

    case = pack.cases[1]
    forged = {"scores": np.nextafter(case.outputs["scores"], np.inf)}
    encoded, tensors = case_bytes(replace(case, outputs=forged))
    folder = tmp_path / "part" / case.id
    (folder / "case.json").write_bytes(encoded)
    (folder / "tensors.safetensors").write_bytes(tensors)
    import json

    index = json.loads((tmp_path / "pack.json").read_text())
    index["cases"][1] |= {"case_sha256": sha256(encoded), "tensors_sha256": sha256(tensors)}
    index["root_sha256"] = root_hash(index)
    (tmp_path / "pack.json").write_bytes(canonical_json(index))
    pack = read_pack(tmp_path)
    verify_case(tmp_path, pack.entries[0], with_=ENGINE)
    with pytest.raises(PackError, match=r"^small-b/case\.json is not what"):
        verify_case(tmp_path, pack.entries[1], with_=ENGINE)


def test_an_unknown_case_cannot_be_verified(tmp_path):
    generate(tmp_path, only=RECIPES, with_=ENGINE)
    with pytest.raises(PackError, match="there is no case small-q"):
        verify(tmp_path, only=["small-q"])


def test_a_sample_is_fixed_and_never_empty():
    ids = [f"c{i}" for i in range(100)]
    assert sampled(ids, 20) == sampled(ids[::-1], 20)
    assert len(sampled(ids, 20)) == 5
    assert sampled(["only"], 20) == ["only"]


def test_the_core_pack_holds_exactly_what_its_recipes_draw():
    pack, listed = core_pack(), recipes("core")
    assert [case.id for case in pack.cases] == [r.id for r in listed]
    for case, asked in zip(pack.cases, listed, strict=True):
        fresh = drawn(asked)
        stated = ("clauses", "flags", "op", "requires", "dtypes", "kills", "summary")
        for name in stated:
            assert getattr(case, name) == getattr(fresh, name), (case.id, name)
        assert case.parameters == fresh.parameters, case.id
        assert case.conventions == fresh.conventions, case.id
        for name, x in fresh.inputs.items():
            same = np.array_equal(x, case.inputs[name], equal_nan=x.dtype.kind == "f")
            assert same, (case.id, name)


@pytest.mark.parametrize("id_", sampled([r.id for r in recipes("core")], 25))
def test_certification_gives_the_bytes_of_the_core_pack(id_):
    pack = core_pack()
    entry = next(e for e in pack.entries if e.id == id_)
    assert verify_case(pack.path, entry) == id_


def test_a_case_states_its_own_recipe():
    listed = {r.id: r for r in recipes("core")}
    for case in core_pack().cases[::7]:
        stated, asked = recipe_of(case), listed[case.id]
        assert stated._replace(draws=asked.draws) == asked._replace(
            parameters=stated.parameters, conventions=stated.conventions
        )
