"""transformers in fp64: `with double(): ..` around making and calling a model that is to be compared to 1e-12.

Its norms, routers and RoPE compute in float32 also where the model is float64, which leaves 1e-7 of logits uncertain.
Under this mode whatever asks torch for float32 gets float64. Only what Python says is seen, nothing compiled.
"""
import torch
from torch.overrides import TorchFunctionMode


class double(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double

        def wider(value):
            return torch.float64 if value is torch.float32 else value

        kwargs = {name: wider(value) for name, value in (kwargs or {}).items()}
        return function(*map(wider, args), **kwargs)
