#!/usr/bin/env bash
# Lint, types and tests. Makes .venv when no suitable environment is active.
#
#   bash run/tests.sh                  everything, as the continuous integration runs it
#   bash run/tests.sh -m 'not slow'    further words go to pytest; `python -m pytest --help` lists them
set -euo pipefail
cd "$(dirname "$0")/.."
. run/environment.sh

case ${1:-} in
    -h | --help)
        print_header run/tests.sh
        exit
        ;;
esac

ensure_environment dev av pytest xdist mypy ruff timm elpv_dataset yaml submitit playwright onnxruntime onnxscript openvino fastapi uvicorn paho python_multipart prometheus_client

say "ruff: lint and format"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
say "mypy --strict dinov2"
"$PYTHON" -m mypy
say "pytest"
# The tests make small tensors: more threads would only wait for one another.
# A file's tests stay in one process: they share runs and services.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$PYTHON" -m pytest -n auto --dist loadfile "$@"
