#!/bin/sh
# The browser tests drive a Chromium that is already there; on Debian and Ubuntu install one if none is.
set -eu

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done

as_root=
if [ "$(id -u)" -ne 0 ]; then as_root="sudo -n"; fi
if command -v apt-get >/dev/null 2>&1 && $as_root true 2>/dev/null; then
    $as_root apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends chromium
    exit 0
fi
echo "The browser tests need Chromium. Install it (Debian, Ubuntu: apt-get install chromium) and run this again." >&2
exit 1
