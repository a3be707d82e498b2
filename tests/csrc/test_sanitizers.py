"""What needs another build of the kernels: sanitizers over random shapes (T-12), and tiers that keep to themselves."""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cpu"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off",
         "-fno-math-errno", "-w", f"-I{SOURCES}"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
UNITS = {
    SOURCES / "dispatch.cpp": [],
    SOURCES / "tier_portable.cpp": [],
    SOURCES / "tier_avx2.cpp": AVX2,
    SOURCES / "tier_avx512.cpp": AVX512,
    HERE / "sanitize" / "driver.cpp": [],
}  # fmt: skip


X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the tiers named here are x86's")


@X86
@pytest.mark.slow
def test_t12_no_sanitizer_finding(tmp_path):
    def build(source):
        target = tmp_path / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *UNITS[source], "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, UNITS))
    driver = str(tmp_path / "driver")
    subprocess.run(["g++", "-fsanitize=address,undefined", *objects, "-o", driver], check=True)
    # An engine that ran in this process before may have set LD_PRELOAD, which the sanitizer's runtime must precede.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run([driver, "60"], check=False, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "no finding" in run.stdout


@X86
@pytest.mark.slow
def test_newer_code_never_replaces_older(tmp_path):
    """A weak symbol outside the tier's own namespace could be linked into what an older processor runs."""
    target = tmp_path / "tier.o"
    source = SOURCES / "tier_avx512.cpp"
    flags = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-w"]
    subprocess.run(["g++", *flags, *AVX512, "-c", source, "-o", target], check=True)
    names = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [name for name in names if any(f" {kind} " in name for kind in "WVu")]
    foreign = [name for name in weak if "jettison::avx512::" not in name]
    assert not foreign, foreign[:5]
    assert any("jettison::avx512::" in name for name in names)
