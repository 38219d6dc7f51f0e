"""Owners of matrices: who owns what, that all have about the same to do, what travels and between whom."""
import math
import random
import re
import threading
from collections import Counter, defaultdict
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_failure import client, run, sentence, server, who  # noqa: F401
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from moe_ext.optim.owners import Owners, assign, filled, parts, places, teams

COPY = Replicate()


def cubic(shape):
    return float(math.prod(shape) * min(shape, default=1))


# ---- who owns what ---------------------------------------------------------------------------------------------------
def layouts(sizes, shapes):
    """[(shape, placements)] -> held, shapes on a mesh of consecutive ranks."""
    ranks = range(math.prod(sizes))
    return [places(shape, ranks, sizes, placements) for shape, placements in shapes], [shape for shape, _ in shapes]


def traffic(held, owned, itemsize):
    """rank -> bytes that it sends to others in a trip, matrix by matrix: shards to owners, results as one."""
    sent, teams_of = Counter(), {}
    for matrix, owner in owned:
        here = held[matrix.index]
        if id(here) not in teams_of:
            teams_of[id(here)] = {place.rank: team for team in teams(here).values() for place in team}
        team = teams_of[id(here)][owner]
        copy = next(place.copy for place in team if place.rank == owner)
        for place, (_, size) in parts(matrix, team):
            if place.rank != owner:
                sent[owner] += math.prod(size) * itemsize
                sent[place.rank] += (place.copy == copy) * math.prod(size) * itemsize
    return dict(sent)


@pytest.mark.parametrize("most", [0, 24])
@pytest.mark.parametrize("seed", range(4))
def test_owners_have_about_the_same_to_do_in_all_and_bucket_by_bucket(seed, most):
    dice = random.Random(seed)
    shapes = [((dice.choice([16, 40, 64]), dice.choice([16, 48])), (COPY, Shard(0), COPY)) for _ in range(30)]
    shapes += [((8, dice.choice([8, 24]), 16), (COPY, Shard(2), Shard(0))) for _ in range(20)]
    held, shapes = layouts((2, 2, 2), shapes)
    owned = assign(held, shapes, cubic, most)
    for index, shape in enumerate(shapes):      # each value once, in whole matrices
        assert sum(math.prod(m.size) for m, _ in owned if m.index == index) == math.prod(shape)
    loads = Counter()
    for matrix, owner in owned:
        loads[owner] += cubic(matrix.shape)
    costliest = max(cubic(m.shape) for m, _ in owned)
    assert len(loads) == 8 and max(loads.values()) - min(loads.values()) <= 2 * costliest
    assert max(loads.values()) < 10 * min(loads.values())
    dense = [task for task in owned if task[0].index < 30]
    for some in filled(dense, 4000):
        load = Counter(dict.fromkeys(range(8), 0.0))
        for matrix, owner in some:
            load[owner] += cubic(matrix.shape)
        assert max(load.values()) - min(load.values()) <= 2 * costliest
    assert [task for some in filled(dense, 4000) for task in some] == dense


def test_a_bucket_holds_what_it_may_or_one_matrix_of_each_owner():
    held, shapes = layouts((3,), [((7, 9), (Shard(0),)), *[((5, n), (Shard(1),)) for n in range(1, 20)]])
    for most in (1, 50, 10**9):
        for some in filled(assign(held, shapes, cubic), most):
            elements = defaultdict(list)
            for matrix, owner in some:
                elements[owner].append(math.prod(matrix.size))
            assert all(sum(sizes) <= most or len(sizes) == 1 for sizes in elements.values())


def test_a_large_model_is_assigned_on_many_ranks():
    """Qwen3-30B-A3B's experts on 1024 ranks; a few of its layers, but no list of all ranks for each matrix."""
    here = places((128, 2, 768, 2048), range(1024), (4, 8, 32), (COPY, Shard(3), Shard(0)))
    owned = assign([here] * 6, [(128, 2, 768, 2048)] * 6, cubic)
    counts = Counter(owner for _, owner in owned)
    assert len(owned) == 6 * 256 and max(counts.values()) - min(counts[rank] for rank in range(1024)) <= 1
    sent = traffic([here] * 6, owned, 2)
    matrix, owners = 768 * 2048, 32     # of a team: 4 copies of 8 shards
    assert sum(sent.values()) == 2 * len(owned) * matrix * (7 / 8 + owners / 8 - 1 / 8)


def test_only_loads_that_all_know_count():
    """Ranks 0 and 1 do not know what 2 and 3 have between them, nor these what 0 has alone."""
    pair, all_four = places((4, 4), [2, 3], (2,), (Shard(0),)), places((8, 8), range(4), (4,), (Shard(0),))
    alone = places((8, 8), [0], (), ())
    whole = dict(assign([all_four] * 4, [(8, 8)] * 4, cubic))
    assert sorted(whole.values()) == [0, 1, 2, 3]
    assert {m._replace(index=m.index - 1): r for m, r in assign([pair, *[all_four] * 4], [(4, 4), *[(8, 8)] * 4], cubic)
            if m.index} == whole
    assert {m._replace(index=m.index - 1): r for m, r in assign([alone, *[all_four] * 4], [(8, 8)] * 5, cubic)
            if m.index} == whole


@pytest.mark.parametrize("placement", [_StridedShard(0, split_factor=4), _StridedShard(1, split_factor=2), Partial()])
def test_other_placements_are_refused(placement):
    with pytest.raises(ValueError, match=r"wanted Shard and Replicate alone: shard each dimension over one axis"):
        places((8, 4), range(4), (2, 2), (placement, Shard(0)))


# ---- trips -----------------------------------------------------------------------------------------------------------
LAYOUTS = {  # name: shape, axes, placements; of four ranks as 2 x 2
    "uneven": ((5, 7), ("a", "b"), (Shard(0), Shard(1))),
    "copies": ((6, 4), ("a", "b"), (COPY, Shard(0))),
    "all copies": ((4, 3), ("a", "b"), (COPY, COPY)),
    "less than ranks": ((1, 6), ("b",), (Shard(0),)),
    "vector": ((5,), ("a", "b"), (Shard(0), COPY)),
    "number": ((), ("a", "b"), (COPY, COPY)),
    "nothing": ((0, 3), ("a", "b"), (Shard(0), COPY)),
    "experts": ((4, 2, 6, 3), ("a", "b"), (Shard(3), Shard(0))),
    "experts of plain FSDP": ((3, 5, 4), ("a",), (Shard(0),)),
    "twice": ((9, 4), ("a", "b"), (Shard(0), Shard(0))),
    "fsdp over tp": ((7, 4), ("a", "b"), (_StridedShard(0, split_factor=2), Shard(0))),
    "plain": ((3, 4), (), ()),
}
NAMES = list(LAYOUTS)


def whole(name):
    shape = LAYOUTS[name][0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(NAMES.index(name)), dtype=torch.float64)


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def put(name, mesh, x):
    shape, axes, placements = LAYOUTS[name]
    if name == "fsdp over tp":      # as fully_shard does
        for axis in reversed(axes):
            x = distribute_tensor(x, mesh[axis], [Shard(0)]).to_local()
        return DTensor.from_local(x, mesh, placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))
    return distribute_tensor(x, mesh[axes], placements) if axes else x.clone()


def mesh_of_four():
    return DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("a", "b"))


def strided(x):
    """The same values; a matrix is not contiguous."""
    return x.mT.contiguous().mT if x.ndim == 2 else x


def trip(owners, tensors, moved=None):
    """-> this rank's parts of the results; NaN where none came."""
    found = [torch.full_like(local(x), math.nan) for x in tensors]

    def compute(matrices, wholes):
        """Needs the whole, and where it begins."""
        assert [x.shape for x in wholes] == [m.shape for m in matrices]
        results = [x * torch.linalg.vector_norm(x) + sum(m.start) for m, x in zip(matrices, wholes, strict=True)]
        return [strided(y) for y in results]

    def sink(i, part, piece):
        assert found[i][part].isnan().all()     # each value once
        found[i][part] = piece

    owners.run(lambda i, part: local(tensors[i])[part], compute, sink, dtype=torch.float64, device="cpu", moved=moved)
    return found


def wanted_of(rank, most):
    """One process's results, cut as rank's."""
    tensors = [whole(name) for name in NAMES]
    found = trip(Owners(tensors, cubic, most=most), tensors)
    parts = []
    for name, x in zip(NAMES, found, strict=True):
        _, axes, placements = LAYOUTS[name]
        order = -1 if name == "fsdp over tp" else 1
        for axis, placement in list(zip(axes, placements, strict=True))[::order]:
            if not placement.is_replicate():
                chunks, at = x.chunk(2, placement.dim), {"a": rank // 2, "b": rank % 2}[axis]
                x = chunks[at] if at < len(chunks) else x.narrow(placement.dim, 0, 0)
        parts.append(x)
    return parts


def test_every_rank_gets_its_part_of_what_one_process_computes():
    moved = [NAMES.index(name) for name in ("uneven", "experts", "plain")]

    def body(rank):
        mesh, results = mesh_of_four(), []
        tensors = [put(name, mesh, whole(name)) for name in NAMES]
        values = [strided(local(x)) for x in tensors]
        for most, bucket in ((0, 2**24), (3, 1)):
            owners = Owners(tensors, cubic, most=most, bucket=bucket)
            results.append(dict(
                found=trip(owners, values), some=trip(owners, values, moved), mine=[m.index for m in owners.mine],
                longest=max(max(m.shape, default=0) for m in owners.mine),
                shared=[i for _, indexes in owners.teams for i in indexes]))
        return results

    for rank, results in enumerate(run_ranks(4, body)):
        for result, most in zip(results, (0, 3), strict=True):
            for i, (wanted, found, some) in enumerate(zip(wanted_of(rank, most), result["found"], result["some"],
                                                          strict=True)):
                torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14, msg=NAMES[i])
                assert torch.equal(some, found) if i in moved else some.isnan().all(), NAMES[i]
            here = {NAMES.index("plain"), NAMES.index("experts of plain FSDP")}     # whole on a rank: do not travel
            assert here <= set(result["mine"]) and not here & set(result["shared"])
            assert most == 0 or result["longest"] == most


def test_traffic_is_what_is_sent_and_experts_send_nothing_between_ep_ranks():
    def body(rank):
        mesh = mesh_of_four()       # efsdp, ep
        experts = [put("experts", mesh, whole("experts"))]
        tensors = [put(name, mesh, whole(name)) for name in NAMES]
        with mock.patch.object(dist, "all_to_all_single", side_effect=dist.all_to_all_single) as travels:
            owners = Owners(experts, cubic)
            trip(owners, experts)
            groups = [call.kwargs["group"] for call in travels.call_args_list]
            between = [dist.get_process_group_ranks(group) for group in groups]
            reused = all(group == mesh.get_group("a") for group in groups)
        with mock.patch.object(dist, "all_to_all_single", side_effect=dist.all_to_all_single) as travels:
            everything = Owners(tensors, cubic, bucket=40)
            trip(everything, tensors)
            sent = 0
            for call in travels.call_args_list:
                ranks = dist.get_process_group_ranks(call.kwargs["group"])
                sent += 8 * sum(n for peer, n in zip(ranks, call.args[3], strict=True) if peer != rank)
        planned = traffic(everything._held(tensors), everything.owned, 8)[rank]
        return between, reused, sent, everything.sent, planned

    for rank, (between, reused, sent, counted, planned) in enumerate(run_ranks(4, body)):
        assert between == [[rank % 2, rank % 2 + 2]] * 2 and reused
        assert sent == counted == planned > 0


def test_a_gradient_on_some_ranks_alone_is_an_error_on_all():
    def body(rank):
        mesh = mesh_of_four()
        tensors = [put(name, mesh, whole(name)) for name in ("uneven", "experts", "vector")]
        owners = Owners(tensors, cubic, names=["uneven", "experts", "vector"])
        with pytest.raises(ValueError) as error:
            owners.agree({0, 1, 2} if rank else {1, 2}, "cpu")
        trip(owners, tensors, moved={2})        # and nothing is lost by it
        partial = DTensor.from_local(torch.zeros(2), mesh, [Partial(), Shard(0)], run_check=False)
        with pytest.raises(ValueError, match="here: got placements"):
            Owners([partial], cubic, names=["here"])
        return str(error.value)

    assert set(run_ranks(4, body)) == {"uneven: 3 of the 4 ranks that share it move it, wanted all or none: set .grad "
                                       "= torch.zeros_like(p) where a rank has computed none"}


@pytest.mark.parametrize("fault", ["raises", "never returns"])
def test_an_owner_that_fails_is_named(tmp_path, server, fault):     # noqa: F811
    def body(watch, rank, store):
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=3))
        mesh = DeviceMesh("cpu", [0, 1])
        tensors = [DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False) for _ in range(2)]
        watch.at("step 3")

        def compute(matrices, wholes):
            if rank == 1 and fault == "raises":
                raise FloatingPointError("no root")
            if rank == 1:
                threading.Event().wait()
            return wholes
        Owners(tensors, cubic).run(lambda i, part: tensors[i].to_local()[part], compute, lambda *_: None,
                                   dtype=torch.float32, device="cpu")

    statuses, said, pids = run(2, body, tmp_path, lambda: client(server.port), timeout=8)
    assert statuses == [1, 1]
    what = " failed in step 3: FloatingPointError: no root" if fault == "raises" else (
        r" kept the others waiting in step 3, and rank 0 failed in step 3: RuntimeError: .+")
    assert re.search(sentence(0, who(1, pids) + what), said[0])
