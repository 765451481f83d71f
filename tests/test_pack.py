import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from refattn.errors import RefattnError
from refattn.vectors.canonical import canonical_json, read_json, sha256
from refattn.vectors.generate import generate
from refattn.vectors.ops import misfit
from refattn.vectors.pack import (
    PackError,
    core_pack,
    read_case,
    read_pack,
    root_hash,
    tensor_record,
)
from refattn.vectors.write import case_bytes, rounded_up, stored_unit
from small_pack import ENGINE, RECIPES

CASE = "part/small-a/case.json"
TENSORS = "part/small-a/tensors.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    target = tmp_path_factory.mktemp("pack")
    generate(target, only=RECIPES, with_=ENGINE)
    return target


@pytest.fixture
def pack(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pack")


def _reindex(pack, **changes):
    """Write pack.json anew with right hashes of all files, so that deeper checks are reached."""
    index = json.loads((pack / "pack.json").read_text())
    for entry in index["cases"]:
        for name, key in (("case.json", "case_sha256"), ("tensors.safetensors", "tensors_sha256")):
            path = pack / "part" / entry["id"] / name
            if path.is_file():
                entry[key] = sha256(path.read_bytes())
    index |= changes
    index["root_sha256"] = root_hash(index)
    (pack / "pack.json").write_bytes(canonical_json(index))


def _edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_bytes(canonical_json(document))


def _refusal(pack):
    with pytest.raises(PackError) as caught:
        read_pack(pack)
    sentence = str(caught.value)
    assert isinstance(caught.value, RefattnError)
    assert "\n" not in sentence
    return sentence


def test_a_pack_reads_back_as_it_was_made(made):
    pack = read_pack(made)
    assert [case.id for case in pack.cases] == ["small-a", "small-b", "small-c"]
    case = pack.cases[0]
    assert case.outputs["scores"].dtype == np.float64
    assert np.array_equal(
        case.outputs["scores"], case.inputs["query"].astype(float) @ case.inputs["key"].T
    )
    assert case.units["scores.unit"].dtype == np.float32
    assert (case.units["scores.unit"] >= np.abs(case.outputs["scores"])).all()
    assert set(case.bounds) == {"fp64", "fp32", "tf32", "bf16", "fp16", "fp16_accumulate"}
    assert case.bounds["fp32"]["scores"][1] >= 3e-4
    assert pack.flags["Score"].bug_type == "basic"
    assert "version" not in case.certification


def test_tensors_of_a_case_cannot_be_written_to(made):
    with pytest.raises(ValueError, match="read-only"):
        read_pack(made).cases[0].outputs["scores"][0, 0] = 1


def test_every_flipped_bit_is_noticed(pack):
    generator = np.random.default_rng(5)
    for name in ("pack.json", CASE, TENSORS):
        path = pack / name
        whole = path.read_bytes()
        for place in generator.integers(0, len(whole), 40):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(damaged))
            _refusal(pack)
        path.write_bytes(whole)
    assert read_pack(pack)


def test_an_expected_value_changed_with_its_file_hash_is_noticed(pack):
    path = pack / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    _reindex(pack)
    assert "but case.json says" in _refusal(pack)


@pytest.mark.parametrize("name", ["pack.json", CASE, TENSORS])
def test_a_missing_file_is_refused(pack, name):
    (pack / name).unlink()
    assert name.rsplit("/", 1)[-1] in _refusal(pack)


@pytest.mark.parametrize("name", ["pack.json", CASE, TENSORS])
@pytest.mark.parametrize("left", [0, 7, -1])
def test_a_truncated_file_is_refused(pack, name, left):
    path = pack / name
    path.write_bytes(path.read_bytes()[:left])
    if name != "pack.json":
        _reindex(pack)
    _refusal(pack)


def test_a_file_or_a_case_too_many_is_refused(pack):
    (pack / "part/small-a/notes.txt").write_text("x")
    assert "notes.txt" in _refusal(pack)
    (pack / "part/small-a/notes.txt").unlink()
    (pack / "part/small-z").mkdir()
    assert "small-z" in _refusal(pack)


@pytest.mark.parametrize("path", ["../part/small-a", "/etc", "part/../../x", "part/small-b"])
def test_a_path_outside_the_pack_or_of_another_case_is_refused(pack, path):
    index = json.loads((pack / "pack.json").read_text())
    index["cases"][0]["path"] = path
    _reindex(pack, cases=index["cases"])
    _refusal(pack)


def test_a_path_that_leaves_the_pack_is_said_to(pack):
    shutil.copytree(pack / "part/small-a", pack.parent / "small-a")
    index = json.loads((pack / "pack.json").read_text())
    index["cases"][0]["path"] = "../small-a"
    _reindex(pack, cases=index["cases"])
    assert "leads outside the pack" in _refusal(pack)


@pytest.mark.parametrize("name", ["part", "part/small-a", TENSORS])
def test_a_link_out_of_the_pack_is_refused(pack, name):
    inside, outside = pack / name, pack.parent / "elsewhere"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert "leads outside the pack" in _refusal(pack)


def test_a_pack_reached_by_a_link_reads(pack):
    link = pack.parent / "link"
    link.symlink_to(pack)
    assert len(read_pack(link).cases) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.pop("clauses"), "clauses"),
        (lambda d: d["conventions"].update(alignment="top_left"), "alignment"),
        (lambda d: d["parameters"].update(kind="cosine-ish"), "cosine-ish"),
        (lambda d: d["certification"].update(ambiguous=1), "ambiguous"),
        (lambda d: d["inputs"]["key"].update(dtype="float16"), "float16"),
        (lambda d: d["bounds"]["fp32"].update(scores=[1.0, -1.0, 0.0]), "-1.0"),
        (lambda d: d["bounds"].update(fp8={}), "fp8"),
        (lambda d: d.update(schema=2), "schema version 2"),
        (lambda d: d.update(schema=True), "schema version True"),
        (lambda d: d.update(id="small-b"), "small-b"),
        (lambda d: d.update(flags=["Unheard"]), "Unheard"),
        (lambda d: d["inputs"]["key"].update(shape=[3, 7]), "shape"),
        (lambda d: d["inputs"]["key"].update(sha256="0" * 64), "sha256"),
        (lambda d: d["inputs"].update(mask=d["inputs"]["key"]), "lacks the tensor mask"),
        (lambda d: d["units"].pop("scores.unit"), "does not name"),
        (lambda d: d.update(clauses=["SCORES-DOT99"]), "there is no clause SCORES-DOT99"),
        (lambda d: d.update(bounds={}), "bounds of no profile"),
        (lambda d: d["bounds"]["tf32"].pop("scores"), "bounds of tf32 are for no output"),
        (lambda d: d["bounds"]["fp32"].update(states=[0, 0, 0]), "bounds of fp32 are for"),
        (lambda d: d["bounds"]["fp32"].update(scores=[1e308, 1e308, 1e308]), "is not finite"),
        (lambda d: d["draws"].pop("key"), "key is not both an input and in draws"),
        (lambda d: d["draws"].update(value=d["draws"]["key"]), "value is not both"),
        (lambda d: d["parameters"].update(kind="general"), "input of score weight is missing"),
    ],
)
def test_a_changed_field_is_refused_by_name(pack, change, words):
    _edit(pack / CASE, change)
    _reindex(pack)
    assert words in _refusal(pack)


def _replace_tensors(pack, change):
    """Change tensors of a case, with case.json and all hashes made right."""
    from safetensors.numpy import load_file, save

    tensors = load_file(pack / TENSORS)
    change(tensors)
    (pack / TENSORS).write_bytes(save(tensors))

    def restate(document):
        for group in ("inputs", "outputs", "units"):
            found = {n: tensor_record(tensors[n]) for n in document[group] if n in tensors}
            document[group] = found
        known = {n for group in ("inputs", "outputs", "units") for n in document[group]}
        document["inputs"] |= {n: tensor_record(x) for n, x in tensors.items() if n not in known}
        document["draws"] = {n: {"kind": "normal", "options": {}} for n in document["inputs"]}

    _edit(pack / CASE, restate)
    _reindex(pack)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("query"), "the input of score query is missing"),
        (lambda t: t.pop("scores.unit"), "the unit scores.unit is missing"),
        (lambda t: t.update(mask=t["key"]), "mask is no input of score here"),
        (lambda t: t.update(key=t["key"].reshape(-1)), "key has shape (21,), but its axes are"),
        (lambda t: t.update(key=t["key"][:-1].copy()), "scores has shape (5, 7), but its axes"),
        (lambda t: t.update(key=t["key"].astype("i8")), "key has dtype int64"),
        (lambda t: t["scores.unit"].__setitem__(0, np.inf), "scores.unit holds a number"),
        (lambda t: t["scores.unit_logit"].__setitem__(0, -1), "scores.unit_logit holds a number"),
    ],
)
def test_a_tensor_that_its_operation_does_not_have_is_refused(pack, change, words):
    _replace_tensors(pack, change)
    assert words in _refusal(pack)


@pytest.mark.parametrize(
    ("mask", "fits"),
    [((5, 7), True), ((1, 7), True), ((2, 1, 5, 7), True), ((3, 7), False), ((1,) * 5, False)],
)
def test_a_mask_is_broadcast_to_the_logits(mask, fits):
    shapes = {"query": (2, 3, 5, 4), "key": (2, 3, 7, 4), "value": (2, 3, 7, 6)}
    inputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    inputs["mask"] = np.ones(mask, bool)
    outputs = {"output": np.zeros((2, 3, 5, 6)), "logsumexp": np.zeros((2, 3, 5))}
    assert (misfit("attention", {}, inputs, outputs) == "") is fits


def test_metadata_in_a_tensor_file_is_refused(pack):
    data = (pack / TENSORS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.dumps({**json.loads(data[8:end]), "__metadata__": {"x": "y"}}).encode()
    (pack / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + data[end:])
    _reindex(pack)
    assert "holds __metadata__" in _refusal(pack)


def test_a_stray_file_beside_the_index_is_refused(pack):
    (pack / "README.md").write_text("of the pack")
    assert read_pack(pack)
    (pack / "notes.txt").write_text("x")
    assert "holds notes.txt" in _refusal(pack)


@pytest.mark.parametrize("name", ["pack.json", CASE, TENSORS])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(pack, name):
    (pack / name).unlink()
    os.mkfifo(pack / name)
    assert "is no plain file" in _refusal(pack)


def test_an_unknown_schema_version_of_the_pack_is_refused(pack):
    _reindex(pack, schema=7)
    assert "schema version 7" in _refusal(pack)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        (f'{{"a": {"9" * 400}}}', "which float64 cannot hold"),
        (f'{{"a": {"9" * 5000}}}', "which float64 cannot hold"),
        ('{"a": ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\xff", "x"),
    ],
)
def test_json_is_read_strictly(text, words):
    with pytest.raises(PackError, match=r"^x ") as caught:
        read_json(text.encode("latin-1"), "x")
    assert words in str(caught.value)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(pack):
    path = pack / TENSORS
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    _reindex(pack)
    assert "not a whole safetensors file" in _refusal(pack)


def test_a_case_reads_alone(made):
    assert read_case(made / "part" / "small-b").id == "small-b"


def test_a_wrong_root_hash_is_refused(pack):
    index = json.loads((pack / "pack.json").read_text())
    index["root_sha256"] = "0" * 64
    (pack / "pack.json").write_bytes(canonical_json(index))
    assert "root hash" in _refusal(pack)


def test_tensor_files_do_not_depend_on_the_order_of_tensors(made):
    from dataclasses import replace

    case = read_pack(made).cases[0]
    turned = replace(case, inputs=dict(reversed(list(case.inputs.items()))))
    assert case_bytes(turned) == case_bytes(case)


def test_stored_units_are_rounded_up_to_eight_bits_whatever_the_last_bit_was():
    x = np.array([1.0, np.nextafter(1.0, 0), np.nextafter(1.0, 2), 0.0, 3.1e-45, 2.0**120])
    up = stored_unit(x).astype(np.float64)
    assert up[0] == up[1] == up[2] == 1 + 2.0**-7
    assert up[3] == 0
    assert (up >= x).all()
    assert np.isfinite(up).all()
    random = np.random.default_rng(1).random(1000) * 100
    assert (rounded_up(random, 8) >= random).all()
    assert (rounded_up(random, 8) <= random * (1 + 2.0**-7) * (1 + 2.0**-39)).all()


def test_the_core_pack_reads_and_every_case_says_what_it_exercises():
    from refattn.spec_text import load_clauses

    pack, clauses = core_pack(), load_clauses()
    assert pack.size == "core"
    for case in pack.cases:
        assert set(case.clauses) <= set(clauses), case.id
        assert case.certification["ambiguous"] == 0
        floats = {name for name, x in case.outputs.items() if x.dtype.kind == "f"}
        assert all(set(bounds) == floats for bounds in case.bounds.values()), case.id
        assert {f"{name}.unit" for name in floats} <= set(case.units), case.id


def test_a_damaged_pack_is_one_line_and_exit_code_2_on_the_command_line(pack):
    (pack / CASE).write_text("{}")
    command = [sys.executable, "-m", "refattn.cli", "vectors", "list", "--pack", str(pack)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("refattn: ")
    assert done.stdout == ""
