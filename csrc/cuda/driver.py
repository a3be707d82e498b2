"""The CUDA driver through ctypes: load a cubin, ask its occupancy, launch it. Nothing is linked at build time."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class DriverError(RuntimeError):
    """A call of the CUDA driver failed; the message holds the call and the driver's own text."""


@cache
def _driver() -> Any:
    # NOTES: PyDLL keeps the interpreter lock; the calls made per launch are shorter than giving it up.
    return ctypes.PyDLL("libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """Call `name` of the driver.

    Raises:
        DriverError: it did not return success.
    """
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(f"{name} failed: {(text.value or b'unknown error').decode()} ({code})")


class Function:
    """One loaded kernel of a compiled variant, on the current device.

    Attributes:
        threads: per block.
        places: blocks that one SM holds at the same time.
    """

    def __init__(self, cubin: bytes) -> None:
        self._module = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._module), cubin)
        self._function = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(self._function), self._module, b"kernel")
        self.threads = self._variable(b"threads")
        self._shared = self._variable(b"shared_bytes")
        call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, self._shared)
        places = ctypes.c_int()
        call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            ctypes.byref(places), self._function, self.threads, ctypes.c_size_t(self._shared),
        )  # fmt: skip
        self.places = places.value

    def _variable(self, name: bytes) -> int:
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self._module, name)
        call("cuMemcpyDtoH_v2", ctypes.byref(value), address, size)
        return value.value

    def launch(self, blocks: int, arguments: bytes, stream: int) -> None:
        """Queue `blocks` blocks on `stream`; `arguments` are the bytes of the kernel's one argument."""
        parameters = (ctypes.c_char_p * 1)(arguments)
        call(
            "cuLaunchKernel", self._function, blocks, 1, 1, self.threads, 1, 1, self._shared,
            ctypes.c_void_p(stream), parameters, None,
        )  # fmt: skip
