#!/usr/bin/env bash
# torch 2.13.0 on a CPU: a bf16 linear layer keeps megabytes for every number of rows that it has met.
#
# Expected: encoding batches of natural length (as many tokens as the texts have, no padding) in bf16 on a CPU takes the
# memory of the largest batch, as it does in float32; if something is cached, LRU_CACHE_CAPACITY bounds it, as is advised.
# Seen: bf16 products are oneDNN's, which makes machine code for each number of rows and keeps up to 1,024 pieces. They
# lie between the buffers that come and go, so freed memory is not given back either. LRU_CACHE_CAPACITY changes
# nothing; ONEDNN_PRIMITIVE_CACHE_CAPACITY, read once when torch is loaded, does. Batches that are rounded up need neither.
#
#   float32, 400 numbers of rows: 48 MB
#   bf16, 400 numbers of rows: 1881 MB
#   bf16, 400 numbers of rows, LRU_CACHE_CAPACITY=1: 1868 MB
#   bf16, 400 numbers of rows, ONEDNN_PRIMITIVE_CACHE_CAPACITY=1: 453 MB
#   bf16, the same numbers rounded up to multiples of 64: 46 MB
#   (AMD EPYC 9005, AVX-512; one layer of 384 x 1536)
#
# For this project: packed batches have any number of tokens, so on a CPU that number is rounded up (ultrarag/products.py).
# Needs an x86 CPU with AVX-512, where oneDNN makes such code; says so elsewhere and ends with 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > grown.py <<'PYTHON'
import sys

import torch

torch.set_num_threads(1)
if torch.backends.cpu.get_cpu_capability() != "AVX512":
    print("-1")
    sys.exit()


def megabytes():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


dtype, step = getattr(torch, sys.argv[1]), int(sys.argv[2])
layer = torch.nn.Linear(384, 1536, dtype=dtype)
with torch.inference_mode():
    layer(torch.zeros(2048, 384, dtype=dtype))
    before = megabytes()
    for rows in range(1400, 1800):
        layer(torch.zeros(-(-rows // step) * step, 384, dtype=dtype))
print(round(megabytes() - before))
PYTHON
run() { venv/bin/python grown.py "$@"; }
plain=$(run float32 1)
if [ "$plain" = -1 ]; then echo "this CPU has no AVX-512: nothing is said of it"; exit 2; fi
half=$(run bfloat16 1)
torchs=$(LRU_CACHE_CAPACITY=1 run bfloat16 1)
onednns=$(ONEDNN_PRIMITIVE_CACHE_CAPACITY=1 run bfloat16 1)
rounded=$(run bfloat16 64)
echo "float32, 400 numbers of rows: $plain MB"
echo "bf16, 400 numbers of rows: $half MB"
echo "bf16, 400 numbers of rows, LRU_CACHE_CAPACITY=1: $torchs MB"
echo "bf16, 400 numbers of rows, ONEDNN_PRIMITIVE_CACHE_CAPACITY=1: $onednns MB"
echo "bf16, the same numbers rounded up to multiples of 64: $rounded MB"
if [ "$half" -gt $((5 * plain)) ] && [ "$torchs" -gt $((5 * plain)) ] && [ "$onednns" -lt "$((half / 2))" ]; then
  echo "as described"
else
  echo "changed: memory no longer grows so with the number of batch sizes"
  exit 1
fi
