"""The enumerations of csrc/moe.h by name: a user says a name, an op takes its number.

No str enters the binary, because torch before 2.14 never frees one that does: 48 bytes at every call.
"""

ACTS = {"swiglu": 0, "geglu": 1, "geglu_tanh": 2, "swiglu_oai": 3,
        "silu": 4, "gelu": 5, "gelu_tanh": 6, "relu": 7}  # moe_act
GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_oai")  # act(gate) * up of [gate | up]
SCORES = {"softmax_topk": 0, "topk_softmax": 1, "sigmoid": 2}  # moe_score
BALANCES = {"switch": 0, "mse": 1}  # moe_balance


def number(op, argument, name, choices):
    """The number of `name`, which a call of `op` gave as `argument`."""
    if name not in choices:
        raise RuntimeError(f'moe_ext::{op}: {argument} is "{name}", wanted one of {", ".join(choices)}')
    return choices[name]
