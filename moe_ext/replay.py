"""Router replay: which experts each token went to, taken down in one forward and forced in another.

    tape = Tape()
    model(tokens_BS, targets_BS, tape=tape)                         # records: tape.ids_LBSK
    model(tokens_BS, targets_BS, tape=Tape(tape.ids_LBSK))          # forces them

Forced experts replace the router's choice and nothing else: weights, balance loss and capacity come from the logits at
hand, and every gradient is that of a router that had chosen so. Ids count from 0 in each MoE layer; L counts MoE layers
alone. A token whose ids are all -1, a pad or one that nobody recorded, chooses for itself.

    on a mesh           each rank gives its sequences whole, with all layers, and records its own tokens and layers;
                        `gathered` joins those of all ranks. A pipeline's feed gives the tape behind positions_BS.
    generation          a tape of several forwards with one cache takes the tokens one after the other
    from an engine      `from_engine`: what vLLM and SGLang return for a sequence
    transformers        `with routers(model, tape):` records and forces in models with routers of classes *TopKRouter
    files               `save`, `load`

docs/replay.md shows each. What the routers of a trained model do: moe_ext.statistics.
"""
from __future__ import annotations

import base64
import functools
import io
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from moe_ext.parallel.collectives import gather_rows

# ---- the tape --------------------------------------------------------------------------------------------------------


class Tape:
    """The experts of every token in every MoE layer of one forward, or of the forwards of one generation.

    ids_LBSK: what to force, integers on any device: in [0, E), a token's distinct, or -1 for none. None: nothing.
    Either way the tape then holds what was chosen, before capacity. Used again, it forgets.
    """

    def __init__(self, ids_LBSK: torch.Tensor | None = None):
        if ids_LBSK is not None:
            check_form("Tape", ids_LBSK)
        self.forced, self.taken, self.size = ids_LBSK, {}, None

    def begin(self, layers: int, top_k: int, tokens_BS: torch.Tensor, past: int | None = None) -> None:
        """A model with so many MoE layers is about to run tokens_BS, behind the `past` others of a cache if it has one.
        ValueError if forced ids are not for them."""
        B, S = tokens_BS.shape[:2]
        self.begins, self.device, self.size = past or 0, tokens_BS.device, (B, S, top_k)
        self.ends = self.begins + S
        if self.forced is None:
            return
        for what, got, wanted in zip(("MoE layers", "sequences", "experts per token"),
                                     (self.forced.shape[i] for i in (0, 1, 3)), (layers, B, top_k), strict=True):
            if got != wanted:
                raise ValueError(f"Tape: the forced ids {list(self.forced.shape)} have {got} {what}, the forward "
                                 f"{wanted}: are they of another model or batch?")
        tokens = self.forced.shape[2]
        if tokens < self.ends or (past is None and tokens > self.ends):
            raise ValueError(f"Tape: the forced ids {list(self.forced.shape)} have {tokens} tokens, the forward "
                             f"{self.ends}: give as many, -1 where one shall choose for itself")

    def ids_of(self, row: int) -> torch.Tensor | None:
        """The forced ids of MoE layer `row` for the tokens of this forward, int32 [B,S,K] on their device."""
        if self.forced is None:
            return None
        return self.forced[row, :, self.begins:self.ends].to(self.device, torch.int32)

    def take(self, row: int, ids_BSK: torch.Tensor) -> None:
        """Of MoE layer `row`; what a recomputation says again replaces what it said, and so does what follows a cache
        that has been cropped. ValueError for a cache whose beginning ran without the tape."""
        taken = self.taken.setdefault(row, {})
        while taken and (last := next(reversed(taken))) >= self.begins:
            del taken[last]
        if taken:
            taken[last] = taken[last][:, :self.begins - last]
        if self.begins != (last + taken[last].shape[1] if taken else 0):
            raise ValueError(f"Tape: the cache holds {self.begins} tokens, some of which ran without this tape: give "
                             "the tape to every forward of a generation, the first too")
        taken[self.begins] = ids_BSK

    @property
    def ids_LBSK(self) -> torch.Tensor:
        """What was chosen: int32, of the MoE layers and tokens that ran here, -1 for pads. ValueError before that."""
        if not self.taken:
            raise ValueError("Tape: no MoE layer has run yet: give it to a forward, model(.., tape=tape)")
        return torch.stack([torch.cat(list(self.taken[row].values()), dim=1) for row in sorted(self.taken)])


def check_form(what: str, ids_LBSK) -> None:
    """ValueError unless it is a tensor of integers with so many axes."""
    got = type(ids_LBSK).__name__
    if isinstance(ids_LBSK, torch.Tensor):
        if ids_LBSK.ndim == 4 and not (ids_LBSK.is_floating_point() or ids_LBSK.dtype == torch.bool):
            return
        got = f"{ids_LBSK.dtype} {list(ids_LBSK.shape)}"
    raise ValueError(f"{what}: ids_LBSK is {got}, wanted a tensor of integers [MoE layers, sequences, tokens, K]")


def check_ids(what: str, ids: torch.Tensor, experts: int) -> None:
    """ValueError unless ids [..,K] are -1 or in [0, experts), and those of a token distinct."""
    if ((ids < -1) | (ids >= experts)).any():
        raise ValueError(f"{what} reach from {ids.min()} to {ids.max()}, wanted 0 to {experts - 1}, or -1 for none: "
                         "are they of another model?")
    sorted_ids = ids.sort(-1).values
    twice = ((sorted_ids[..., 1:] == sorted_ids[..., :-1]) & (sorted_ids[..., 1:] >= 0)).any(-1)
    if twice.any():
        at = twice.nonzero()[0].tolist()
        raise ValueError(f"{what} name an expert twice for one token, first at {at}: {ids[tuple(at)].tolist()}. An "
                         "engine's buffer holds zeros where it recorded nothing; give such tokens -1")


def gathered(tape: Tape, mesh, layers: int) -> torch.Tensor:
    """A micro-batch's ids of all `layers` MoE layers, and of the sequences of all ranks in one process's order: int32
    [L,B,S,K]. Every rank of the mesh calls, with its tape, and gets the same."""
    if mesh.world == 1:
        return tape.ids_LBSK
    B, S, K = tape.size
    ids_LBSK = torch.full((layers, B * mesh.config.dp, S, K), -1, dtype=torch.int32, device=tape.device)
    if tape.taken:
        own = gather_rows(tape.ids_LBSK, 2, mesh.data.get_group("sequence"))
        ids_LBSK[sorted(tape.taken)] = gather_rows(own, 1, mesh.data.get_group("dp"))
    dist.all_reduce(ids_LBSK, dist.ReduceOp.MAX, group=mesh.pipe.get_group("pp"))
    return ids_LBSK


# ---- files -----------------------------------------------------------------------------------------------------------


def save(path: str | Path, ids_LBSK: torch.Tensor, experts: int, tokens_BS: torch.Tensor | None = None) -> None:
    """Writes ids as int16, how many experts a layer has, and the tokens if given, to a .safetensors file; whole or not
    at all."""
    check_form("save", ids_LBSK)
    check_ids("save: the ids", ids_LBSK, experts)
    tensors = {"ids_LBSK": ids_LBSK.to("cpu", torch.int16).contiguous()}
    if tokens_BS is not None:
        if tokens_BS.shape != ids_LBSK.shape[1:3]:
            raise ValueError(f"save: tokens are {list(tokens_BS.shape)}, the ids those of {list(ids_LBSK.shape[1:3])}")
        tensors["tokens_BS"] = tokens_BS.cpu().contiguous()
    part = Path(f"{path}.part")
    save_file(tensors, part, metadata={"experts": str(experts)})
    os.replace(part, path)


def load(path: str | Path, config) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> ids_LBSK int16, tokens_BS or None. config: the ModelConfig of the model that shall replay them. ValueError if
    the file is of another one, or is none of `save`."""
    try:
        with safe_open(path, "pt") as file:
            experts = int(file.metadata()["experts"])
            ids_LBSK = file.get_tensor("ids_LBSK")
            tokens_BS = file.get_tensor("tokens_BS") if "tokens_BS" in file.keys() else None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of moe_ext.replay.save, or is damaged: {error}") from None
    moe = config.moe
    for what, got, wanted in (("MoE layers", len(ids_LBSK), config.moe_layers), ("experts", experts, moe.experts),
                              ("experts per token", ids_LBSK.shape[3], moe.top_k)):
        if got != wanted:
            raise ValueError(f"{path} is of a model with {got} {what}, this one has {wanted}")
    return ids_LBSK, tokens_BS


# ---- what inference engines return -----------------------------------------------------------------------------------


def from_engine(routed, config, tokens: int) -> torch.Tensor:
    """The experts that an inference engine returned for one sequence -> int32 [L,S,K] for `tokens` = S tokens of it.

    routed: [n, layers, K], of any integer type: an array (vLLM's CompletionOutput.routed_experts, prompt included, or
    prompt_routed_experts and it joined along n), or in base64 a .npy file of it (vLLM's server) or its int32 alone
    (SGLang's meta_info["routed_experts"], of all blocks). n is S, or S - 1: the last token that was generated ran
    through no layer, and gets -1. layers are the MoE layers, or all blocks, of which the dense ones are left out.
    config: a ModelConfig. ValueError for anything else.
    """
    K = config.moe.top_k
    if isinstance(routed, str):
        raw = base64.b64decode(routed)
        if raw.startswith(b"\x93NUMPY"):
            routed = np.load(io.BytesIO(raw), allow_pickle=False)
        else:
            size = 4 * config.layers * K    # of a token
            if len(raw) not in (size * tokens, size * (tokens - 1)):
                raise ValueError(f"from_engine: got {len(raw)} bytes, wanted int32 of {tokens} or {tokens - 1} tokens, "
                                 f"{config.layers} layers, {K} experts: {size * tokens} or {size * (tokens - 1)}")
            routed = np.frombuffer(raw, dtype=np.int32).reshape(-1, config.layers, K)
    routed = np.asarray(routed)
    if routed.dtype.kind not in "iu":
        raise ValueError(f"from_engine: got {routed.dtype}, wanted integers, or a string in base64")
    ids = torch.as_tensor(routed.astype(np.int64))
    if ids.ndim != 3 or len(ids) not in (tokens, tokens - 1) or ids.shape[1] not in (config.layers, config.moe_layers) \
            or ids.shape[2] != K:
        raise ValueError(f"from_engine: got {list(ids.shape)}, wanted [tokens {tokens} or {tokens - 1}, layers "
                         f"{config.layers} or MoE layers {config.moe_layers}, experts per token {K}]. Hint: leave out "
                         "shared experts that the engine fused, and join prompt and generated tokens")
    if ids.shape[1] > config.moe_layers:
        ids = ids[:, -config.moe_layers:]       # the dense blocks come first
    check_ids("from_engine: the ids", ids, config.moe.experts)
    ids_LSK = torch.full((config.moe_layers, tokens, K), -1, dtype=torch.int32)
    ids_LSK[:, :len(ids)] = ids.transpose(0, 1)
    return ids_LSK


def batch(sequences: list[torch.Tensor], tokens: int) -> torch.Tensor:
    """[L,S,K] of several sequences -> [L,B,tokens,K], each filled up with -1 behind its last token."""
    if too_long := [ids.shape[1] for ids in sequences if ids.shape[1] > tokens]:
        raise ValueError(f"batch: a sequence has {too_long[0]} tokens, more than {tokens}")
    return torch.stack([F.pad(ids, (0, 0, 0, tokens - ids.shape[1]), value=-1) for ids in sequences], dim=1)


# ---- transformers ----------------------------------------------------------------------------------------------------

ROUTER = re.compile(r"Top[kK]Router$")      # of a class: in Qwen3-MoE, Mixtral, OLMoE, GLM-4.5, gpt-oss, DeepSeek-V3


class Chosen(TorchFunctionMode):
    """Inside, the top-k over a router's experts gives the forced ids, and their values; everything else is torch's. So
    the router's own code computes the weights, whatever its rule."""

    def __init__(self, experts: int, top_k: int, forced_TK):
        super().__init__()
        self.experts, self.top_k, self.forced_TK, self.ids_TK = experts, top_k, forced_TK, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in (torch.topk, torch.Tensor.topk):
            return result
        values, ids = result
        if args[0].ndim != 2 or args[0].shape[1] != self.experts or ids.shape[1] != self.top_k:
            return result       # of groups
        if self.forced_TK is not None:
            ids = torch.where((self.forced_TK == -1).all(1, keepdim=True), ids, self.forced_TK)
            values = args[0].gather(1, ids)
        self.ids_TK = ids
        return values, ids


@contextmanager
def routers(model: torch.nn.Module, tape: Tape):
    """Inside, the routers of a transformers model write to the tape, and take the experts that it forces: of one
    forward and its backward, or of one generation without beams, whose sequences change places. ValueError for a model
    without routers, for ids that do not fit, and for a -1 beside other ids of a token."""
    found = [module for module in model.modules() if ROUTER.search(type(module).__name__)]
    if not found:
        raise ValueError(f"routers: {type(model).__name__} has no module of a class *TopKRouter: is it an MoE model?")
    experts, top_k = found[0].num_experts, found[0].top_k
    if tape.forced is not None:
        check_ids("routers: the forced ids", tape.forced, experts)
        if ((tape.forced == -1).any(-1) != (tape.forced == -1).all(-1)).any():
            raise ValueError("routers: some tokens have forced ids and a -1 beside them; transformers' routers take K "
                             "experts, or none: -1 in all places")

    def begin(_, args, kwargs):
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        cache = kwargs.get("cache", kwargs.get("past_key_values"))      # its name since transformers 5.24, and before
        past = None if cache is None else int(cache.get_seq_length())     # a tensor that counts on, of a static cache
        tape.begin(len(found), top_k, tokens, past)

    def route(row, forward, *args, **kwargs):
        if tape.size is None:
            raise ValueError(f"routers: a part of {type(model).__name__} runs by itself: give `routers` the module "
                             "that is called")
        forced = tape.ids_of(row)
        with Chosen(experts, top_k, None if forced is None else forced.flatten(0, 1).long()) as chosen:
            result = forward(*args, **kwargs)
        if chosen.ids_TK is None:
            raise RuntimeError(f"routers: {type(found[row]).__name__} takes no top-k over its {experts} experts")
        tape.take(row, chosen.ids_TK.view(tape.size).int())
        return result

    hook, own = model.register_forward_pre_hook(begin, with_kwargs=True), [vars(m).get("forward") for m in found]
    try:
        for row, module in enumerate(found):
            module.forward = functools.partial(route, row, module.forward)
        yield tape
    finally:
        hook.remove()
        for module, forward in zip(found, own, strict=True):
            del module.forward
            if forward is not None:         # another wrapper's
                module.forward = forward
