#!/bin/sh
# Runs a command in a checkout on the volume /work. If there is no checkout yet, it makes one from the image's code,
# under a temporary name, and renames it once complete. To use your own clone, mount it at /work/autoresearch.
set -eu

code=$(dirname "$(dirname "$(readlink -f "$0")")")
tree=${AUTORESEARCH_TREE:-/work/autoresearch}

if [ ! -e "$tree" ]; then
    new=$tree.new.$(hostname).$$
    mkdir -p "$(dirname "$tree")"
    cp -R "$code" "$new"
    git -C "$new" init -q -b main
    git -C "$new" add -A
    git -C "$new" -c user.name=autoresearch -c user.email=autoresearch@localhost commit -q -m "the code of the image"
    mv -T "$new" "$tree" 2> /dev/null || rm -rf "$new" # another container was faster
fi
mkdir -p "$HOME" "${AUTORESEARCH_CACHE:-/data}" 2> /dev/null || true # the data may be mounted read-only
cd "$tree"
exec "$@"
