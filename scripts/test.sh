#!/usr/bin/env bash
# bash scripts/test.sh [arguments of pytest]
#
# Makes or reuses the virtual environment, then runs ruff and pytest; see env.sh for PYTHON and VENV.
#     bash scripts/test.sh -k plot_log      some tests
#     bash scripts/test.sh -m soak          the long ones
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

prepare_environment
install_requirements
install test-tools 'pytest>=8.2' 'ruff>=0.17,<0.18' onnx onnxruntime onnxscript  # ruff's rules change often
release_lock

# two-rank tests start two processes: with a thread each, they do not fight over two cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$root"
"$python" -m ruff check .
exec "$python" -m pytest "$@"
