"""setuptools, asking for torch only where the environment that is installed into has none.

The kernels need torch's headers, and pip builds in an empty environment by default: a static build requirement
would download a second torch, with its CUDA packages, beside the one that is there.
"""

import importlib.util
import sysconfig
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import (
    get_requires_for_build_editable as _editable,
)
from setuptools.build_meta import (
    get_requires_for_build_wheel as _wheel,
)

REQUIREMENT = "torch>=2.11"


def torch_folder() -> Path | None:
    """The torch to build against: importable, or installed where this interpreter installs packages."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    return next((c for c in candidates if (c / "include/torch/csrc/stable/library.h").is_file()), None)


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if torch_folder() else [*requirements, REQUIREMENT]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return _with_torch(_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return _with_torch(_editable(config_settings))
