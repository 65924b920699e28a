#!/bin/sh
# Makes a Python environment that serves SGLang on a CPU without a container, from the same
# list of packages as the image. Does nothing where it is already there.
#
#   docker/embedded.sh [SGLANG_VERSION]    prints the environment's python as its last line
#
# PYTHON   the Python to make it with: the version in versions.env (default python3)
# SGLANG_HARNESS_CACHE   where it is kept
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/versions.env"
version=${1:-$SGLANG_VERSION}
python=${PYTHON:-python3}
cache=${SGLANG_HARNESS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sglang-harness}
started=$(date +%s)
say() { printf 'embedded: [%4ds] %s\n' "$(($(date +%s) - started))" "$*"; }

have=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$have" != "$PYTHON_VERSION" ]; then
    echo "embedded: $python is Python $have, and the packages of the CPU stack are pinned for $PYTHON_VERSION. Set PYTHON to such a one, or 'python' in the spec to one that has SGLang." >&2
    exit 3
fi
# Every file of the stand-ins with its name, in an order that no locale changes.
stand_ins() { find stand_ins -name '*.py' -o -name '*.pth' -o -name '*.toml' | LC_ALL=C sort | while read -r file; do echo "$file" && cat "$file"; done; }
recipe=$(cd "$here" && { cat requirements-cpu.txt && stand_ins; } | sha256sum | cut -c1-12)
environment=$cache/embedded-$version-$recipe
if [ -e "$environment/complete" ]; then
    echo "$environment/bin/python"
    exit 0
fi
install() { "$environment/bin/pip" install -qq --disable-pip-version-check --no-deps "$@"; }

rm -rf "$environment"
mkdir -p "$cache"
say "making a Python environment with SGLang $version (minutes the first time)"
"$python" -m venv "$environment"
install --requirement "$here/requirements-cpu.txt"
install "$here/stand_ins" "sglang==$version"
say "made $environment"
: >"$environment/complete"
echo "$environment/bin/python"
