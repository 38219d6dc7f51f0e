#!/usr/bin/env bash
# torch.distributed.checkpoint, writing Hugging Face safetensors from all ranks and consolidating them, puts every 0-dim
# floating tensor into the consolidated file as 0.0. The shard beside it is right, and so is a tensor of shape [1]. A step
# counter, a running loss or a temperature that is kept as a scalar is lost without a word, in the very file that is meant
# for others.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy safetensors==0.8.0 packaging

cat > save.py <<'PY'
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

state = {"matrix": torch.arange(4.0).view(2, 2), "one": torch.tensor([7.0]), "step": torch.tensor(1000.0)}
writer = HuggingFaceStorageWriter("out", fqn_to_index_mapping=dict.fromkeys(state, 1), save_distributed=True,
                                  enable_consolidation=True)
dcp.save(state, storage_writer=writer, no_dist=True)
for file in ("sharded/shard-00001-model-00001-of-00001", "model-00001-of-00001"):
    tensors = load_file(f"out/{file}.safetensors")
    print(file, {name: tensors[name].tolist() for name in sorted(tensors)})
PY

venv/bin/python save.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
sharded/shard-00001-model-00001-of-00001 {'matrix': [[0.0, 1.0], [2.0, 3.0]], 'one': [7.0], 'step': 1000.0}
model-00001-of-00001 {'matrix': [[0.0, 1.0], [2.0, 3.0]], 'one': [7.0], 'step': 0.0}
SEEN
