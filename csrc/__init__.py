"""Kernels on packed tensors: C++ (and later CUDA) behind ``torch.ops.jettison``, with a torch reference of each.

:mod:`.layout` says where every byte lies, :mod:`.reference` says what every op means, :mod:`.ops` is what callers use.
Importing this package loads neither torch nor the compiled library.
"""

from functools import cache
from pathlib import Path

__all__ = ["isa", "library_path", "load"]


def library_path() -> Path | None:
    """The compiled library, or None if this install has none."""
    return next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)


@cache
def load() -> Path:
    """Load the compiled library into torch, once.

    Raises:
        ImportError: if the library is missing or was built for another torch ABI.
    """
    import torch

    path = library_path()
    if path is None:
        raise ImportError(
            f"the compiled kernels are missing from {Path(__file__).parent}: install jettison with a C++ compiler "
            "present (pip install --force-reinstall jettison)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"{path.name} does not load into torch {torch.__version__}: it needs torch 2.11 or newer ({error})"
        ) from error
    return path


def isa() -> str:
    """The instruction set that the CPU kernels dispatch to: ``avx512``, ``avx2`` or ``portable``."""
    import torch

    load()
    return ("portable", "avx2", "avx512")[int(torch.ops.jettison.isa_tier())]
