#!/bin/sh
# Makes the base image from Debian packages, for machines that reach no image registry.
# Does nothing where the image is already there.
#
#   docker/base.sh [TAG]     default tag: sglang-harness/base:DEBIAN_SUITE
#
# Debian's mirror and proxy settings of this machine are honoured (apt's own, http_proxy).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/versions.env"
tag=${1:-sglang-harness/base:$DEBIAN_SUITE}

if docker image inspect "$tag" >/dev/null 2>&1; then
    exit 0
fi
if ! command -v mmdebstrap >/dev/null 2>&1; then
    if [ "${SGLANG_HARNESS_INSTALL:-}" = never ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "base: $BASE_IMAGE cannot be pulled, and mmdebstrap, which makes a base image from Debian packages, is not installed. Install mmdebstrap, or set BASE_IMAGE to an image with Python $PYTHON_VERSION that this engine has." >&2
        exit 3
    fi
    echo "base: installing Debian's package mmdebstrap with apt-get (SGLANG_HARNESS_INSTALL=never forbids this)"
    apt-get update -qq >/dev/null 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap >/dev/null
fi
echo "base: making $tag from Debian packages (about a minute)"
# importing from a pipe would hide a failure of mmdebstrap behind docker's success
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' \
    "$DEBIAN_SUITE" "$work/rootfs.tar"
docker import --change 'CMD ["python3"]' "$work/rootfs.tar" "$tag" >/dev/null
