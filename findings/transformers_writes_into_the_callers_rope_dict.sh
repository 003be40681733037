#!/usr/bin/env bash
# transformers 5.24.0 keeps the dict that is given to it as `rope_scaling`, and writes into it: making a Phi3Config adds
# the config's own theta and partial rotary factor to the caller's dict. A second config made from the same dict with
# another `partial_rotary_factor` has the first one's, for what the dict says comes first; here it refuses factors
# that are right for the one it was asked for. Give each config a copy.
#
# Seen on 2026-12-01 with Python 3.11 on Linux x86_64:
#   given ['long_factor', 'short_factor', 'type'] after ['long_factor', 'original_max_position_embeddings',
#       'partial_rotary_factor', 'rope_theta', 'rope_type', 'short_factor', 'type']
#   a second config that asks for 1.0 fails: ... `rope_parameters`'s short_factor field must have length 3, got 6
#
# Ends with 0 while this holds, else with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q "transformers==5.24.0"
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from transformers import Phi3Config

sizes = {"hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
rope = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
before = sorted(rope)
Phi3Config(rope_scaling=rope, partial_rotary_factor=0.5, original_max_position_embeddings=32, **sizes)
print("given", before, "after", sorted(rope))
rope["short_factor"], rope["long_factor"] = [1.0] * 6, [2.0] * 6
try:
    second = Phi3Config(rope_scaling=rope, partial_rotary_factor=1.0, original_max_position_embeddings=32, **sizes)
    print("a second config that asks for 1.0 has", second.rope_parameters["partial_rotary_factor"])
except Exception as error:
    print("a second config that asks for 1.0 fails:", type(error).__name__, error)
sys.exit(0 if sorted(rope) != before and rope.get("partial_rotary_factor") == 0.5 else 1)
PROGRAM
