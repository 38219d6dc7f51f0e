"""Cases that hypothesis draws: small shapes with any ids at all, repeated within a token too."""

import torch
from cases import Case, Shape
from hypothesis import strategies


class DrawnCase(Case):
    """`routing` holds the ids themselves."""

    def ids(self, device="cpu"):
        return torch.tensor(self.routing, dtype=torch.int32, device=device).view(self.shape.T, self.shape.k)


@strategies.composite
def drawn_case(draw):
    size = strategies.integers
    E = draw(size(1, 7))
    shape = Shape(T=draw(size(0, 12)), d=draw(size(1, 20)), h=draw(size(1, 9)), E=E, k=draw(size(1, min(4, E))))
    copies = shape.T * shape.k
    ids = draw(strategies.lists(size(-1, E - 1), min_size=copies, max_size=copies))
    return DrawnCase(f"drawn {ids}", shape, tuple(ids))
