#!/usr/bin/env bash
# Installs Debian packages that are not there yet, and says which.
# Usage: hack/install-packages.sh PACKAGE...
set -euo pipefail

missing=()
for package in "$@"; do
	if [[ $(dpkg-query -W -f='${Status}' "$package" 2>/dev/null) != "install ok installed" ]]; then
		missing+=("$package")
	fi
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "needed and not installed: ${missing[*]} (this is no Debian; install their equivalents)" >&2
	exit 1
fi
if [[ $(id -u) -ne 0 ]]; then
	echo "needed and not installed: ${missing[*]}; as root: apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "installing Debian packages: ${missing[*]}" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A package list that is there saves the update; one that is stale does not
# install, so then it is fetched anew.
if ! DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
	if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
		tail -n 20 "$log" >&2
		exit 1
	fi
fi
