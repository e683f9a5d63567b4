#!/bin/sh
# Create or update a virtual environment with qloop in it (editable), from the repository's root:
#
#     sh deploy/install.sh PYTHON VENV EXTRA CONSTRAINTS
#
# Without an NVIDIA GPU it takes a CPU build of torch: the registry's Linux x86-64 wheel brings several GB of CUDA.
set -eu

python=$1 venv=$2 extra=$3 constraints=$4
torch_version=2.13.0 # as in pyproject.toml
cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "qloop needs Python 3.11 or newer; \"$python\" is $("$python" --version 2>&1 || true)."
    say "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or name it: make … PYTHON=/path/to/python3.11"
    exit 1
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if ! "$python" -m venv --clear "$venv"; then
        rm -rf "$venv"
        say "This Python cannot make virtual environments (Debian, Ubuntu: apt-get install python3-venv)."
        exit 1
    fi
fi
pip() { "$venv/bin/python" -m pip "$@"; }

# True where pip would find a CPU build by itself: a local wheel folder or a mirror that carries one.
cpu_wheel_offered() {
    pip index versions torch 2>/dev/null | grep -Fq "$torch_version+cpu"
}

cpu_index_answers() {
    "$venv/bin/python" - "$cpu_index/torch/" 2>/dev/null <<'PYTHON'
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=5).close()
PYTHON
}

install_cpu_torch() {
    if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then return 0; fi
    if pip show torch >/dev/null 2>&1 || cpu_wheel_offered; then return 0; fi
    if cpu_index_answers; then
        pip install --quiet --no-deps --index-url "$cpu_index" "torch==$torch_version"
    else
        say "warning: $cpu_index does not answer; the registry's torch may be the CUDA build (several GB)."
    fi
}

say "Installing qloop[$extra] into $venv; the first time this takes a few minutes."
install_cpu_torch
pip install --quiet --constraint "$constraints" --editable ".[$extra]"
