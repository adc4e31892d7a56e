#!/usr/bin/env bash
# The main job on real input, from nothing: set up, fetch a small real teacher, cache it with vLLM, train a student from
# the cache, evaluate both. Safe to run again: what is finished is not done twice.
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
echo "== everything took $((SECONDS - started)) s" >&2
