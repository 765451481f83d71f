"""Every kernel in CUDA C++ compiles for A100 and H100 without either, at no higher cost."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from optional import require_device
from refattn.errors import RefattnError
from refattn_gpu import ptx
from refattn_gpu.cuda import build, catalogue, costs, store
from refattn_gpu.cuda.catalogue import HOPPER, Variant, variants

LARGEST_SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}
"""Bytes that a block may ask for."""

EVERY = pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)

SMALLEST = catalogue.variant_of("float16", 32, terms=False)


NVRTC = pytest.mark.usefixtures("nvrtc")


@pytest.fixture
def nvrtc() -> None:
    """Skip, or fail, where nothing compiles."""
    require_device("nvrtc", build.no_nvrtc())


@pytest.fixture
def nvdisasm() -> None:
    """The same where nothing disassembles."""
    require_device("nvdisasm", costs.no_nvdisasm())


@NVRTC
@EVERY
def test_no_variant_costs_more_than_its_budget(variant: Variant) -> None:
    row = {target: build.build(variant, target).usage for target in variant.targets}
    budgets = ptx.read_budgets(costs.BUDGETS)
    assert ptx.grown({variant.name: row}, budgets, build.release()) == []
    for target, usage in row.items():
        assert (usage.spill, usage.local) == (0, 0)
        assert usage.shared <= LARGEST_SHARED[target]


@NVRTC
@EVERY
def test_the_assembler_makes_no_asynchronous_product_wait(variant: Variant) -> None:
    for target in variant.targets:
        assert not build.SERIAL.search(build.build(variant, target).report)


def test_a_warning_that_products_wait_is_recognised() -> None:
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are"
    assert build.SERIAL.search(line)
    assert not build.SERIAL.search(line.replace("C7510", "C7500"))


@NVRTC
@EVERY
def test_the_machine_code_multiplies_on_tensor_cores_and_leaves_registers_alone(
    variant: Variant, nvdisasm: None
) -> None:
    for target in variant.targets:
        found = costs.operations(build.build(variant, target).code)
        if variant.kernel in HOPPER:
            products, others = "HGMMA", ("UTMALDG", "SYNCS")
        else:
            products = "HMMA"
            others = {"ffma": ("LDGSTS",), "merge": ()}.get(variant.kernel, ("LDSM", "LDGSTS"))
        assert found[products] == costs.products(variant)  # one unrolled loop
        assert all(found[name] for name in others)  # how tiles come
        assert found["LDL"] == found["STL"] == 0


OVERLAPPING = [variant for variant in variants() if variant.overlaps]

WAITS = re.compile(r"DEPBAR\.LE gsb0, (0x[01])")
"""For all groups of products but the newest, or for all."""


@NVRTC
@pytest.mark.parametrize("variant", OVERLAPPING, ids=lambda variant: variant.name)
def test_the_machine_code_makes_weights_while_values_are_multiplied(
    variant: Variant, nvdisasm: None
) -> None:
    listing = costs.disassembly(build.build(variant, *variant.targets).code)
    _, *parts = WAITS.split(listing)
    powers = [
        (kind, part.count("MUFU.EX2")) for kind, part in zip(parts[::2], parts[1::2], strict=True)
    ]
    between = [count for kind, count in powers if kind == "0x1"]  # and the wait for the values
    assert [count >= variant.tile.cols // 2 for count in between] == [True]


def test_every_budget_is_of_a_variant_that_there_is() -> None:
    budgets = ptx.read_budgets(costs.BUDGETS)
    assert set(budgets) - {"ptxas"} == {variant.name for variant in variants()}
    for variant in variants():
        assert set(budgets[variant.name]) == set(variant.targets)


def test_without_a_compiler_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert costs.main([]) == 2
    assert 'cuda-bindings is not installed: pip install "cuda-bindings' in capsys.readouterr().err


@NVRTC
def test_a_source_that_is_refused_is_told_in_one_sentence() -> None:
    with pytest.raises(build.BuildError, match=r"NVRTC refuses forward float16 d32 .*nonsense"):
        build.build(SMALLEST, "sm_80", {"forward.cu": "nonsense"})


@NVRTC
def test_a_record_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "BYTES", catalogue.BYTES + 8)
    with pytest.raises(build.BuildError, match="the record of the host and of the kernels differ"):
        build.build(SMALLEST, "sm_80")


@NVRTC
def test_numbers_below_the_normal_range_are_kept(nvdisasm: None) -> None:
    text = 'extern "C" __global__ void k(float* x) { x[0] = x[1] * x[2] + x[3]; }'
    code = build.build(SMALLEST, "sm_80", {"forward.cu": text}).code
    listing = costs.disassembly(code)
    assert re.search(r"\bFFMA\b", listing)
    assert "FTZ" not in listing


@NVRTC
@pytest.mark.parametrize("d", catalogue.FEATURES)
@pytest.mark.parametrize("terms", [False, True])
def test_float32_is_multiplied_by_chunks_and_never_flushed(
    d: int, terms: bool, nvdisasm: None
) -> None:
    variant = catalogue.variant_of("float32", d, terms, "ffma")
    lines, keys = variant.tile.rows // variant.tile.warps // 4, variant.tile.cols // 8  # a thread's
    for target in variant.targets:
        listing = costs.disassembly(build.build(variant, target).code)
        assert not re.search(r"\b(FFMA|FMUL|FMNMX|MUFU)\S*\.FTZ", listing)
        chunk_of_s, eighth_of_o = 4 * lines * keys, lines * keys * d // 8
        assert len(re.findall(r"\bFFMA ", listing)) >= chunk_of_s + eighth_of_o
        assert len(re.findall(r"\bLDS\.128 ", listing)) >= 2 * lines + keys  # of Q, P and K
        assert len(re.findall(r"\bSTS\.128 ", listing)) >= lines * keys // 4  # of P


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    return tmp_path


def test_what_was_compiled_is_found_again_without_a_second_compilation(place: Path) -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"code"

    assert [store.kept("a", make) for _ in range(3)] == [b"code"] * 3
    assert len(made) == 1
    assert [path.name for path in place.iterdir()] == ["a"]


@pytest.mark.parametrize("left", [0, 10, 35])
def test_a_file_without_its_end_is_made_again(place: Path, left: int) -> None:
    store.kept("a", lambda: b"code")
    (place / "a").write_bytes((place / "a").read_bytes()[:left])
    assert store.kept("a", lambda: b"other") == b"other"
    assert store.kept("a", lambda: b"never") == b"other"


def test_where_nothing_can_be_written_the_code_is_made_every_time_without_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "absent")
    assert store.kept("a", lambda: b"code") == b"code"


TWICE = """
import sys
from refattn_gpu.cuda import store
print(len(store.kept("big", lambda: sys.argv[1].encode() * 2**20)))
"""


def test_processes_that_compile_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    environment = {"REFATTN_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, letter], env=environment, stdout=subprocess.PIPE
        )
        for letter in "abcd"
    ]
    assert [run.communicate()[0] for run in runs] == [b"1048576\n"] * 4
    (path,) = (tmp_path / "refattn" / "cuda").iterdir()
    assert len(set(path.read_bytes()[: -store.SEAL])) == 1


def test_the_borders_between_texts_count() -> None:
    assert store.digest_of(["ab", "c"]) != store.digest_of(["a", "bc"])


def test_a_cubin_that_is_none_is_told_in_one_sentence(nvdisasm: None) -> None:
    with pytest.raises(RefattnError, match="nvdisasm refuses the cubin"):
        costs.operations(b"no cubin")
