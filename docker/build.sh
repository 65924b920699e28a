#!/bin/sh
# Builds the CPU image: real SGLang that serves without a GPU and without AVX-512.
# Does nothing where an image of these same files is already there.
#
#   docker/build.sh [SGLANG_VERSION]      prints the tag as its last line
#
# PYTHON       the Python whose pip fetches the wheels (default python3); its index, CA
#              bundle, proxies and find-links are honoured and never enter the image
# BASE_IMAGE   an image with the Python of versions.env; pulled, or made by base.sh
# SGLANG_HARNESS_CACHE   where wheels are kept between builds
set -eu
here=$(cd "$(dirname "$0")" && pwd)
base_image=${BASE_IMAGE:-}
. "$here/versions.env"
[ -z "$base_image" ] || BASE_IMAGE=$base_image
version=${1:-$SGLANG_VERSION}
python=${PYTHON:-python3}
cache=${SGLANG_HARNESS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sglang-harness}
started=$(date +%s)
say() { printf 'image: [%4ds] %s\n' "$(($(date +%s) - started))" "$*"; }

# Every file of the stand-ins with its name, in an order that no locale changes.
stand_ins() { find stand_ins -name '*.py' -o -name '*.pth' -o -name '*.toml' | LC_ALL=C sort | while read -r file; do echo "$file" && cat "$file"; done; }

# The tag carries what the image is made of, so that a changed file is a new image.
recipe=$(cd "$here" && { echo "$BASE_IMAGE $PYTHON_VERSION $DEBIAN_SUITE" && cat cpu.Dockerfile requirements-cpu.txt &&
    stand_ins; } | sha256sum | cut -c1-12)
tag=sglang-harness/sglang-cpu:$version-$recipe
if docker image inspect "$tag" >/dev/null 2>&1; then
    docker tag "$tag" "sglang-harness/sglang-cpu:$version"
    echo "$tag"
    exit 0
fi

wheels=$cache/wheels-$({ echo "$PYTHON_VERSION" && cat "$here/requirements-cpu.txt"; } | sha256sum | cut -c1-12)
context=$(mktemp -d "${TMPDIR:-/tmp}/sglang-harness-build.XXXXXX")
trap 'rm -rf "$context"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fetch() { # fetch DIR REQUIREMENT...: wheels for the image's Python, whatever this one is
    directory=$1
    shift
    "$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "$PYTHON_VERSION" --implementation cp --abi "cp$(echo "$PYTHON_VERSION" | tr -d .)" --abi abi3 --abi none \
        --platform manylinux_2_36_x86_64 --platform manylinux_2_35_x86_64 --platform manylinux_2_34_x86_64 \
        --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_26_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 --platform manylinux_2_5_x86_64 \
        --platform manylinux1_x86_64 --platform linux_x86_64 --platform any \
        --dest "$directory" "$@"
}

if [ ! -e "$wheels/complete" ]; then
    say "fetching the wheels of $(grep -c '==' "$here/requirements-cpu.txt") packages"
    rm -rf "$wheels"
    mkdir -p "$wheels"
    fetch "$wheels" --requirement "$here/requirements-cpu.txt"
    : >"$wheels/complete"
fi
say "fetching sglang $version"
fetch "$context/sglang" "sglang==$version"
cp "$here/cpu.Dockerfile" "$here/requirements-cpu.txt" "$context/"
cp -l -r "$wheels" "$context/wheels" 2>/dev/null || cp -r "$wheels" "$context/wheels"
"$python" -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir "$context/wheels" "$here/stand_ins"

# A registry that refuses does so at once; one that hangs must not hold the build up.
if ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
    say "pulling $BASE_IMAGE"
    if ! timeout 300 docker pull --quiet "$BASE_IMAGE" >/dev/null 2>&1; then
        say "$BASE_IMAGE cannot be pulled here; using a base made from Debian packages"
        BASE_IMAGE=sglang-harness/base:$DEBIAN_SUITE
        "$here/base.sh" "$BASE_IMAGE"
    fi
fi

say "building $tag (minutes the first time; another version takes seconds)"
# The plain builder of every engine: the Dockerfile needs no more, and nothing is fetched.
DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0} docker build --network=none --file "$context/cpu.Dockerfile" \
    --build-arg "BASE_IMAGE=$BASE_IMAGE" --label "org.sglang-harness.sglang-version=$version" \
    --tag "$tag" "$context" >"$cache/build.log" 2>&1 || {
    tail -n 20 "$cache/build.log" >&2
    echo "image: the build failed (whole log: $cache/build.log)" >&2
    exit 1
}
# The plain version names the newest build of it, for compose.yaml.
docker tag "$tag" "sglang-harness/sglang-cpu:$version"
say "built $tag"
echo "$tag"
