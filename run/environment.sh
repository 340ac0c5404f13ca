# Sourced by run/quickstart.sh and run/tests.sh: finds or makes a Python environment that holds what they need.
#
# ensure_environment EXTRA IMPORT...   sets $PYTHON to an interpreter that can import this checkout's dinov2 and every
#                                      IMPORT: that of the active environment if it can, else that of .venv, which is
#                                      made and filled once.
# print_header SCRIPT                  prints the comment at the top of a script, which is its help.

say() { printf '\n== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

print_header() { # SCRIPT
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"
}

can_run() { # PYTHON MODULE...: whether the interpreter finds this checkout's dinov2, and every module, without importing
    local python=$1
    shift
    # -P leaves the working folder out of the path, as it is when a script is run: there, dinov2 must be installed.
    "$python" -P - "$PWD" "$@" <<'PY' >/dev/null 2>&1
import importlib.util
import os
import sys

checkout, *modules = sys.argv[1:]
dinov2 = importlib.util.find_spec("dinov2")
sys.exit(
    sys.version_info < (3, 11)
    or dinov2 is None
    or not os.path.samefile(dinov2.origin, os.path.join(checkout, "dinov2", "__init__.py"))
    or any(importlib.util.find_spec(name) is None for name in modules)
)
PY
}

find_python() { # prints the first suitable interpreter
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
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && can_run python torch omegaconf "$@"; then
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
