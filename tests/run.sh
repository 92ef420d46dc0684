#!/usr/bin/env bash
# Sets up .venv (the quickstart's) and runs the tests; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source train_scripts/setup_env.sh dev,deepspeed
if [ $# -eq 0 ]; then
  # DeepSpeed compiles its Adam for the host once, which takes a minute; of the whole suite a late test needs it.
  nice python -c 'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()' >/dev/null 2>&1 &
fi
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
