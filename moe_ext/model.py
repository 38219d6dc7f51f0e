"""The GPT: embeddings, blocks of attention and MLP or MoE, a norm, a head. One file, every variant by config.

    x = embed(tokens)
    x = x + attention(norm(x));  x = x + mlp(norm(x))          for each block
    loss = sum over tokens of cross-entropy(norm(x) W_head^T)

B sequences, S tokens, T = B*S, D model width, H query heads, G key/value heads, d head width, L layers, V vocabulary.
Parameters are named as in Hugging Face's Qwen3-MoE (without its prefix "model."), RoPE turns halves as there;
moe_ext.hf converts to that and others. model.tune says which of them move, and adds adapters (layers/lora.py). Nothing
is kept between calls: losses, counts and the key/value cache travel as arguments and results.
"""
from __future__ import annotations

import functools
import math
import os
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext import ops
from moe_ext.attention import Documents, attend, computed_in, visible
from moe_ext.config import Config, ModelConfig, TrainConfig, require
from moe_ext.layers.fused import MLP, Draws, FusedMoE, Linear, check_mask, normal_, site
from moe_ext.layers.lora import add_lora, candidates, init_lora, is_factor
from moe_ext.ops.define import real
from moe_ext.replay import Tape


class Losses(NamedTuple):
    """Results of one forward with targets."""
    token_loss: torch.Tensor    # scalar, cross-entropy summed over the tokens (nats)
    aux_loss: torch.Tensor      # scalar, balance and z-loss with their weights, mean over MoE layers; 0 in evaluation
    counts_LE: torch.Tensor     # int32, copies per MoE layer and expert; [0,0] for a dense model
    dropped_L: torch.Tensor     # int32, copies that capacity dropped in each MoE layer
    bad_L: torch.Tensor         # int32, tokens of each MoE layer whose router's logits are not finite
    balance: torch.Tensor       # scalar, balance loss without weight or gradient, mean over MoE layers
    x_BSD: torch.Tensor | None = None   # of a piece without the head: what the next piece begins with


class KVCache:
    """Keys and values of the `length` tokens seen so far, with room for the model's whole context."""
    def __init__(self, config: ModelConfig):
        self.room, self.layers, self.length = config.seq_len, [None] * config.layers, 0
        self.real_BL = None     # which of them are real; None: all

    def mark(self, token_mask, tokens_BS):
        """Takes the mask of new tokens, None if all are real, and returns that of all tokens."""
        if token_mask is not None or self.real_BL is not None:
            new_BS = torch.ones_like(tokens_BS, dtype=torch.bool) if token_mask is None else token_mask
            old_BL = new_BS.new_ones(len(new_BS), self.length) if self.real_BL is None else self.real_BL
            self.real_BL = torch.cat([old_BL, new_BS], dim=1)
        return self.real_BL

    def extend(self, layer, k_BGSd, v_BGSd):
        """Appends to one layer and returns all its keys and values; the model moves `length` after the last layer."""
        if self.layers[layer] is None:
            B, G, _, d = k_BGSd.shape
            self.layers[layer] = k_BGSd.new_empty(B, G, self.room, d), v_BGSd.new_empty(B, G, self.room, d)
        end = self.length + k_BGSd.shape[2]
        for kept, new in zip(self.layers[layer], (k_BGSd, v_BGSd), strict=True):
            kept[:, :, self.length:end] = new
        return tuple(kept[:, :, :end] for kept in self.layers[layer])


class RMSNorm(nn.RMSNorm):
    """norm(x) of x's dtype, computed in the weight's, or add_and_norm."""
    centred = False

    def forward(self, x, y=None):
        return add_and_norm(self, x, y, lambda s: ops.rms_norm(s, self.weight, self.eps))


class LayerNorm(nn.LayerNorm):
    """norm(x), or add_and_norm."""
    centred = True

    def forward(self, x, y=None):
        return add_and_norm(self, x, y, super().forward)


def add_and_norm(module, x, y, norm):
    """norm(x); with y x + y and norm(x + y). In an autocast region, to whose dtype matrix products would cast the norm
    of a float32 x, it has that dtype at once, and all is one op. A router reads it rounded, as in a model of halves."""
    w, b, device = module.weight, getattr(module, "bias", None), x.device.type
    region = not x.is_meta and torch.is_autocast_enabled(device)    # torch knows no region of meta tensors
    half = torch.get_autocast_dtype(device) if region else None
    plain = x.dtype == w.dtype == torch.float32 and not hasattr(w, "placements")
    if half in (torch.bfloat16, torch.float16) and plain and (y is None or y.dtype == half):
        s, z = ops.add_norm(x, y, w, b, module.eps, centred=module.centred, dtype=half)
        return z if y is None else (s, z)
    if y is None:
        return norm(x)
    x = x + y
    return x, add_and_norm(module, x, None, norm)


def summed(x, y):
    """x + y; x if y is None."""
    return x if y is None else x + y


def summed_and_normed(norm, x, y):
    """-> summed(x, y), its norm."""
    return (x, norm(x)) if y is None else norm(x, y)


def make_norm(c: ModelConfig, **options):
    if c.norm == "rmsnorm":
        return RMSNorm(c.dim, eps=c.norm_eps, **options)
    return LayerNorm(c.dim, eps=c.norm_eps, bias=c.bias, **options)


def rope_angles(positions, columns, base, scale=1.0, context=0, stretch="yarn"):
    """-> cos, sin, fp64 [.., columns/2]: position * base^(-2i/columns) (Su et al., 2021).

    scale > 1 stretches a context of so many tokens, so that pairs of columns turn `scale` times slower:
    "linear"    all of them (Chen et al., 2023)
    "yarn"      those that turn less than once in it; those that turn more than 32 times turn as before, and those
                between by a ramp over i. All are longer by 0.1 ln(scale) + 1, for sharper attention (Peng et al.,
                2023). The ramp's ends are as they come (gpt-oss) or, "yarn_rounded", rounded outwards
    "llama3"    those that turn less than once, not more than 4 times, and between by a ramp over turns (Llama 3.1)
    """
    pair = torch.arange(columns // 2, dtype=torch.float64, device=positions.device)
    frequency, length, slow = base ** (-2 * pair / columns), 1.0, 1.0
    if stretch == "llama3":
        slow = ((4 - context * frequency / (2 * math.pi)) / 3).clamp(0, 1)
    elif stretch != "linear" and scale > 1:
        first, last = (columns * math.log(context / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (32, 1))
        if stretch == "yarn_rounded":
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, columns - 1)
        slow, length = ((pair - first) / (last - first or 1e-3)).clamp(0, 1), 0.1 * math.log(scale) + 1
    angle = positions.double()[..., None] * (frequency * (1 - slow + slow / scale))
    return angle.cos() * length, angle.sin() * length


class Attention(nn.Module):
    """Causal self-attention with H query and G key/value heads."""
    def __init__(self, c: ModelConfig, **options):
        super().__init__()
        self.head_width, self.wide_norm = c.head_width, c.qk_norm_over == "width"
        q_width, kv_width = c.heads * c.head_width, c.kv_groups * c.head_width
        qkv_bias, o_bias = c.attention_biases
        self.q_proj = Linear(c.dim, q_width, bias=qkv_bias, **options)
        self.k_proj = Linear(c.dim, kv_width, bias=qkv_bias, **options)
        self.v_proj = Linear(c.dim, kv_width, bias=qkv_bias, **options)
        self.o_proj = Linear(q_width, c.dim, bias=o_bias, **options)
        q_columns, k_columns = (q_width, kv_width) if self.wide_norm else (c.head_width, c.head_width)
        self.q_norm = RMSNorm(q_columns, eps=c.norm_eps, **options) if c.qk_norm else None
        self.k_norm = RMSNorm(k_columns, eps=c.norm_eps, **options) if c.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(c.heads, **options)) if c.sinks else None
        self.recompute = False      # keep what attend takes, not what it saves, and run it again in the backward
        self.across = None          # ranks that share the sequences (moe_ext.parallel.sequence)

    def forward(self, x_BSD, rope, cache: KVCache | None = None, layer: int = 0, seen=None):
        """seen: as `attend` takes it."""
        B, S, _ = x_BSD.shape
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.wide_norm:
            q, k = self.normed(q, k)
        q, k, v = (t.view(B, S, -1, self.head_width) for t in (q, k, v))
        if not self.wide_norm:
            q, k = self.normed(q, k)
        if rope is not None:
            q, k = ops.rotate(q, *rope), ops.rotate(k, *rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))        # [B, H or G, S, d]
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        core = attend
        if self.recompute and self.training:
            core = functools.partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        y = core(q, k, v, seen, self.sinks) if self.across is None else self.across(core, q, k, v, seen, self.sinks)
        return self.o_proj(y.transpose(1, 2).reshape(B, S, -1))

    def normed(self, q, k):
        """Query and key after their norms, if they have any, whose columns are the last dimension."""
        if self.q_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), this sum left to the norm that reads it, the next block's or the
    model's. `mlp` is dense in the first `dense_layers` blocks, else MoE."""
    def __init__(self, c: ModelConfig, layer: int, **options):
        super().__init__()
        self.layer, self.dropout, self.name, self.window = layer, c.dropout, f"layers.{layer}", c.window_of(layer)
        self.input_layernorm = make_norm(c, **options)
        self.self_attn = Attention(c, **options)
        self.post_attention_layernorm = make_norm(c, **options)
        m = c.moe
        if m.experts == 0 or layer < m.dense_layers:
            self.mlp = MLP(c.dim, c.hidden, act=c.act, bias=c.bias, **options)
        else:
            self.mlp = FusedMoE(
                c.dim, m.hidden, m.experts, m.top_k, name=self.name + ".mlp", act=c.act, bias=c.bias,
                score=m.score, norm_p=m.norm_p, scale=m.scale, select_bias=m.select_bias_rate > 0,
                groups=m.groups, top_groups=m.top_groups, router_bias=m.router_bias, noise=m.noise, jitter=m.jitter,
                balanced=m.balanced, shared_hidden=m.shared_hidden, shared_gate=m.shared_gate,
                capacity_factor=m.capacity_factor, drop_by=m.drop_by, scope=m.scope, balance_form=m.balance_form,
                balance_weight=m.balance_weight, z_weight=m.z_weight, **options)

    def forward(self, x_BSD, y_BSD, rope, draws=None, cache=None, seen=None, token_mask=None, ids_BSK=None):
        """Of x + y, or of x if y is None -> x, y, Routing (None for a dense block)."""
        p = self.dropout if self.training else 0.0
        x_BSD, y_BSD = summed_and_normed(self.input_layernorm, x_BSD, y_BSD)
        y_BSD = self.self_attn(y_BSD, rope, cache, self.layer, seen)
        y_BSD, routing = drop(y_BSD, p, draws, lambda: self.name + ".self_attn"), None
        x_BSD, y_BSD = self.post_attention_layernorm(x_BSD, y_BSD)
        if isinstance(self.mlp, FusedMoE):
            y_BSD, routing = self.mlp(y_BSD, draws, token_mask, ids_BSK)
        else:
            y_BSD = self.mlp(y_BSD)
        return x_BSD, drop(y_BSD, p, draws, lambda: self.name + ".mlp.dropout"), routing


def drop(x_BSD, p, draws: Draws | None, name):
    """Dropout by the counter-based generator; without draws by torch's. name() is read where it matters, because
    torch.compile makes a block anew for each name that it reads."""
    if p == 0:
        return x_BSD
    if draws is None:
        return F.dropout(x_BSD, p)
    return ops.dropout(x_BSD.flatten(0, 1), p, **draws.at(name())).view_as(x_BSD)


class Head(Linear):
    """x_BSD -> logits_BSV; with targets the cross-entropy summed over the tokens, for which the logits never exist in
    full. `cross_entropy` takes (x_TD, w_VD, targets_T)."""
    def __init__(self, dim, vocab_size, **options):
        super().__init__(dim, vocab_size, bias=False, **options)
        self.cross_entropy = ops.linear_cross_entropy

    def forward(self, x_BSD, targets_BS=None):
        if targets_BS is None:
            return super().forward(x_BSD)
        return self.cross_entropy(x_BSD.flatten(0, 1), self.weight, targets_BS.flatten())


def check_integers(name, ids_BS, tokens_BS):
    """ValueError unless ids_BS is None, or integers with the shape and on the device of the tokens."""
    if ids_BS is not None and (ids_BS.is_floating_point() or ids_BS.dtype == torch.bool
                               or (ids_BS.shape, ids_BS.device) != (tokens_BS.shape, tokens_BS.device)):
        raise ValueError(f"GPT: {name} is {ids_BS.dtype} {list(ids_BS.shape)} on {ids_BS.device}, wanted integers "
                         f"{list(tokens_BS.shape)} on {tokens_BS.device}")


def unchanged(x):
    return x


class GPT(nn.Module):
    """tokens_BS int64 -> losses or logits. Parameters are drawn by `init_weights`; dtype is theirs.

    blocks: those of a piece of the model, which has the embeddings if it begins with the first block, norm and head if
    it ends with the last, and names its parameters as the whole does. A piece with a head of a tied model has the table
    too.
    """
    holders = None      # a pipeline's stage knows them (moe_ext.parallel.stages)

    def __init__(self, config: ModelConfig, *, seed: int = 0, dtype=torch.float32, device=None,
                 blocks: range | None = None):
        super().__init__()
        self.config, c = config, config
        options = dict(dtype=dtype, device=device)
        blocks = range(c.layers) if blocks is None else blocks
        self.first, self.last = blocks.start == 0, blocks.stop == c.layers
        self.embed_tokens = self.embed_positions = self.norm = self.lm_head = None
        if self.first or (self.last and c.tied):
            self.embed_tokens = nn.Embedding(c.vocab_size, c.dim, **options)
        if self.first and c.position == "learned":
            self.embed_positions = nn.Embedding(c.seq_len, c.dim, **options)
        self.layers = nn.ModuleList()
        for i in blocks:
            self.layers.add_module(str(i), Block(c, i, **options))
        if self.last:
            self.norm = make_norm(c, **options)
            self.lm_head = Head(c.dim, c.vocab_size, **options)
        if self.last and c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.recompute = False      # keep only each block's input and run it again in the backward
        self.mine = unchanged       # of ids, positions or a mask those of this rank's tokens
        if c.tune.lora_rank and any(re.search(c.tune.targets, name) for name in candidates(self)):  # not in every piece
            add_lora(self, c.tune.lora_rank, c.tune.lora_alpha, c.tune.targets)
        for name, p in self.named_parameters():
            p.requires_grad_(c.tune.moves(name, is_factor(name)))
        if not next(self.parameters()).is_meta:     # shapes alone: whoever gives them memory calls init_weights
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int, normal_=normal_):
        """Every value is a function of (seed, parameter's name, index in the whole parameter), so no mesh changes it.
        Matrices N(0, init_std), residual outputs N(0, init_std / sqrt(2L)) (GPT-2); norms 1, biases, noise and sinks 0:
        a sink begins as one more token of middling score."""
        for name, p in self.named_parameters():
            if is_factor(name):
                continue
            if name.endswith(("bias", "sinks", "noise_E")):
                p.zero_()
            elif p.ndim == 1:
                p.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "w2_EDF"))
                std = self.config.init_std / (math.sqrt(2 * self.config.layers) if residual else 1)
                normal_(p, std, seed, site(name))
        init_lora(self, seed, normal_)
        for moe in self.moe_layers():
            if moe.select_bias_E is not None:
                moe.select_bias_E.zero_()

    def hidden(self, tokens_BS, draws: Draws | None = None, cache: KVCache | None = None, token_mask=None,
               documents_BS=None, positions_BS=None, tape: Tape | None = None, x_BSD=None):
        """-> the last norm's output [B,S,D], list of Routing. x_BSD: what a piece without embeddings begins with; one
        without a norm returns what the next begins with.

        draws: of dropout, noise and jitter, in training only; None: torch's generator. token_mask: bool [B,S], True for
        a real token. No other token sees a pad, and positions count real tokens alone, so that these get what they get
        without pads, on whichever side; a pad's own output means nothing. documents_BS: integers [B,S]; a token sees
        only tokens with its own number. None: all of its sequence; with a cache there is no other. positions_BS:
        integers [B,S] from 0 to seq_len - 1, of RoPE or of the table; None: as they come. tape: takes down each token's
        experts, and gives them if it has any (moe_ext.replay). If ranks share the sequences (`mine`), each gives all of
        these whole, the same, and gets the output of its own tokens, as x_BSD is of them.
        """
        c, S = self.config, tokens_BS.shape[1]
        past = 0 if cache is None else cache.length
        if past + S > c.seq_len:
            raise ValueError(f"GPT: {past + S} tokens, but model.seq_len is {c.seq_len}")
        if token_mask is not None:
            check_mask("GPT", token_mask, tokens_BS)
        check_integers("documents_BS", documents_BS, tokens_BS)
        check_integers("positions_BS", positions_BS, tokens_BS)
        if cache is not None and any(block.self_attn.across is not None for block in self.layers):
            raise ValueError("GPT: got a cache, but ranks share this model's sequences, and each would hold a part: "
                             "generate on a mesh with mesh.sp 1")
        if cache is not None and documents_BS is not None:
            raise ValueError("GPT: got documents_BS and a cache, which holds one document per sequence: leave one out")
        real_BL = token_mask if cache is None else cache.mark(token_mask, tokens_BS)
        positions = positions_BS
        if positions is None and real_BL is None:
            positions = torch.arange(past, past + S, device=tokens_BS.device)
        elif positions is None:
            positions = (real_BL.cumsum(1) - 1).clamp(min=0)[:, past:]
        positions = self.mine(positions)
        if self.first:
            x_BSD = self.embed_tokens(self.mine(tokens_BS))
            if self.embed_positions is not None:
                x_BSD = x_BSD + self.embed_positions(positions)
            x_BSD = drop(x_BSD, c.dropout if self.training else 0.0, draws, lambda: "embed_tokens")
        rope = None
        if c.position == "rope":    # the same for all heads
            rope = rope_angles(positions.unsqueeze(-1), c.rope_columns, c.rope_base, c.rope_scale, c.rope_context,
                               c.rope_stretch)
        documents = None
        if cache is None and (documents_BS is not None or token_mask is not None):
            ids_BS = torch.zeros_like(tokens_BS) if documents_BS is None else documents_BS
            documents, real_BL = Documents.of(ids_BS, token_mask), None
        seen = {window: self.seen(S, past, window, real_BL, documents, x_BSD)
                for window in {block.window for block in self.layers}}
        token_mask, routings, y_BSD = self.mine(token_mask), [], None
        if tape is not None and c.moe_layers:
            tape.begin(c.moe_layers, c.moe.top_k, tokens_BS, None if cache is None else past)
        for block in self.layers:
            row = block.layer - c.moe.dense_layers
            ids_BSK = tape.ids_of(row) if tape is not None and isinstance(block.mlp, FusedMoE) else None
            if ids_BSK is not None:
                ids_BSK = self.mine(ids_BSK.movedim(1, -1)).movedim(-1, 1).contiguous()
            run = block
            if self.recompute and self.training:
                # Losses are returned, and draws keyed: there is no state to count twice, and none to save.
                run = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=draws is None)
                x_BSD, y_BSD = summed(x_BSD, y_BSD), None       # one tensor to keep
            x_BSD, y_BSD, routing = run(x_BSD, y_BSD, rope, draws, cache, seen[block.window], token_mask, ids_BSK)
            if routing is not None:
                routings.append(routing._replace(ids=None))     # which would live until the last block is done
                if tape is not None:
                    tape.take(row, routing.ids)
        if cache is not None:
            cache.length += S
        return summed_and_normed(self.norm, x_BSD, y_BSD)[1] if self.last else summed(x_BSD, y_BSD), routings

    def seen(self, S, past, window, real_BL, documents, x):
        """What S new tokens see in the blocks of a window, for `attend`; None: all tokens up to themselves. In the
        dtype of x's queries, and once for all blocks, because SDPA makes that of a bool, and keeps it, in each."""
        if documents is not None:
            return documents.but(mask=self.seen(max(documents.sizes.tolist(), default=0), 0, window, None, None, x))
        if not past and not 0 < window < S and real_BL is None:
            return None
        seen = visible(S, past, window, real_BL, device=x.device)
        if self.config.sinks:
            seen = F.pad(seen, (1, 0), value=True)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        dtype = computed_in(x.device.type, dtype)
        return torch.zeros(seen.shape, dtype=dtype, device=x.device).masked_fill_(~seen, -math.inf)

    def forward(self, tokens_BS, targets_BS, draws: Draws | None = None, token_mask=None, documents_BS=None,
                positions_BS=None, tape: Tape | None = None, x_BSD=None) -> Losses:
        """targets_BS int64, -100 where a token does not count, nor does any that token_mask calls a pad; the others as
        in `hidden`. Of a piece: its own layers' part of each loss, 0 where the head is another's, and its layers' rows.
        """
        x_BSD, routings = self.hidden(tokens_BS, draws, None, token_mask, documents_BS, positions_BS, tape, x_BSD)
        token_loss, rest = x_BSD.new_zeros((), dtype=real(x_BSD.dtype)), x_BSD
        if self.last:
            if token_mask is not None:
                targets_BS = targets_BS.masked_fill(~token_mask, -100)
            token_loss, rest = self.lm_head(x_BSD, self.mine(targets_BS)), None
        if not routings:
            none, zero = torch.zeros(0, dtype=torch.int32, device=tokens_BS.device), torch.zeros_like(token_loss)
            return Losses(token_loss, zero, none.view(0, 0), none, none, zero.detach(), rest)
        loss, counts, dropped, bad, balance = map(torch.stack, list(zip(*routings, strict=True))[:5])
        layers = self.config.moe_layers
        return Losses(token_loss, loss.sum() / layers, counts, dropped, bad, balance.sum() / layers, rest)

    def logits(self, tokens_BS, cache: KVCache | None = None, token_mask=None):
        """-> [B,S,V]. With a cache, tokens continue those that it holds, and token_mask is that of the new ones."""
        return self.lm_head(self.hidden(tokens_BS, cache=cache, token_mask=token_mask)[0])

    def moe_layers(self) -> list[FusedMoE]:
        return [block.mlp for block in self.layers if isinstance(block.mlp, FusedMoE)]

    def update_select_bias(self, counts_LE):
        """Once per optimizer step, with counts_LE over all its tokens. Nothing without a selection bias; that of a
        frozen router rests too."""
        if self.config.moe.select_bias_rate:
            for moe, counts_E in zip(self.moe_layers(), counts_LE, strict=True):
                if moe.gate.weight.requires_grad:
                    moe.update_select_bias(counts_E, self.config.moe.select_bias_rate)

    def num_parameters(self, moving: bool = False) -> tuple[int, int]:
        """(total, active per token): a tied table counts once, of E experts K are active, the whole router is. moving:
        of the parameters that are trained."""
        def count(module):
            return sum(p.numel() for p in module.parameters() if p.requires_grad or not moving)

        total = count(self)
        idle = sum(count(moe.experts) // moe.num_experts * (moe.num_experts - moe.top_k) for moe in self.moe_layers())
        return total, total - idle

    def flops_per_token(self) -> int:
        """Forward and backward, recomputation not counted: 6 per active weight that multiplies (embeddings do not, the
        head does), 4 if it is frozen, and 12 * S * H * d per layer for attention, counted without the causal half
        (PaLM, appendix B); where there is a window, of min(window, S) keys."""
        c = self.config
        tables = [self.embed_positions] + ([] if c.tied else [self.embed_tokens])
        tables = [table.weight for table in tables if table is not None]
        weights, moving = (self.num_parameters(part)[1] - sum(w.numel() for w in tables if w.requires_grad or not part)
                           for part in (False, True))
        keys = sum(min(block.window or c.seq_len, c.seq_len) for block in self.layers)
        attention = 12 * keys * c.heads * c.head_width
        return 4 * weights + 2 * moving + attention


def pick_device(config: Config) -> torch.device:
    """train.device, "auto" being CUDA if the ops run there in train.dtype. ConfigError if CUDA is wanted and they do
    not."""
    cuda, fp64 = moe_ext.has_cuda(), config.train.dtype == "fp64"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))      # torchrun's, on this host: a device for each
    enough = not cuda or torch.cuda.device_count() >= ranks
    require(enough or config.train.device != "cuda", f"train.device is cuda, but {ranks} processes share "
            f"{torch.cuda.device_count()} CUDA devices: start as many as there are, or use cpu")
    require(cuda or config.train.device != "cuda", "train.device is cuda, but torch sees no CUDA device or this build "
            "of moe_ext has no CUDA kernels: use cpu")
    require(not fp64 or config.train.device != "cuda", "train.dtype is fp64, which has no CUDA kernels: use "
            "train.device cpu, or fp32 or bf16")
    return torch.device("cuda" if cuda and enough and not fp64 and config.train.device != "cpu" else "cpu")


def parameter_dtype(config: Config) -> torch.dtype:
    """fp32; fp64 for train.dtype fp64."""
    return torch.float64 if config.train.dtype == "fp64" else torch.float32


def half_dtype(config: Config) -> torch.dtype | None:
    """What autocast computes in; None if it does nothing."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.dtype)


def build(config: Config) -> GPT:
    """The GPT of a run at its initial values, on its device."""
    model = GPT(config.model, seed=config.train.seed, dtype=parameter_dtype(config), device=pick_device(config))
    set_recomputation(model, config.train)
    return model


def set_recomputation(model: GPT, train: TrainConfig) -> None:
    """What of a GPT or a piece of it the backward runs again."""
    model.recompute = train.recompute
    for block in model.layers:
        block.self_attn.recompute = train.recompute_attention


def precision(config: Config, device: torch.device):
    """The context of a run's forwards: autocast for train.dtype bf16 and fp16."""
    half = half_dtype(config)
    return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)
