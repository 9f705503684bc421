#!/bin/sh
# Copies what an image without a distribution needs to a folder: this Python, an environment, the libraries they link to.
# usage: bare-root.sh FOLDER ENVIRONMENT
set -eu
root=$1
environment=$2
library=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
# The environment's python is a link to a link, maybe: each of them is needed.
link=$environment/bin/python
while [ -L "$link" ]; do
    target=$(readlink "$link")
    case $target in /*) link=$target ;; *) link=$(dirname "$link")/$target ;; esac
    links="${links-} $link"
done

mkdir -p "$root"
# shellcheck disable=SC2086 # a list
cp -a --parents $links "$library" "$environment" /etc/passwd /etc/group /etc/nsswitch.conf /etc/ld.so.conf /etc/ld.so.conf.d "$root"
# Not for running: pip and what brings it along, what builds extensions, the editor, the former converter.
for unneeded in site-packages ensurepip idlelib lib2to3 pydoc_data tkinter turtledemo test; do
    rm -rf "$root$library/$unneeded"
done
rm -rf "$root$library"/config-*

# libgcc_s is loaded when a thread is cancelled, so nothing links to it. What is no library, ldd says, and goes on.
{
    ldconfig -p | grep libgcc_s
    find "$root" -type f \( -name '*.so' -o -name '*.so.*' -o -path '*/bin/python*' \) -exec ldd {} +
} | grep -o '/[^ )]*' | grep -v "^$root" | sort -u | while read -r file; do
    # Those of the environment are there, and are found by their relative paths.
    if [ -f "$file" ] && [ ! -e "$root$file" ]; then cp -L --parents "$file" "$root"; fi
done
ldconfig -r "$root"
