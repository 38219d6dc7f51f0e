"""Models of Hugging Face transformers, trained and run with the kernels of moe_ext.

    import moe_ext.transformers
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="moe_ext")
    model.set_experts_implementation("moe_ext")         # or of a model that is already there

The import registers "moe_ext" as experts implementation: what every architecture computes that transformers writes
with its `use_experts_implementation` is the same as under "eager", on CPU and CUDA (experts.py).

Tried with transformers 5.24.0. The registries are there since 5.23: an older one is an ImportError, a newer one a
warning.
"""

import re
import warnings

OLDEST, TRIED = "5.23", "5.24"

try:
    import transformers
except ImportError as error:
    raise ImportError(f"moe_ext.transformers needs transformers {OLDEST} or later ({error}). "
                      f'Type: pip install "transformers>={OLDEST}"') from error  # fmt: skip


def check_version(version):
    """ImportError for a transformers without the registries, a warning for one that is newer than tried."""
    numbers = tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups()))
    oldest, tried = (tuple(map(int, text.split("."))) for text in (OLDEST, TRIED))
    if numbers < oldest:
        raise ImportError(f"moe_ext.transformers needs transformers {OLDEST} or later, whose models take experts and "
                          f"their exchange from registries; this is {version}. "
                          f'Type: pip install "transformers>={OLDEST}"')  # fmt: skip
    if numbers > tried:
        warnings.warn(f"moe_ext.transformers was tried with transformers {TRIED}, this is {version}: compare one "
                      'step\'s loss with experts_implementation="eager"', stacklevel=3)  # fmt: skip


check_version(transformers.__version__)

from moe_ext.transformers import ep, experts  # noqa: E402, F401
from moe_ext.transformers.lora import (  # noqa: E402, F401
    add_lora,
    load_lora,
    lora_state_dict,
    merge_lora,
    save_lora,
)
