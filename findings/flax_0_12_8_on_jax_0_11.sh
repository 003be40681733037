#!/usr/bin/env bash
# flax 0.12.8 asks for "jax>=0.10.0", which JAX 0.11.2 is; `pip check` finds nothing wrong, and `from flax import nnx`
# raises AttributeError: flax takes a class from jax.experimental.hijax that JAX 0.11 had renamed. flax 0.12.12
# imports beside the same JAX. Which release of flax works with a JAX is in no metadata: pin both.
#
# Seen on 2026-12-01 with Python 3.12.1 on Linux x86_64:
#   No broken requirements found.
#   AttributeError: module 'jax.experimental.hijax' has no attribute 'HiPrimitive'
#   flax 0.12.12 on JAX 0.11.2: imported
#
# Ends with 0 while this holds, else with 1. PYTHON names a Python of 3.12 or newer (JAX 0.11 needs one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" --disable-pip-version-check "$@"; }
import_nnx='import jax, flax; from flax import nnx; print("flax", flax.__version__, "on JAX", jax.__version__ + ": imported")'

pip install -q "jax==0.11.2" "jaxlib==0.11.2" "flax==0.12.8"
pip check
if "$folder/venv/bin/python" -c "$import_nnx" 2>"$folder/error"; then
    echo "flax 0.12.8 imports beside JAX 0.11.2: the finding no longer holds"
    exit 1
fi
tail -n 1 "$folder/error"
grep -q "AttributeError: module 'jax.experimental.hijax' has no attribute 'HiPrimitive'" "$folder/error"

pip install -q --no-deps "flax==0.12.12"
"$folder/venv/bin/python" -c "$import_nnx"
