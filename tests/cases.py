"""THE case table: the shapes and routings that tests, gradient checks and benchmarks share.

A routing is a function (T, K, E, generator) -> ids_TK int32, -1 for "not here". A case is a shape with a routing.
"""

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """T tokens of width d, E experts of width h, k choices per token."""

    T: int
    d: int
    h: int
    E: int
    k: int


LAYERS = {  # measured by benchmarks/
    "tiny": Shape(4096, 256, 512, 8, 2),
    "mid16": Shape(4096, 512, 1024, 16, 2),
    "seed": Shape(2048, 768, 3072, 4, 2),
    "fine": Shape(2048, 512, 128, 64, 8),
    "fine1k": Shape(2048, 1024, 512, 64, 8),
    "mixt": Shape(512, 1024, 2816, 8, 2),
}


def _largest(score_TE, K):
    return score_TE.topk(K, dim=1).indices.int()


def balanced(T, K, E, generator):
    """Every expert gets T*K/E copies, give or take one."""
    return (torch.arange(T * K).view(T, K) % E).int()


def random(T, K, E, generator):
    """K different experts, drawn uniformly."""
    return _largest(torch.rand(T, E, generator=generator, device=generator.device), K)


def skewed(T, K, E, generator):
    """K different experts, drawn by Zipf's law: expert e has probability ~ 1/(e+1) (Gumbel top-k)."""
    uniform_TE = torch.rand(T, E, generator=generator, device=generator.device)
    gumbel_TE = -uniform_TE.clamp(min=1e-9).log().neg().log()
    return _largest(gumbel_TE - torch.arange(1, E + 1, device=generator.device).log(), K)


def one_takes_all(T, K, E, generator):
    return torch.full((T, K), E // 2, dtype=torch.int32)


def empty_experts(T, K, E, generator):
    """Only odd experts are ever chosen; the first and (for odd E) the last are among the empty ones."""
    return 2 * random(T, K, E // 2, generator) + 1


def some_absent(T, K, E, generator):
    """A third of the copies belong to experts that live elsewhere."""
    ids_TK = random(T, K, E, generator)
    return torch.where(torch.rand(T, K, generator=generator) < 1 / 3, -1, ids_TK)


def all_absent(T, K, E, generator):
    return torch.full((T, K), -1, dtype=torch.int32)


ROUTINGS = {f.__name__: f for f in (
    balanced, random, skewed, one_takes_all, empty_experts, some_absent, all_absent
)}  # fmt: skip


class Case(NamedTuple):
    name: str
    shape: Shape
    routing: str

    def generator(self, salt=0):
        """The case's own random numbers: the same on every run and in every order of tests."""
        return torch.Generator().manual_seed(sum(self.name.encode()) + 1000 * salt)

    def ids(self, device="cpu"):
        T, _, _, E, k = self.shape
        return ROUTINGS[self.routing](T, k, E, self.generator()).to(device)

    def randn(self, *size, salt, dtype=torch.float64, device="cpu"):
        """Standard normal numbers, rounded once to dtype; `salt` tells the tensors of one test apart."""
        return torch.randn(*size, generator=self.generator(salt), dtype=torch.float64).to(dtype).to(device)


CASES = [
    Case("balanced", Shape(32, 16, 24, 4, 2), "balanced"),
    Case("divides_nothing", Shape(37, 19, 23, 5, 3), "random"),
    Case("skewed", Shape(64, 33, 17, 8, 2), "skewed"),
    Case("one_takes_all", Shape(40, 16, 8, 4, 2), "one_takes_all"),
    Case("empty_experts", Shape(24, 8, 12, 17, 2), "empty_experts"),
    Case("k_is_e", Shape(9, 12, 10, 3, 3), "random"),
    Case("no_tokens", Shape(0, 8, 8, 4, 2), "random"),
    Case("one_token", Shape(1, 40, 20, 6, 2), "random"),
    Case("one_expert", Shape(11, 6, 5, 1, 1), "random"),
    Case("some_absent", Shape(33, 21, 14, 4, 2), "some_absent"),
    Case("all_absent", Shape(5, 8, 8, 3, 2), "all_absent"),
    Case("beyond_one_block", Shape(210, 301, 137, 2, 1), "random"),  # larger than a register or cache block every way
]
SMALLEST = Case("smallest", Shape(5, 4, 3, 3, 2), "some_absent")  # for what differentiates numerically
