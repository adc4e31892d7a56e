#!/usr/bin/env bash
# Set up the environment and run the tests. Arguments go to pytest: bash scripts/test.sh -m 'not engine' runs the fast
# tests only. They run in two processes, file by file; DPKD_TEST_PROCESSES=0 runs them in one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

setup_environment report,dev
fetch_teacher models/smollm2-135m-instruct
fetch_browser
exec python -m pytest --numprocesses "${DPKD_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
