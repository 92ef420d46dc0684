#!/usr/bin/env bash
# Sets up .venv (the quickstart's) and runs the tests; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source train_scripts/setup_env.sh dev,deepspeed
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
