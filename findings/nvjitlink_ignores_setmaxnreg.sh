#!/usr/bin/env bash
# nvJitLink compiles every PTX input as one of several compilation units (ptxas --compile-only), even when it is the
# only one, has no calls and becomes a whole cubin. setmaxnreg is then ignored: no error and no warning unless
# "-verbose" is asked for. Kernels that hand registers from a producer's warps to consumers' spill, and their WGMMAs run
# one by one; ptxas of the same release compiles the same text as it is written. .maxnreg and .reqntid change nothing.
# JAX 0.12 assembles Mosaic GPU kernels so wherever it finds libnvJitLink, and no XLA flag is asked; 0.11 runs ptxas.
#
# Seen on 2026-12-01 with nvidia-nvjitlink and nvidia-cuda-nvcc 13.0.88 (and 13.5.37), Linux x86_64, no GPU:
#   ptxas: Used 232 registers
#   nvJitLink: 'setmaxnreg' ignored to maintain compatibility across compilation units
#   nvJitLink: Used 8 registers
#
# Ends with 0 while this holds, else with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q "nvidia-nvjitlink==13.0.88" "nvidia-cuda-nvcc==13.0.88"
cat > "$folder/kernel.ptx" <<'PTX'
.version 8.0
.target sm_90a
.address_size 64

.visible .entry kernel(.param .u64 out)
.maxntid 256, 1, 1
.minnctapersm 1
{
    .reg .pred %consumes;
    .reg .b32 %thread;
    .reg .b64 %address;
    ld.param.u64 %address, [out];
    cvta.to.global.u64 %address, %address;
    mov.u32 %thread, %tid.x;
    setp.ge.u32 %consumes, %thread, 128;
    @%consumes bra consumer;
    setmaxnreg.dec.sync.aligned.u32 40;
    ret;
consumer:
    setmaxnreg.inc.sync.aligned.u32 232;
    st.global.u32 [%address], %thread;
    ret;
}
PTX
"$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import ctypes
import re
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])
nvidia = next(folder.glob("venv/lib/python*/site-packages/nvidia/cu13"))
ptxas, text = nvidia / "bin/ptxas", folder / "kernel.ptx"
ptxas.chmod(0o755)
run = [ptxas, "-arch=sm_90a", "-v", text, "-o", folder / "kernel.cubin"]
alone = subprocess.run(run, capture_output=True, text=True, check=True)

library = ctypes.CDLL(str(nvidia / "lib/libnvJitLink.so.13"))


def call(name, *arguments):
    # The library has its functions under the names of the release that they came with.
    function = getattr(library, f"nvJitLink{name}", None) or getattr(library, f"__nvJitLink{name}_13_0")
    if status := function(*arguments):
        sys.exit(f"nvJitLink{name} returned {status}")


handle, size = ctypes.c_void_p(), ctypes.c_size_t()
options = (ctypes.c_char_p * 2)(b"-arch=sm_90a", b"-verbose")
program = text.read_bytes() + b"\0"
call("Create", ctypes.byref(handle), 2, options)
call("AddData", handle, 2, program, ctypes.c_size_t(len(program)), b"kernel")
call("Complete", handle)
call("GetInfoLogSize", handle, ctypes.byref(size))
log = ctypes.create_string_buffer(size.value + 1)
call("GetInfoLog", handle, log)
linked = log.value.decode()

registers = {}
for who, said in (("ptxas", alone.stdout + alone.stderr), ("nvJitLink", linked)):
    for line in re.findall(r"'setmaxnreg' ignored[^.\n]*", said):
        print(f"{who}: {line}")
    registers[who] = int(re.search(r"Used (\d+) registers", said)[1])
    print(f"{who}: Used {registers[who]} registers")
if registers["ptxas"] != 232 or registers["nvJitLink"] == 232:
    sys.exit("both honour setmaxnreg, or neither does: the finding no longer holds")
PROGRAM
