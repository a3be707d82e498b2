"""From a variant to a cubin: compiled once by NVRTC (or nvcc), then read from a cache folder.

The compiler comes with every CUDA build of torch, so the package needs none when it is built, and each shape gets its
own kernel. A cubin is named by the hash of everything that went into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from .variants import Variant

FOLDER = Path(__file__).parent
ARCHITECTURE = "sm_90a"
OPTIONS = ("-std=c++20",)


class CompilerMissingError(RuntimeError):
    """Neither NVRTC nor nvcc was found."""


def cubin(variant: Variant) -> bytes:
    """Return the machine code of `variant`, from the cache if it is there.

    Raises:
        CompilerMissingError: it is not cached and there is no compiler.
        RuntimeError: the compiler refused the source; its log is the message.
    """
    source = variant.source()
    path = cache_folder() / f"{_digest(source)}.cubin"
    if path.exists():
        return path.read_bytes()
    code = _nvrtc(source) if _nvrtc_library() is not None else _nvcc(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)
    return code


def name() -> str | None:
    """The compiler that will be used: NVRTC, nvcc, or None."""
    return "NVRTC" if _nvrtc_library() is not None else "nvcc" if _nvcc_path() else None


def cache_folder() -> Path:
    """`JETTISON_KERNEL_CACHE`, or `jettison/kernels` in the user's cache folder."""
    chosen = os.environ.get("JETTISON_KERNEL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "jettison" / "kernels"


@cache
def _headers() -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(FOLDER.glob("*.cuh")))


def _digest(source: str) -> str:
    parts = (source.encode(), _headers(), " ".join((ARCHITECTURE, *OPTIONS)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


@cache
def _nvrtc_library() -> Any:
    import torch

    major = (torch.version.cuda or "13").split(".")[0]
    roots = [Path(torch.__file__).parent / "lib", *Path(torch.__file__).parent.parent.glob("nvidia/*/lib")]
    names = [f"libnvrtc.so.{major}", *(str(root / f"libnvrtc.so.{major}") for root in roots)]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _nvrtc(source: str) -> bytes:
    library, program = _nvrtc_library(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"variant.cu", 0, None, None)
    try:
        options = [f"--gpu-architecture={ARCHITECTURE}", f"-I{FOLDER}", *OPTIONS]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), array)
        if failed:
            raise RuntimeError(f"NVRTC refused a kernel:\n{_nvrtc_text(library, program, 'ProgramLog').decode()}")
        return _nvrtc_text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_text(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _nvcc_path() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _nvcc(source: str) -> bytes:
    nvcc = _nvcc_path()
    if nvcc is None:
        raise CompilerMissingError("neither NVRTC (it comes with torch's CUDA builds) nor nvcc was found: install one")
    with tempfile.TemporaryDirectory() as folder:
        file, target = Path(folder) / "variant.cu", Path(folder) / "variant.cubin"
        file.write_text(source)
        command = [nvcc, "-cubin", f"-arch={ARCHITECTURE}", f"-I{FOLDER}", *OPTIONS, str(file), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc refused a kernel:\n{done.stdout}{done.stderr}")
        return target.read_bytes()
