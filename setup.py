"""The compiled CPU kernels; everything else about the package is in pyproject.toml.

One library on torch's stable ABI: no pybind, no per-torch and no per-Python build, so the wheel is tagged for the
platform alone. Each instruction-set tier is compiled with its own flags and chosen at run time. CUDA kernels travel as
source and are compiled where they run (csrc/cuda/compiler.py), so one wheel serves both.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
from build_backend import torch_folder  # noqa: E402

# Contraction is off so that quantising rounds as the torch reference does; fused operations are written out.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wall", "-Wextra",
         "-Wno-ignored-attributes"]  # fmt: skip
TIERS = {
    "csrc/cpu/tier_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/tier_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma",
                                 "-mf16c", "-mprefer-vector-width=512",
                                 # GCC 12's own AVX-512 headers set these off.
                                 "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
}  # fmt: skip
SOURCES = ["csrc/cpu/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/tier_portable.cpp"]


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # there is no Python module in it

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        if torch is None:
            raise RuntimeError("torch is not installed where jettison is built: pip install 'torch>=2.11' first")
        include = [str(torch / "include")]

        def compile_one(source: str) -> list[str]:
            flags = [*FLAGS, *TIERS.get(source, [])]
            return self.compiler.compile([source], self.build_temp, include_dirs=include, extra_postargs=flags)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["torch_cpu", "torch"],
            library_dirs=[str(torch / "lib")], target_lang="c++",
        )  # fmt: skip


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


tiers = list(TIERS) if platform.machine() in ("x86_64", "AMD64") else []
headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.h"))
setup(
    ext_modules=[Extension("jettison.csrc._kernels", [*SOURCES, *tiers], depends=headers)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
