#!/usr/bin/env bash
# transformers 5.24.0 builds a tokenizer of a GGUF file's metadata, where `tokenizer.ggml.pre` names the way in which
# text is cut into words before BPE. It knows some twenty of these names; with any other it cuts as GPT-2 does, and says
# nothing. SmolLM2's files say "smollm", whose digits are words of their own: numbers get other tokens than the model was
# trained on. On four long texts the numbers of tokens differ by 0.03% to 0.16% only, so that nothing looks wrong.
#
# Seen on 2026-12-01 with Python 3.11 on Linux x86_64:
#   pre 'smollm': ['11']    (the model's own tokenizer: ['1', '1'])
#   pre 'no such name': ['11']
#   pre 'qwen2': ['1', '1']
#   warnings: 0
#
# Ends with 0 while this holds, else with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q "transformers==5.24.0"
"$folder/venv/bin/python" - <<'PROGRAM'
import logging
import sys

from transformers.integrations.gguf import convert_gguf_tokenizer

records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("transformers").addHandler(handler)


def tokens(pre):
    said = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, "tokens": ["1", "11"], "merges": ["1 1"]}
    return convert_gguf_tokenizer("llama", said)[0].encode("11").tokens


found = {pre: tokens(pre) for pre in ("smollm", "no such name", "qwen2")}
for pre, cut in found.items():
    print(f"pre {pre!r}: {cut}")
print("warnings:", len(records))
silent = found["smollm"] == found["no such name"] == ["11"] and found["qwen2"] == ["1", "1"] and not records
sys.exit(0 if silent else 1)
PROGRAM
