#!/usr/bin/env bash
# All that needs a GPU, in one command of at most ten minutes: bench/gpu/suite.sh --out FOLDER
# Needs Python 3.12, jax with CUDA, torch; no network. Packages that such a machine lacks are brought
# in bench/gpu/.wheels, which `make gpu-wheels` fills beforehand. --help says what can be chosen.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
wheels=${WHEELS:-bench/gpu/.wheels}
site=$PWD/.cache/gpu-suite/site
if [ -d "$wheels" ]; then
  "$python" -m bench.gpu.wheels install --folder "$wheels" --site "$site"
  export JAXSERVE_COMMIT=${JAXSERVE_COMMIT:-$(cat "$wheels/commit")}
fi
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m bench.gpu.suite "$@"
