"""What "right" means: the bitwise rule for movement, the tolerance rule for arithmetic.

An implementation is compared with `reference.py` run in the same dtype ("plain") and in fp64 ("oracle") on the same,
already rounded inputs, outputs and every gradient alike. The checks of an op are functions check_<op>(impl, ...), so
that test_mutants.py can hand them a broken impl and see them fail.
"""

import itertools

import torch

from moe_ext import reference

# The absolute floor of the tolerance rule, as a share of the tensor's largest element: a few roundings of a sum that
# plain torch happened to round luckily, or one rounding in the coarsest dtype of the inputs.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _alike(got, want, what):
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{what}: got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    )


def same(got, want, what="result"):
    """Bit for bit, NaN included."""
    _alike(got, want, what)
    differ = _bytes(got) != _bytes(want)
    assert not differ.any(), f"{what}: {int(differ.sum())} bytes differ\ngot  {got}\nwant {want}"


def _bytes(x):
    return x.detach().contiguous().flatten().view(torch.uint8)


def close(got, plain, oracle, what="result", floor=None):
    """Error <= 2x that of plain torch in the same dtype, both against fp64, plus a floor (the dtype's by default)."""
    _alike(got, plain, what)
    if got.numel() == 0:
        return
    oracle = oracle.double()
    error = (got.double() - oracle).abs().max()
    assert error == error, f"{what}: NaN"
    bound = 2 * (plain.double() - oracle).abs().max() + (floor or FLOOR[got.dtype]) * oracle.abs().max()
    assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e}, largest {oracle.abs().max():.3e}"


def evaluate(call, inputs, wanted=None):
    """The floating results of call(**inputs) and the gradients of all floating inputs, or of the wanted ones, by name,
    for an upstream gradient that depends on nothing but the shapes."""
    wanted = floating(inputs) if wanted is None else wanted
    inputs = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    results = call(**inputs)
    results = [results] if isinstance(results, torch.Tensor) else [y for y in results if y.is_floating_point()]
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in results]
    grads = torch.autograd.grad(results, list(leaves.values()), upstream)
    values = {f"result {i}": y.detach() for i, y in enumerate(results)}
    return values | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def floating(inputs):
    return [name for name, x in inputs.items() if x.is_floating_point()]


def each_set_alone(call, inputs):
    """Whichever inputs want gradients, theirs have the bits that they have among the gradients of all."""
    names, all_together = floating(inputs), evaluate(call, inputs)
    for n in range(1, len(names)):
        for wanted in itertools.combinations(names, n):
            for name, got in evaluate(call, inputs, wanted).items():
                same(got, all_together[name], f"{name} where {', '.join(wanted)} want gradients")


def kept(call, inputs, wanted):
    """What call(**inputs) keeps for the gradients of the wanted: the names of inputs, and the bytes of the rest."""
    inputs = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = call(**inputs)  # noqa: F841  alive, so that no address is used twice
    names = {name for name, x in inputs.items() if storages.pop(x.untyped_storage().data_ptr(), None)}
    return names, sum(storages.values())


def doubles(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def against_reference(impl, call, inputs):
    """call(ops, **inputs) with ops = impl obeys the tolerance rule in every result and every gradient."""
    got = evaluate(lambda **x: call(impl, **x), inputs)
    plain = evaluate(lambda **x: call(reference, **x), inputs)
    oracle = evaluate(lambda **x: call(reference, **x), doubles(inputs))
    floor = max(FLOOR[x.dtype] for x in inputs.values() if x.is_floating_point())
    for name in got:
        close(got[name], plain[name], oracle[name], name, floor)


def gradcheck(call, inputs):
    """fp64 against finite differences, all floating inputs at once: for tests marked c_core."""
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in doubles(inputs).items()}
    assert torch.autograd.gradcheck(lambda *xs: call(**dict(zip(inputs, xs, strict=True))), list(inputs.values()))
