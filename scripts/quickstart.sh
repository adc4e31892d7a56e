#!/usr/bin/env bash
# A complete distillation: set up the environment, fetch a small real teacher, cache it with vLLM, train a student from
# the cache and evaluate both. You can run it again: it skips finished work.
#
#   bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

started=$SECONDS
setup_environment report
echo "== environment ready after $((SECONDS - started)) s" >&2
fetch_teacher models/smollm2-135m-instruct
dpkd run quickstart --set teacher=models/smollm2-135m-instruct
echo "== finished after $((SECONDS - started)) s" >&2
