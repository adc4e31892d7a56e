#!/usr/bin/env bash
# mypy over the package as it is imported: the folders at the root are dpkd.teacher_cache, dpkd.distill and so on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/dpkd"
for room in core teacher_cache distill evaluate pipelines; do ln -s "$PWD/$room" "$tree/dpkd/$room"; done
MYPYPATH="$tree" mypy --namespace-packages --explicit-package-bases -p dpkd
