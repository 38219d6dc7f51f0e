#!/usr/bin/env bash
# megatron-core's dynamic loss scale is documented to fall after `hysteresis` overflows in a row (2 by default). They need not
# be in a row: good steps do not restore the hysteresis, only growth of the scale does, after 1000 good steps without a break
# (loss_scale_window). An overflow 900 steps after the first halves the scale, the next one, 900 steps on, halves it at once,
# and the first after the scale has grown leaves it alone. Whoever builds "consecutive" from the text gets another
# scale from the second overflow on.
#
# The class puts its tensors on "cuda"; the script puts them on the CPU and changes nothing else.
# Seen with megatron-core 0.16.1, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes,
# most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy megatron-core==0.16.1

cat > scale.py <<'PY'
import math

from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


config = OptimizerConfig()
overflows = (100, 1000, 1900, 3500)
with OnCPU():
    scaler = DynamicGradScaler(config.initial_loss_scale, config.min_loss_scale, growth_factor=2.0, backoff_factor=0.5,
                               growth_interval=config.loss_scale_window, hysteresis=config.hysteresis)
    for step in range(1, 4001):
        before = scaler.scale.item()
        scaler.update(step in overflows)
        if step in overflows or scaler.scale.item() != before:
            print("step", step, "overflow," if step in overflows else "good,", "scale 2 **",
                  int(math.log2(before)), "->", int(math.log2(scaler.scale.item())))
PY

venv/bin/python scale.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
step 100 overflow, scale 2 ** 32 -> 32
step 1000 overflow, scale 2 ** 32 -> 31
step 1900 overflow, scale 2 ** 31 -> 30
step 2900 good, scale 2 ** 30 -> 31
step 3500 overflow, scale 2 ** 31 -> 31
SEEN
