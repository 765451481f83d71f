"""The one door to numba.cuda: a device, the simulator that stands in for one, or neither and why.

numba-cuda is in maintenance mode, so that no other module may know it. Where it is not installed,
the simulator that Numba itself carries serves. The simulator runs the text of a kernel in Python,
one thread of the operating system a CUDA thread: slowly, but line by line the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from refattn.backends import BackendAbsent

SWITCH = "NUMBA_ENABLE_CUDASIM"
"""Environment variable: 1 asks for the simulator, 0 forbids it, unset lets the machine decide."""

REMEDY = 'pip install "refattn[cuda13]" (or "refattn[cuda12]"), or "refattn[cpu]" for the simulator'
"""What installs what is missing."""

TURN = 2e-5
"""Seconds between turns of the interpreter's threads in the simulator, whose barrier waits by
polling: with Python's own 5 ms a barrier takes as long."""


class State(NamedTuple):
    """What runs kernels here."""

    kind: str
    """"device", "simulator" or "absent"."""
    reason: str
    """Which device or simulator it is, or why there is none: a sentence's end."""


def _device_error() -> str:
    """Return why there is no CUDA device, or "" where there is one; asks the driver alone."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return f"the CUDA driver {name} was not found"
    count = ctypes.c_int(0)
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        return f"the CUDA driver answered with error {code}"
    return "" if count.value else "the CUDA driver knows no device"


def _imported(simulated: bool) -> Any:
    """Import numba.cuda as what it shall be; the switch is read during that import only."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = str(int(simulated))
    try:
        numba = importlib.import_module("numba")
        numba.config.ENABLE_CUDASIM = int(simulated)  # Numba's own copy may have been read before
        return importlib.import_module("numba.cuda")
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def _open() -> tuple[Any, State]:
    """Return numba.cuda, None where it cannot be had, and what it is here."""
    if importlib.util.find_spec("numba") is None:
        return None, State("absent", f"numba is not installed: {REMEDY}")
    reason = _device_error()
    asked = os.environ.get(SWITCH)
    loaded = "numba.cuda" in sys.modules
    try:
        module = _imported(asked == "1" or (bool(reason) and asked is None and not loaded))
    except ImportError as error:
        return None, State("absent", f"numba.cuda cannot be imported, {error}: {REMEDY}")
    package = "numba-cuda" if hasattr(module, "implementation") else "numba"
    if "Fake" in type(module.jit(lambda: None)).__name__:
        return module, State("simulator", f"the CUDA simulator of {package}")
    if reason:
        return module, State("absent", f"{reason}; {SWITCH}=1 runs the simulator")
    return module, State("device", f"{package} on {module.get_current_device().name.decode()}")


cuda, STATE = _open()
"""numba.cuda, or None, for the modules of kernels; and what it is."""

SIMULATED = STATE.kind == "simulator"
"""Whether kernels run in the simulator."""


def require() -> State:
    """Return what runs kernels here.

    Raises:
        BackendAbsent: nothing does.
    """
    if STATE.kind == "absent":
        raise BackendAbsent(f"numba.cuda runs no kernel here: {STATE.reason}")
    return STATE


def leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that kernels may call; the simulator calls Python's own."""
    bound: Callable[..., Any] = function if SIMULATED else cuda.jit(device=True)(function)
    return bound


def kernel(function: Callable[..., Any]) -> Any:
    """Return a function that can be launched."""
    return cuda.jit(function)


def types() -> Any:
    """Return Numba's types, in which the arguments of a kernel are stated."""
    return importlib.import_module("numba").types


def compile_ptx(function: Any, signature: tuple[Any, ...], cc: tuple[int, int]) -> str:
    """Return the PTX of a kernel for a compute capability, on a machine with or without a device.

    Numba asks the current device for the capability whenever a kernel calls a leaf, though the
    leaf's code is made for the one that was given: a stand-in answers in its place.
    """
    dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        text, _ = cuda.compile_ptx(function, signature, cc=cc)
    finally:
        dispatcher.get_current_device = asked
    return str(text)


def launch(function: Any, blocks: int, threads: int, *records: Any) -> None:
    """Run a kernel on records of arrays and numbers; arrays of NumPy travel there and back.

    Args:
        function: of `kernel`.
        blocks: of the grid.
        threads: a block.
        *records: named tuples. What a kernel writes stands in the first one.
    """
    require()
    if not blocks:
        return
    if SIMULATED:
        with _simulating():
            function[blocks, threads](*records)
        return
    moved = [type(record)(*map(_moved, record)) for record in records]
    function[blocks, threads](*moved)
    for host, there in zip(records[0], moved[0], strict=True):
        if hasattr(there, "copy_to_host") and not hasattr(host, "__cuda_array_interface__"):
            there.copy_to_host(host)


def _moved(value: Any) -> Any:
    """Return an array where a kernel can read it, and a number as it is."""
    if hasattr(value, "__cuda_array_interface__"):
        return cuda.as_cuda_array(value)
    return cuda.to_device(value) if hasattr(value, "ctypes") and value.ndim else value


_ALLOCATING = threading.Lock()
"""Held while a thread of the simulator asks for shared memory."""


def _shared_array(shared: Any, shape: Any, dtype: Any, alignment: int | None = None) -> Any:
    """Return the array of a line of a kernel, one for all threads of a block.

    Stands in for the simulator's own, which looks for the array and makes it without a lock, so
    that two threads that ask at once may hold different ones. A new array holds NaN: what a kernel
    reads before it wrote it is seen in the result.
    """
    line = sys._getframe(1)
    place = line.f_code.co_filename, line.f_lineno
    with _ALLOCATING:
        if place not in shared._allocations:
            shared._allocations[place] = np.full(shape, np.nan, dtype)
        return shared._allocations[place]


@contextlib.contextmanager
def _simulating() -> Iterator[None]:
    """Let IEEE values travel silently, the barriers be quick, and shared memory be shared."""
    shared = importlib.import_module("numba.cuda.simulator.kernelapi").FakeCUDAShared
    turn, own = sys.getswitchinterval(), shared.array
    sys.setswitchinterval(TURN)
    shared.array = _shared_array
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        shared.array = own
        sys.setswitchinterval(turn)
