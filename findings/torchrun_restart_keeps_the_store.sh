#!/usr/bin/env bash
# When torchrun restarts its workers, what they wrote into the default process group's store is still there in the next
# attempt, although the group was destroyed and made anew: a "rank 0 is done" flag of the attempt that failed greets the
# ranks of the one that follows. Keys need the attempt in their name (TORCHELASTIC_RESTART_COUNT).
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > worker.py <<'PY'
import os
import sys

import torch.distributed as dist

dist.init_process_group("gloo")
store = dist.distributed_c10d._get_default_store()
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"attempt {attempt}: the key is there: {store.check(['done'])}", flush=True)
store.set("done", attempt)
dist.destroy_process_group()
sys.exit(attempt == "0")
PY

venv/bin/torchrun --standalone --nproc-per-node 1 --max-restarts 1 worker.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
attempt 0: the key is there: False
attempt 1: the key is there: True
SEEN
