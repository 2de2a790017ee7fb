#!/usr/bin/env bash
# bash scripts/test.sh [arguments of pytest]
#
# Create or reuse the virtual environment, then run ruff and pytest. See env.sh for PYTHON and VENV.
#     bash scripts/test.sh -k plot_log      some tests
#     bash scripts/test.sh -m soak          the long ones
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# ruff's rules change between versions.
prepare_environment 'pytest>=8.2' 'ruff>=0.17,<0.18' onnx onnxruntime onnxscript tensorboard wandb pycocotools pyarrow

# Tests with two ranks start two processes, which share two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$root"
"$python" -m ruff check .
exec "$python" -m pytest "$@"
