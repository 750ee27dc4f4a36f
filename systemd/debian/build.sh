#!/bin/bash
# Builds the Debian package of this tree: systemd/debian/build.sh DIRECTORY [VERSION]
#
# Problem: a box with GPUs has a Python of its own, often no way to an index of packages, and other
# people's libraries in every place that pip would install to. So the package brings a virtual
# environment that is complete and private, in the place where the units look for it.
#
# How: the environment is made for this system's own interpreter at its final path below a staging
# directory, filled from constraints.txt, and what names the staging directory is corrected. What is
# compiled fits one minor version of Python, so the package depends on that: 3.11 from Debian 12,
# 3.12 from Ubuntu 24.04, 3.13 from Debian 13; its version names the release, so that one repository
# holds the packages of all. Bytecode is compiled here, checked against nothing: at
# run time /opt is read-only. With SOURCE_DATE_EPOCH (by default the last commit's date) two builds
# are the same byte for byte.
#
# Prints the path of the package. Needs no root.
set -euo pipefail

SYSTEM_PYTHON=/usr/bin/python3
HOME_OF_PACKAGE=/opt/baton

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
tree="$(cd "$here/../.." && pwd)"
target="$(mkdir -p "$1" && cd "$1" && pwd)"

# Of which system this is, as versions of packages have it: deb12, ubuntu24.04.
release() {
  local ID="" VERSION_ID=""
  # shellcheck source=/dev/null
  . "$1"
  printf '%s%s' "${ID/#debian/deb}" "$VERSION_ID" | tr -cd 'a-z0-9.'
}

version="${2:-$(sed -n 's/^version = "\(.*\)"$/\1/p' "$tree/pyproject.toml")}~$(release /etc/os-release)"
SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git -C "$tree" log -1 --format=%ct 2>/dev/null || echo 0)}"
export SOURCE_DATE_EPOCH PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1

if ! command -v dpkg-deb >/dev/null; then
  echo "dpkg-deb is missing: build on Debian or Ubuntu, or run: sudo apt-get install dpkg" >&2
  exit 1
fi
minor="$("$SYSTEM_PYTHON" -c 'import sys, venv; print(sys.version_info[1])' 2>/dev/null || echo 0)"
if [ "$minor" -lt 11 ]; then
  echo "$SYSTEM_PYTHON is no Python of 3.11 or later: build on Debian 12, Ubuntu 24.04 or later" >&2
  exit 1
fi

stage="$(mktemp -d)"
trap 'rm -rf "$stage"' EXIT
root="$stage/root"
chmod 0755 "$stage"
umask 022

environment() {
  local venv="$root$HOME_OF_PACKAGE" pip="$tree/.venv/bin/python -m pip"
  local scripts packages
  "$SYSTEM_PYTHON" -m venv --without-pip "$venv"
  $pip --python "$venv/bin/python" install -qq --no-compile --disable-pip-version-check \
    --no-warn-script-location -c "$tree/constraints.txt" "$tree"
  packages="$venv/lib/python3.$minor/site-packages"
  # where it was built is nobody's business; the list of files would name scripts by old digests
  rm -f "$packages"/*.dist-info/{direct_url.json,RECORD,REQUESTED} "$venv"/bin/{activate*,Activate*}
  printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.%d\n' "$minor" \
    >"$venv/pyvenv.cfg"
  mapfile -t scripts < <(grep -rlI "$root" "$venv/bin")
  sed -i "s#$root##g" "${scripts[@]}"
  # -P: see the units
  sed -i "1s#^\(\#!.*/python[0-9.]*\)\$#\1 -P#" "${scripts[@]}"
  "$venv/bin/python" -m compileall -q -j 0 -s "$root" -p / --invalidation-mode unchecked-hash \
    "$venv/lib"
}

files() {
  local units="$root/usr/lib/systemd/system" documents="$root/usr/share/doc/gpu-baton"
  install -d "$root/usr/bin" "$units"
  for program in baton baton-agent baton-coordinator; do
    ln -s "$HOME_OF_PACKAGE/bin/$program" "$root/usr/bin/$program"
  done
  install -m 0644 "$tree"/systemd/*.service "$tree"/systemd/*.socket "$units"
  install -D -m 0644 "$tree/systemd/trainers-inside.conf" "$root/usr/share/baton/trainers-inside.conf"
  install -D -m 0644 "$tree/systemd/baton.lnav.json" "$root/usr/share/baton/baton.lnav.json"
  install -D -m 0644 "$tree/systemd/baton.rules" "$root/usr/lib/udev/rules.d/60-baton.rules"
  install -D -m 0644 "$tree/systemd/baton.sysusers.conf" "$root/usr/lib/sysusers.d/baton.conf"
  install -D -m 0644 "$tree/systemd/baton.tmpfiles.conf" "$root/usr/lib/tmpfiles.d/baton.conf"
  install -D -m 0644 -t "$root/etc/baton" "$tree"/systemd/{agent,coordinator}.toml
  install -D -m 0644 -t "$documents" "$tree"/docs/*.md "$tree/README.md" "$tree/CHANGELOG.md"
  install -m 0644 "$tree/LICENSE" "$documents/copyright"
}

package() {
  local size
  # of files alone: directories grow with what was in them while this ran
  size="$(find "$root" -type f -printf '%s\n' | awk '{ bytes += $1 } END { print int(bytes / 1024) }')"
  install -d "$root/DEBIAN"
  sed -e "s/@VERSION@/$version/" -e "s/@SIZE@/$size/" \
    -e "s/@PYTHON@/3.$minor/" -e "s/@PYTHON_NEXT@/3.$((minor + 1))/" \
    -e "s/@ARCHITECTURE@/$(dpkg --print-architecture)/" "$here/control" >"$root/DEBIAN/control"
  install -m 0644 -t "$root/DEBIAN" "$here/conffiles"
  install -m 0755 -t "$root/DEBIAN" "$here/postinst" "$here/prerm" "$here/postrm"
  dpkg-deb --root-owner-group -Zxz -z1 --build "$root" "$target" >&2
}

environment
files
package
echo "$target/gpu-baton_${version}_$(dpkg --print-architecture).deb"
