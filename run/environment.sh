# Sourced by run/quickstart.sh and run/tests.sh: finds or makes a Python environment that holds what they need.
#
# ensure_environment EXTRA IMPORT...   sets $PYTHON to an interpreter that can import dinov2 and every IMPORT, in the
#                                      active environment if it can, else in .venv, which is made and filled once.

say() { printf '\n== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

imports_all() { # PYTHON MODULE...: whether the interpreter finds every module, without importing them
    local python=$1
    shift
    "$python" - "$@" <<'PY' >/dev/null 2>&1
import importlib.util
import sys

sys.exit(sys.version_info < (3, 11) or any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
PY
}

find_python() { # prints the newest suitable interpreter
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed; found $(python3 --version 2>&1 || echo none)"
}

ensure_environment() {
    local extra=$1
    shift
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && imports_all python dinov2 torch "$@"; then
        PYTHON=python
        say "using the active environment: $(command -v python)"
        return
    fi
    local stamp
    stamp=.venv/.installed-$extra-$(cksum <setup.py | cut -d' ' -f1)
    if [ ! -e "$stamp" ]; then
        say "making .venv and installing dinov2[$extra] into it (torch alone is a few GB; minutes on a fast line)"
        if [ ! -x .venv/bin/python ]; then
            local base
            base=$(find_python)
            "$base" -m venv .venv || die "$base cannot make environments; on Debian and Ubuntu: apt install python3-venv"
        fi
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]" \
            || die "the installation failed; the message above says why"
        touch "$stamp"
    fi
    PYTHON=$PWD/.venv/bin/python
    say "using $("$PYTHON" --version) in .venv"
}
