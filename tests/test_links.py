"""Tensors between stages: both transports bring the same bits in any order, agree on one order, and end with a sentence.

What the C core says to its caller is in c/test_slots.c.
"""
import random

import pytest
import torch
from compare import same
from ranks import run_ranks

from moe_ext.config import MeshConfig
from moe_ext.parallel.links import open_links
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.schedule import Action

pytestmark = pytest.mark.c_core
TRANSPORTS = ["torch", "windows"]
SHAPE = (2, 3, 5)


def tensor_of(step, action, rank, dtype=torch.float32):
    """What `rank` gets as `action` of a step."""
    generator = torch.Generator().manual_seed(hash((step, action.kind == "B", action.chunk, action.micro, rank)) % 2**31)
    return torch.randn(SHAPE, generator=generator).to(dtype)


def actions(chunks, micros):
    return [Action(kind, chunk, micro) for kind in "FB" for chunk in range(chunks) for micro in range(micros)]


def receiver(mesh, action):
    return (mesh.rank + (mesh.config.stage if action.kind == "F" else -mesh.config.stage)) % mesh.world


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mesh", [dict(pp=2), dict(pp=3, tp=2)], ids=str)
def test_bits_arrive_in_any_order_of_sends(transport, mesh, tmp_path):
    """Every rank sends in an order of its own and takes in another, some steps with fewer micro-batches."""
    config, chunks, micros = MeshConfig(**mesh), 2, 3

    def body(rank):
        mesh, order = Mesh(config), random.Random(rank)
        links = open_links(mesh, transport, chunks=chunks, micros=micros, shape=SHAPE, dtype=torch.bfloat16)
        for step in range(1, 8):
            links.begin(step)
            todo = actions(chunks, 1 + step % micros)
            for action in order.sample(todo, len(todo)):
                links.send(action, tensor_of(step, action, receiver(mesh, action), torch.bfloat16))
            for action in order.sample(todo, len(todo)):
                same(links.take(action), tensor_of(step, action, rank, torch.bfloat16))
            assert links.waited >= 0 and links.sending > 0
            links.end()
        links.close()

    run_ranks(config.world, body, tmp_path)
