#!/usr/bin/env bash
# safetensors 0.8.0 opens a file with E4M3 weights for NumPy and lists shape and dtype of each; get_tensor of one then
# raises AttributeError, even where ml_dtypes is installed and gives NumPy that dtype: it looks for numpy.float8_e4m3fn.
# Whoever reads FP8 checkpoints without torch has to read the header's offsets and the bytes.
#
# Seen on 2026-12-01 with Python 3.11.7 on Linux x86_64:
#   F8_E4M3 [2]
#   AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'
#
# Ends with 0 while this holds, else with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q "safetensors==0.8.0" numpy ml_dtypes
"$folder/venv/bin/python" - "$folder/model.safetensors" <<'PROGRAM'
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401
from safetensors import safe_open

header = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
Path(sys.argv[1]).write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
with safe_open(sys.argv[1], framework="numpy") as file:
    print(file.get_slice("w").get_dtype(), file.get_slice("w").get_shape())
    try:
        file.get_tensor("w")
    except AttributeError as error:
        print(f"AttributeError: {error}")
    else:
        sys.exit("it was read: the finding no longer holds")
PROGRAM
