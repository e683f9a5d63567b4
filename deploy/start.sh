#!/bin/sh
# Build the demo model if no model is named (cached), then become the supervisor: sh deploy/start.sh [PYTHON]
set -eu

python=${1:-python3}
if [ -z "${QLOOP_MODEL:-}${QLOOP_CONFIG:-}" ] && ! grep -Eqs '^(export )?[[:space:]]*QLOOP_MODEL=.' .env; then
    "$python" -m trainer demo
fi
exec "$python" -m server
