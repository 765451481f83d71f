"""Compiling kernels once a machine: where the machine code is kept, and who may write it.

Numba's own cache looks at one source file a function, so that a change of an inlined function goes
unnoticed, and two processes that compile two signatures at once can exchange their files. Here the
stamp covers every source of this folder and the scalar rules, and a process holds a lock while it
compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba import njit, typeof
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from refattn import rules

log = logging.getLogger("refattn.cpu")
"""Says when a kernel has to be compiled."""

PATIENCE = 1.0
"""Seconds after which a kernel that is not there yet is said to be compiling."""


_ready: dict[tuple[Any, type], int] = {}
"""Kernels and formats that need no more preparation, and where their machine code is."""


def source_digest() -> str:
    """Return a digest of every source of the kernels, and of Numba's version."""
    digest = hashlib.sha256(numba.__version__.encode())
    sources = sorted(Path(__file__).parent.glob("*.py"))
    for path in (*sources, Path(rules.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Return where machine code is kept: NUMBA_CACHE_DIR, else the user's cache folder."""
    given = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    base = Path(given) if given else Path.home() / ".cache"
    for folder in (base / "refattn", Path(tempfile.gettempdir()) / f"refattn-{_user()}"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="refattn-"))


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


DIGEST = source_digest()
"""The stamp of this process's kernels."""

FOLDER = cache_folder() / DIGEST
"""Where this process's kernels are kept."""


class _Locator(_CacheLocator):
    """Tells Numba's cache where to write, and that the sources are as the folder's name says."""

    def __init__(self, function: Any):
        self._name = function.__qualname__

    def get_cache_path(self) -> str:
        return str(FOLDER)

    def get_source_stamp(self) -> str:
        return DIGEST

    def get_disambiguator(self) -> str:
        return str(self._name)

    @classmethod
    def from_function(cls, function: Any, file: str) -> _Locator:
        return cls(function)


class _Storage(CompileResultCacheImpl):
    """Machine code of one function, found by `_Locator` alone."""

    _locator_classes = [_Locator]  # noqa: RUF012 - the name is Numba's


class _Cache(FunctionCache):
    """Numba's cache of a function, kept by `_Storage`."""

    _impl_class = _Storage


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled without the interpreter's lock, kept on disk between runs."""
    dispatcher = njit(error_model="numpy", nogil=True)(function)
    dispatcher._cache = _Cache(dispatcher.py_func)
    compiled: Callable[..., Any] = dispatcher
    return compiled


def prepare(dispatcher: Any, *arguments: Any) -> int:
    """Load or compile a kernel for the types of some arguments, one process at a time.

    A kernel has one signature a computing format, which is the type of its first argument.

    Returns:
        address: of the kernel as a function of C, which `atomics.call` calls.
    """
    known = _ready.get((dispatcher, type(arguments[0])))
    if known is not None:
        return known
    signature = tuple(typeof(argument) for argument in arguments)
    name = f"{dispatcher.py_func.__name__} in {signature[0]}"
    sentence = "compiling the kernel %s: once a machine, about ten seconds"
    notice = threading.Timer(PATIENCE, log.info, (sentence, name))
    notice.daemon = True
    notice.start()
    try:
        with _locked(FOLDER / "lock"):
            dispatcher._can_compile = True
            dispatcher.compile(signature)
            dispatcher.disable_compile()  # another signature is a fault, and would miss the lock
    finally:
        notice.cancel()
    result = dispatcher.overloads[signature]
    address = int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))
    _ready[dispatcher, type(arguments[0])] = address
    return address


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the system gives back however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            held = False
            while not held:  # it gives up after ten seconds
                with contextlib.suppress(OSError):
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    held = True
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
