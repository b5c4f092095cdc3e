#!/usr/bin/env bash
# Builds deploy/Dockerfile with buildah: for a machine without a Docker engine, or one that reaches no registry.
#
#   deploy/build.sh                             the training image, localhost/autoresearch
#   deploy/build.sh --target dashboard          localhost/autoresearch-dashboard
#   deploy/build.sh --debootstrap               on a Debian 12 built from packages (needs root, debootstrap), not pulled
#   deploy/build.sh --uv-cache ~/.cache/uv      reads and writes packages in the host's uv cache: no second download
#   deploy/build.sh --root DIR                  stores images below DIR instead of buildah's own storage
#
# Other options go to `buildah bud`, such as --build-arg UV_COMPILE_BYTECODE=0. If SSL_CERT_FILE is set (a proxy with
# certificates of its own), the build uses that file too.
set -euo pipefail
cd "$(dirname "$0")/.."

target=train base='' mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian} root=''
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --target) target=${2:?--target needs a name} && shift 2 ;;
        --debootstrap) base=localhost/autoresearch-base && shift ;;
        --uv-cache)
            cache=$(realpath "${2:?--uv-cache needs a folder}")
            options+=(--volume "$cache:/host-uv-cache" --build-arg UV_CACHE_DIR=/host-uv-cache)
            shift 2
            ;;
        --root) mkdir -p "${2:?--root needs a folder}" && root=$(realpath "$2") && shift 2 ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit ;;
        *) options+=("$1") && shift ;;
    esac
done

if [ -n "${SSL_CERT_FILE:-}" ]; then
    options+=(--volume "$(realpath "$SSL_CERT_FILE"):/host-certificates:ro" --build-arg SSL_CERT_FILE=/host-certificates)
fi

buildah=(buildah)
[ -z "$root" ] || buildah+=(--root "$root/images" --runroot "$root/run")
name=localhost/autoresearch
[ "$target" = train ] || name+=-$target

# The base is made once, even if the script runs again or for another target.
if [ -n "$base" ] && ! "${buildah[@]}" inspect --type image "$base" > /dev/null 2>&1; then
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
    debootstrap --variant=minbase bookworm "$made" "$mirror" > /dev/null
    rm -rf "$made"/var/cache/apt/archives/*.deb "$made"/var/lib/apt/lists/*
    container=$("${buildah[@]}" from scratch)
    "${buildah[@]}" copy --quiet "$container" "$made" / > /dev/null
    "${buildah[@]}" commit --quiet --rm "$container" "$base" > /dev/null
fi
[ -z "$base" ] || options+=(--build-arg "BASE=$base")

# docker is the format that supports HEALTHCHECK. chroot isolation needs neither user namespaces nor a container runtime.
"${buildah[@]}" bud --format docker --isolation chroot --network host --layers=false \
    --ignorefile deploy/Dockerfile.dockerignore --file deploy/Dockerfile --target "$target" --tag "$name" \
    "${options[@]}" .
echo "built $name"
