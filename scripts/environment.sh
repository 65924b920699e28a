#!/bin/sh
# Makes .venv with everything that 'make qualify' and 'make test' need. Says what it does.
#
#   scripts/environment.sh qualify|test
#
# PYTHON    the Python to make it with (default python3, 3.10 or newer)
# pip's own settings (index, find-links, CA bundle, proxies) are honoured.
set -eu
cd "$(dirname "$0")/.."
purpose=${1:-qualify}
python=${PYTHON:-python3}
started=$(date +%s)
say() { printf 'setup: [%4ds] %s\n' "$(($(date +%s) - started))" "$*"; }
refuse() { printf 'setup: %s\n' "$*" >&2; exit 2; }

wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)-$purpose
for have in "$wanted" "${wanted%-*}-test"; do
    # What 'test' installs holds all that 'qualify' needs.
    [ "$(cat .venv/.complete 2>/dev/null)" != "$have" ] || exit 0
done

command -v "$python" >/dev/null 2>&1 || refuse "no $python here: install Python 3.10 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || refuse "$("$python" --version) is too old: Python 3.10 or newer is needed; set PYTHON to one"
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "${SGLANG_HARNESS_INSTALL:-}" != never ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing Debian's package python3-venv with apt-get (SGLANG_HARNESS_INSTALL=never forbids this)"
        apt-get update -qq >/dev/null 2>&1 || true
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    else
        refuse "$python cannot make virtual environments: install the package python3-venv"
    fi
fi

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
rm -f .venv/.complete
say "installing the harness with torch and what '$purpose' needs into .venv (minutes the first time)"
.venv/bin/python -m pip install -q --disable-pip-version-check --constraint constraints.txt pip
group=
[ "$purpose" != test ] || group="--group dev"
# shellcheck disable=SC2086 -- two words on purpose
.venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt $group --editable '.[torch,compose,kit]'
echo "$wanted" >.venv/.complete
say "done"
