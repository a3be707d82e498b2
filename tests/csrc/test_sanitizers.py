"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, every tier, random shapes (T-12)."""

import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cpu"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off",
         "-fno-math-errno", "-w", f"-I{SOURCES}"]  # fmt: skip
UNITS = {
    SOURCES / "dispatch.cpp": [],
    SOURCES / "tier_portable.cpp": [],
    SOURCES / "tier_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    SOURCES / "tier_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
    HERE / "sanitize" / "driver.cpp": [],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the driver names the x86 tiers")
def test_t12_no_sanitizer_finding(tmp_path):
    def build(source):
        target = tmp_path / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *UNITS[source], "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, UNITS))
    driver = str(tmp_path / "driver")
    subprocess.run(["g++", "-fsanitize=address,undefined", *objects, "-o", driver], check=True)
    run = subprocess.run([driver, "60"], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "no finding" in run.stdout
