"""The proof that every mesh computes what one process does: a part of `make proof`, and that it finds planted bugs."""

import functools
import itertools
import math
import random
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from moe_ext import ops, proof
from moe_ext.config import Config, ConfigError, MeshConfig, ModelConfig, MoEConfig
from moe_ext.layers.fused import Draws, Experts
from moe_ext.model import GPT, Attention
from moe_ext.optim import Muon, Shampoo, muon, owners
from moe_ext.optim.owners import Matrix, Owners
from moe_ext.parallel import pipeline, sequence, shard, tensor
from moe_ext.parallel.mesh import Mesh, ScopePeers
from moe_ext.parallel.pipeline import Pipeline, Step
from moe_ext.parallel.ranks import run_ranks
from moe_ext.parallel.schedule import SCHEDULES
from moe_ext.proof import AXES, EXPERTS, Case, prove

pytestmark = pytest.mark.c_core


def name_of(case):
    sizes = [f"{axis}{size}" for axis in AXES if (size := getattr(case.mesh, axis)) > 1]
    sizes += [case.schedule] * (case.mesh.pp > 1) + [case.attention] * (case.mesh.sp > 1) + ["shaken"] * case.shaken
    return f"{'_'.join(sizes) or 'alone'}-{'dense' if case.dense else 'moe'}-{proof.part().index(case)}"


@pytest.fixture(scope="module")
def results():
    return {result.case: result for result in prove(proof.part())}


@pytest.mark.parametrize("case", proof.part(), ids=name_of)
def test_mesh_equals_one_process(case, results):
    assert not results[case].wrong, f"{results[case].wrong}\n{case}"


def test_every_two_options_meet_on_every_axis():
    for kind in itertools.product((False, True), proof.SPECIAL):
        met = set().union(*(proof.covered(case) for case in proof.table() if case.kind == kind))
        assert met >= proof.meetings(*kind)


def test_every_schedule_meets_every_axis_and_number_of_stages():
    met = {(case.schedule, place) for case in proof.table() if not case.dense for place in proof.places(case.mesh)}
    assert met >= set(itertools.product(SCHEDULES, (*AXES, "pp=2", "pp=4", "pp=8")))
    sizes = {(case.mesh.pp, case.chunks) for case in proof.table()}
    assert sizes >= {(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2)}


@pytest.mark.parametrize("optimizer, sizes", [("muon", dict(rep=2, fsdp=2)), ("shampoo", dict(tp=2, ep=2))])
def test_the_same_mesh_gives_the_same_bits(optimizer, sizes):
    case = on(optimizer=optimizer, kept="bf16", **sizes)

    def parameters(rank):
        record = proof.train(case, Mesh(case.config.mesh))
        return [record.close["parameters", step] for step in range(case.steps)]

    for one, other in zip(*(run_ranks(case.mesh.world, parameters) for _ in range(2)), strict=True):
        for mine, again in zip(one, other, strict=True):
            assert mine and all(torch.equal(x, again[name]) for name, x in mine.items())


def test_experts_that_ep_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"mesh\.ep 4 does not divide model\.moe\.experts 6"):
        Config(model=ModelConfig(moe=MoEConfig(experts=6)), mesh=MeshConfig(fsdp=4, ep=4))


# ---- planted bugs ----------------------------------------------------------------------------------------------------
# Each is called by every rank before it builds its model, in a process that ends with the cell.


def average_over_fsdp():
    """FSDP's own divide factor."""
    FSDPModule.set_gradient_divide_factor = FSDPModule.set_force_sum_reduction_for_comms = lambda *_: None


def router_is_no_part_of_the_tp_sum():
    replicated = tensor.replicated
    tensor.replicated = lambda p, axis: replicated(p, axis) and p.shape != (EXPERTS, 32)


def balance_loss_of_a_rank():
    shard.ScopePeers = lambda mesh, scope: None


def scope_ends_at_the_tp_group():
    shard.ScopePeers = lambda mesh, scope: ScopePeers(mesh, "sequence")


def combine_overwrites():
    combine = ops.exchange_combine

    def last_rank_wins(message_SW, place_TP, *more):
        later_TP = place_TP.flip(1).ge(0).cumsum(1).flip(1)
        return combine(message_SW, place_TP.where(later_TP == 1, -1), *more)

    ops.exchange_combine = last_rank_wins


def dispatch_forgets_the_weights_gradient():
    combine = ops.exchange_combine

    def without(*args):
        y_TD = combine(*args)
        return (y_TD[0], torch.zeros_like(y_TD[1])) if isinstance(y_TD, tuple) else y_TD

    ops.exchange_combine = without


def clip_by_mesh():
    clip = proof.clip_grad_norm

    def clip_each(named, max_norm, scale, holders):
        named = list(named)
        groups = {p.device_mesh: [pair for pair in named if pair[1].device_mesh == p.device_mesh] for _, p in named}
        return math.hypot(*(clip(group, max_norm, scale) for group in groups.values()))

    proof.clip_grad_norm = clip_each


def random_numbers_by_local_row():
    Mesh.draws = lambda self, seed, step, row0, seq_len: Draws(seed, step, 0)


def runs_forgotten():
    Mesh.draws = lambda self, seed, step, row0, seq_len: Draws(
        seed, step, row0 * seq_len + self.tp_rank * seq_len // self.config.tp)


def norm_over_own_columns():
    tensor.width_norm = lambda norm, rank, group, x: torch.nn.functional.rms_norm(
        x, x.shape[-1:], norm.weight.view(-1, x.shape[-1])[rank], norm.eps)


def sinks_of_other_heads():
    chunk = torch.Tensor.chunk
    torch.Tensor.chunk = lambda x, n, dim=0: chunk(x, n, dim)[::-1] if x.shape == (8,) else chunk(x, n, dim)


def bias_of_o_on_every_tp_rank():
    tensor.ONCE = re.compile("(?!)")


def while_experts_run(change):
    """`change(name, parameter, what is used of it)` decides what the experts compute with."""
    distribute = shard.distribute
    shard.distribute = lambda root, device_mesh, placements, used: distribute(
        root, device_mesh, placements, lambda name, local: change(name, local, used(name, local)))


def bias_of_w2_on_every_etp_rank():
    while_experts_run(lambda name, local, used: local if name == "w2_bias" else used)


def bias_of_w13_split_in_another_order():
    def other(name, local, used):
        return local.chunk(2, dim=2)[1 - dist.get_rank() % 2].contiguous() if name == "w13_bias" else used

    while_experts_run(other)


def gradients_of_experts_stay_in_their_replica():
    fully_shard = shard.fully_shard

    def narrow(module, mesh, **more):
        return fully_shard(module, mesh=mesh["efsdp"] if isinstance(module, Experts) else mesh, **more)

    shard.fully_shard = narrow


def selection_bias_by_local_counts():
    forward, update = GPT.forward, GPT.update_select_bias

    def remember(self, *args, **options):
        out = forward(self, *args, **options)
        self.local_counts = out.counts_LE.long() if self.training else self.local_counts
        return out

    GPT.forward, GPT.update_select_bias = remember, lambda self, counts_LE: update(self, self.local_counts)


def replicated_gradients_stay_parts():
    pipeline.sum_replicated = lambda model, mesh: None


def initial_values_by_local_index():
    box_normal = shard.box_normal
    shard.box_normal = lambda shape, start, size, **more: box_normal(shape, [0] * len(shape), size, **more)


def aux_loss_counts_on_every_rank():
    forward = GPT.forward

    def more(self, *args, **options):
        out = forward(self, *args, **options)
        return out._replace(aux_loss=out.aux_loss * dist.get_world_size())

    GPT.forward = more


def aux_loss_is_the_mean_over_a_stages_layers():
    forward = GPT.forward

    def own(self, *args, **options):
        out = forward(self, *args, **options)
        return out._replace(aux_loss=out.aux_loss * self.config.moe_layers / len(self.moe_layers()))

    GPT.forward = own


def balance_is_the_mean_over_all_stages_ranks():
    add = Step.add
    Step.add = lambda self, **parts: add(self, **{name: part / (self.mesh.config.pp if name == "balance" else 1)
                                                  for name, part in parts.items()})


def aux_loss_is_not_scaled():
    accumulate = pipeline.accumulate

    def unscaled(piece, out, mesh, scale, **options):
        return accumulate(piece, out._replace(aux_loss=out.aux_loss / scale), mesh, scale=scale, **options)

    pipeline.accumulate = unscaled


def tied_gradients_stay_parts():
    pipeline.sum_tied = lambda model, mesh: None


def norm_over_one_stage():
    """Of one rank: no rank adds what others have."""
    clip = proof.clip_grad_norm

    def own(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", lambda x: None)
            return clip(*args, **options)

    proof.clip_grad_norm = own


def gradients_are_whole_too_early():
    """After the first backward of a piece, in place of the last."""
    Step.whole = lambda self, action: action.kind == "B" and self.left[action.chunk] == self.micros - 1


def random_numbers_by_stage():
    draws = Mesh.draws
    Mesh.draws = lambda self, seed, *place: draws(self, seed + self.pp_rank, *place)


def while_stages_send(change):
    """`change(action, x)` decides what is sent, and to which action."""
    begin = Pipeline.__init__

    def other(self, *args, **options):
        begin(self, *args, **options)
        send = self.links.send
        self.links.send = lambda action, x: send(*change(action, x))

    Pipeline.__init__ = other


def activations_of_another_micro_batch():
    while_stages_send(lambda action, x: (action._replace(micro=action.micro ^ (action.kind == "F")), x))


def gradient_of_a_micro_batch_is_lost():
    while_stages_send(lambda action, x: (action, x * (action != ("B", 0, 1))))


def while_ranks_share(change, kind=GPT):
    """`change(module, mesh)` once a model's tokens are spread over the sp ranks, for each module of a kind."""
    spread = shard.sequence_parallel

    def other(model, mesh):
        spread(model, mesh)
        for module in model.modules():
            if isinstance(module, kind):
                change(module, mesh)

    shard.sequence_parallel = other


def first_part_of(chosen):
    """Of the whole sequences that `chosen` says, the first rank's tokens come to every rank."""
    def change(piece, mesh):
        mine, ranks = piece.mine, mesh.config.sp
        piece.mine = lambda x: mine(x) if x is None or not chosen(x) else x.chunk(ranks, dim=-1)[0]

    while_ranks_share(change)


def positions_begin_anew_on_every_rank():
    first_part_of(lambda x: x.ndim == 1)


def targets_of_the_first_rank():
    first_part_of(lambda x: (x < 0).any())


def documents_end_at_the_ranks_borders():
    documents = proof.documents

    def cut(case):
        ids, positions = documents(case)
        return ids * proof.TOKENS + torch.arange(proof.TOKENS) * case.mesh.sp // proof.TOKENS, positions

    proof.documents = cut


def while_heads_travel(change):
    """`change(across, core, q, k, v, seen, sinks)` in place of across(core, ..)."""
    def instead(attention, mesh):
        attention.across = functools.partial(change, attention.across)

    while_ranks_share(instead, Attention)


def heads_come_back_in_another_order():
    def other(across, *args):
        y_BHnd = across(*args)
        return y_BHnd.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    while_heads_travel(other)


def gradients_of_copied_heads_are_averaged():
    def other(across, core, q, k, v, *more):
        if k.requires_grad:
            k.register_hook(lambda dk: dk / 2)
        return across(core, q, k, v, *more)

    while_heads_travel(other)


def sinks_of_heads_that_are_elsewhere():
    while_heads_travel(lambda across, core, q, k, v, seen, sinks: across(core, q, k, v, seen, sinks.flip(0)))


def gradients_of_gathered_keys_stay_parts():
    gather = sequence.gather

    def own_alone(x, dim, group):
        parts = list(gather(x, dim, group).detach().chunk(dist.get_world_size(group), dim))
        parts[dist.get_rank(group)] = x
        return torch.cat(parts, dim)

    sequence.gather = own_alone


def loss_is_a_mean_over_the_ranks_of_a_sequence():
    accumulate = pipeline.accumulate
    pipeline.accumulate = lambda piece, out, mesh, tokens, **more: accumulate(
        piece, out, mesh, tokens=tokens * mesh.config.sp, **more)


def aux_loss_counts_on_every_rank_of_a_sequence():
    aux_loss_counts_on_every_rank()


def scope_ends_at_a_ranks_tokens():
    balance_loss_of_a_rank()


def draws_repeat_on_the_ranks_of_a_sequence():
    draws = Mesh.draws

    def first(self, seed, step, row0, seq_len):
        return draws(self, seed, step, row0, seq_len)._replace(row0=row0 * seq_len)

    Mesh.draws = first


def while_owners_run(change):
    """`change(owners, source, compute, sink)` in place of the latter three."""
    run = Owners.run
    Owners.run = lambda self, source, compute, sink, **more: run(self, *change(self, source, compute, sink), **more)


def each_part_is_a_matrix():
    """Computed where it lies, by what this rank has of it."""
    def alone(self, source, compute, sink, *, moved=None, **more):
        for i, (start, size) in enumerate(self.boxes):
            experts, shape = size[:-2], size[-2:]
            for at in itertools.product(*map(range, experts)):
                part = (*(slice(e, e + 1) for e in at), *map(slice, shape))
                if math.prod(shape):
                    matrix = Matrix(i, (*at, *start[len(at):]), (*(1 for _ in at), *shape))
                    [result] = compute([matrix], [source(i, part).reshape(shape)])
                    sink(i, part, result.view(matrix.size))

    Owners.run = alone


def preconditioners_of_shards():
    each_part_is_a_matrix()


def orthogonal_shards():
    each_part_is_a_matrix()


def a_stack_of_experts_is_one_matrix():
    newton_schulz = muon.newton_schulz
    muon.newton_schulz = lambda x, *how: newton_schulz(x.flatten(0, -2), *how).view_as(x)


def results_reach_one_copy_alone():
    while_owners_run(lambda self, source, compute, sink: (
        source, compute, sink if dist.get_rank() == 0 else lambda *result: None))


def gradients_of_copies_are_summed_again():
    while_owners_run(lambda self, source, compute, sink: (lambda *at: 2 * source(*at), compute, sink))


def gradients_of_one_shard_count_twice():
    while_owners_run(lambda self, source, compute, sink: (
        lambda *at: source(*at) * (1 + dist.get_rank()), compute, sink))


def learning_rate_by_the_parts_shape():
    def other(self, source, compute, sink):
        def scaled(i, part, piece):
            whole = [max(box.start[d] + box.size[d] for box, _ in self.owned if box.index == i) for d in (-2, -1)]
            sink(i, part, piece * math.sqrt(max(self.boxes[i][1][-2:]) / max(whole)))
        return source, compute, scaled

    while_owners_run(other)


def blocks_are_cut_from_parts():
    matrices = owners.matrices
    owners.matrices = lambda index, shape, inside, most=0: matrices(
        index, shape, inside, most and min(most, max(shape[-2:]) // dist.get_world_size()))


def decay_counts_for_each_piece():
    while_owners_run(lambda self, source, compute, sink: (
        source, compute, lambda i, part, piece: [sink(i, part, share) for share in (piece / 2, piece / 2)]))


def after_each_step(kind, change):
    """`change(state)` of each parameter of an optimizer, on the second rank alone."""
    step = kind.step

    def other(self, closure=None):
        step(self, closure)
        if dist.get_rank() == 1:
            for group in self.param_groups:
                for p in group["params"]:
                    change(self.state[p])

    kind.step = other


def momentum_of_one_rank_is_lost():
    after_each_step(Muon, lambda state: proof.local(state["momentum_buffer"]).zero_())


def one_rank_counts_its_own_steps():
    after_each_step(Shampoo, lambda state: state["step"].fill_(1))


def owners_forget_their_factors():
    after_each_step(Shampoo, lambda state: [x.zero_() for name, x in state.items() if name.startswith("factor")])


def on(dense=False, **options):
    sizes = {axis: options.pop(axis) for axis in AXES if axis in options}
    return Case(MeshConfig(**sizes), dense, **options)


def piped(dense=False, **options):
    return on(dense, pp=2, accumulation=2, **options)


BUGS = {
    average_over_fsdp: on(fsdp=2),
    router_is_no_part_of_the_tp_sum: on(tp=2),
    balance_loss_of_a_rank: on(tp=2),
    scope_ends_at_the_tp_group: on(fsdp=2, scope="micro_batch"),
    combine_overwrites: on(fsdp=2, ep=2),
    dispatch_forgets_the_weights_gradient: on(fsdp=2, ep=2),
    clip_by_mesh: on(tp=2, ep=2),
    random_numbers_by_local_row: on(True, rep=2, dropout=0.2),
    runs_forgotten: on(True, tp=2, dropout=0.2),
    norm_over_own_columns: on(True, tp=2, qk_norm="width"),
    sinks_of_other_heads: on(True, tp=2, sinks=True),
    bias_of_o_on_every_tp_rank: on(True, tp=2, bias=True),
    bias_of_w2_on_every_etp_rank: on(tp=2, etp=2, bias=True),
    bias_of_w13_split_in_another_order: on(tp=2, etp=2, bias=True),
    gradients_of_experts_stay_in_their_replica: on(rep=2),
    selection_bias_by_local_counts: on(fsdp=2, routing="moving"),
    replicated_gradients_stay_parts: on(True, tp=2),
    initial_values_by_local_index: on(True, fsdp=2),
    aux_loss_counts_on_every_rank: on(fsdp=2),
    aux_loss_is_the_mean_over_a_stages_layers: piped(),
    balance_is_the_mean_over_all_stages_ranks: piped(),
    aux_loss_is_not_scaled: piped(),
    tied_gradients_stay_parts: piped(True, tied=True),
    norm_over_one_stage: piped(True),
    gradients_are_whole_too_early: piped(True, tp=2),
    random_numbers_by_stage: piped(True, dropout=0.2),
    activations_of_another_micro_batch: piped(True),
    gradient_of_a_micro_batch_is_lost: piped(True),
    positions_begin_anew_on_every_rank: on(True, sp=2),
    targets_of_the_first_rank: on(True, sp=2, ignored=True),
    documents_end_at_the_ranks_borders: on(True, sp=2, documents=True),
    heads_come_back_in_another_order: on(True, sp=2),
    gradients_of_copied_heads_are_averaged: on(True, sp=4, kv_heads=2),
    sinks_of_heads_that_are_elsewhere: on(True, sp=2, sinks=True),
    gradients_of_gathered_keys_stay_parts: on(True, sp=2, attention="gather"),
    loss_is_a_mean_over_the_ranks_of_a_sequence: on(True, sp=2),
    aux_loss_counts_on_every_rank_of_a_sequence: on(sp=2),
    scope_ends_at_a_ranks_tokens: on(sp=2),
    draws_repeat_on_the_ranks_of_a_sequence: on(True, sp=2, dropout=0.2),
    preconditioners_of_shards: on(True, fsdp=2, optimizer="shampoo"),
    orthogonal_shards: on(True, fsdp=2, optimizer="muon"),
    a_stack_of_experts_is_one_matrix: on(fsdp=2, optimizer="muon"),
    results_reach_one_copy_alone: on(True, rep=2, optimizer="shampoo"),
    gradients_of_copies_are_summed_again: on(True, rep=2, optimizer="shampoo"),
    gradients_of_one_shard_count_twice: on(True, fsdp=2, optimizer="muon"),
    learning_rate_by_the_parts_shape: on(True, fsdp=2, optimizer="muon"),
    blocks_are_cut_from_parts: on(True, fsdp=2, optimizer="shampoo"),
    decay_counts_for_each_piece: on(True, fsdp=2, optimizer="shampoo"),
    momentum_of_one_rank_is_lost: on(True, fsdp=2, optimizer="muon"),
    one_rank_counts_its_own_steps: on(True, rep=2, optimizer="shampoo"),
    owners_forget_their_factors: on(True, rep=2, optimizer="shampoo"),
}


@functools.cache
def without_bug(case):
    [result] = prove([case])
    return result.wrong


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bug_is_found(bug):
    case = BUGS[bug]
    assert not without_bug(case)
    [result] = prove([case], bug=bug)
    assert result.errors, f"the cell was to disagree, not to end with: {result.wrong}"
    assert result.wrong and max(result.errors.values()) > 1e-9, result


def ranks_of_the_last_stage_decide_alone():
    """By what has come to themselves, which differs where links dawdle. Forward and backward still take turns, so that
    collectives pair, of other micro-batches: nothing but the order tells."""
    begin = Pipeline.__init__

    def other(self, *args, **options):
        begin(self, *args, **options)
        dice = random.Random(dist.get_rank())

        def agree(choose):
            while True:
                if action := choose(lambda action: dice.random() < 0.5):
                    return action

        if self.mesh.pp_rank == self.mesh.config.pp - 1:
            self.links.agree = agree

    Pipeline.__init__ = other


@pytest.mark.parametrize("schedule", ["dfc", "bfc"])
def test_ranks_that_do_not_agree_are_found(schedule):
    case = on(True, pp=2, tp=2, schedule=schedule, accumulation=4, links="windows")
    assert not without_bug(case)
    [result] = prove([case], seconds=60, bug=ranks_of_the_last_stage_decide_alone)
    assert "the 2 ranks of pipeline stage 1 (ranks 2 to 3) ran step 1 in different orders" in result.wrong


# ---- cells that do not come to an end --------------------------------------------------------------------------------


def test_a_cell_that_hangs_is_wrong():
    [result] = prove([on(fsdp=2)], seconds=2, bug=lambda: time.sleep(300 * dist.get_rank()))
    assert result.wrong.startswith("no answer within 2 s") and not result.errors


def test_a_cell_that_fails_says_why():
    def fail():
        if dist.get_rank() == 1:
            raise ArithmeticError("planted")

    [result] = prove([on(tp=2)], bug=fail)
    assert result.wrong == "ArithmeticError: planted" and not result.errors
