"""What the README says is what its commands print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from refattn.bench import MASKS
from refattn.bench.shapes import FORWARD, read_todo
from refattn.cli.bench import COLUMNS, FASTEST

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(language, text) for language, text in FENCE.findall(README)]
PYTHON = [text for language, text in BLOCKS if language == "python" and "import refattn" in text]
SHOWN = [text for _, text in BLOCKS if text.startswith("$ refattn ")]
MEASURED = [text for text in SHOWN if text.startswith("$ refattn bench ")]
COMMANDS = [text for text in SHOWN if text not in MEASURED]
SUBJECT = next(text for _, text in BLOCKS if text.startswith("# my_attention.py"))


def comparable(text):
    """Leave out what differs between machines: ratios and widths of columns."""
    text = re.sub(r"\b(ok|FAIL) [0-9.e+-]+", r"\1 #", text)
    text = re.sub(r"(\d) +([0-9.e+-]+|inf|–)$", r"\1 #", text, flags=re.MULTILINE)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def printed(command, folder):
    """Run a README command, with its pipe to tail, and return what it prints."""
    words, _, tail = command.partition(" | tail -n ")
    program = [sys.executable, "-c", "import sys; from refattn.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*program, *words.split()[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return "\n".join(done.stdout.rstrip().splitlines()[-int(tail or 10_000) :])


def test_the_readme_opens_with_the_two_commands():
    assert BLOCKS[0][1] == 'pip install . && refattn check\npip install -e ".[test]" && pytest\n'
    assert README.startswith("# refattn\n\n```\n")


@pytest.mark.parametrize("text", PYTHON)
def test_the_python_of_the_readme_runs(text):
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True)


@pytest.mark.parametrize("text", COMMANDS, ids=lambda text: text.splitlines()[0])
def test_the_output_in_the_readme_is_what_the_command_prints(text, tmp_path):
    command, shown = text[2:].split("\n", 1)
    if "torch-sdpa" in command:
        torch = pytest.importorskip("torch")
        if not torch.__version__.startswith("2.13.0"):
            pytest.skip(f"the README shows torch 2.13.0, but {torch.__version__} is installed")
    (tmp_path / "my_attention.py").write_text(SUBJECT, "utf-8")
    assert comparable(printed(command, tmp_path)) == comparable(shown)


def test_every_block_of_the_readme_is_one_of_these_kinds():
    assert len(PYTHON) == 3
    assert len(COMMANDS) == 4
    assert len(MEASURED) == 3


@pytest.mark.parametrize("text", MEASURED, ids=lambda text: text.splitlines()[0])
def test_what_was_measured_is_printed_as_the_command_prints_it(text):
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
        words, _, tail = command.partition(" | tail -n ")
        lines = shown.splitlines()
        assert len(lines) == int(tail or len(lines))
        *_, end = lines
        assert re.match(
            r"in the whole run, \d+ s on .+, 2 threads: multiply-adds peak at \d+ ", end
        )
        table = lines[next(i for i, line in enumerate(lines) if "fastest peer" in line) : -1]
        assert tuple(re.split(r" {2,}", table[0])) == FASTEST
        given = re.findall(r"--shape (\S+)", words) or FORWARD
        todo = [[str(shape), mask] for shape, mask in read_todo(tuple(given), MASKS)]
        assert [line.split()[:2] for line in table[1:]] == todo
        if not tail:
            assert " ".join(COLUMNS[:-1]) in " ".join(shown.split())
