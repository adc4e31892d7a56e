#!/usr/bin/env bash
# Run mypy on the packages under the names they are imported by: the folder core is dpkd.core, and so on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/dpkd"
for package in core teacher_cache distill evaluate pipelines; do ln -s "$PWD/$package" "$tree/dpkd/$package"; done
MYPYPATH="$tree" mypy --namespace-packages --explicit-package-bases -p dpkd
