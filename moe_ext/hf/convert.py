"""A folder of Hugging Face transformers -> a run folder, and a checkpoint -> such a folder, tensor by tensor.

    import_(HF_FOLDER, RUN)     a run with a checkpoint of step 0: moe_ext.train .. --weights RUN goes on from it
    export(RUN, HF_FOLDER)      for from_pretrained(HF_FOLDER); of a checkpoint of any mesh

Each holds one tensor of ours and one of theirs at a time. What is made is whole or absent. Every tensor is accounted
for, or refused by its name, and what is left out is said. Parameters are float32 (float64 if theirs are), which holds
what theirs were, so there and back gives every bit again. RUN/hf keeps what the GPT has no place for; a run that begins
with these weights takes it along (moe_ext.run):

    RUN/hf/imported.json        how the experts lay on disk, and the dtype of every tensor
    RUN/hf/config.json, generation_config.json, tokenizer_config.json, ..       their files as they were
"""
from __future__ import annotations

import copy
import itertools
import json
import math
import re
import shutil
import warnings
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from moe_ext import checkpoint, snapshot
from moe_ext.checkpoint import CheckpointError, State
from moe_ext.config import (
    Config,
    ConfigError,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    build,
    did_you_mean,
    dumps,
    require,
)
from moe_ext.data.prepare import progress
from moe_ext.data.tokenise import ENDS
from moe_ext.generate import load_tokenizer
from moe_ext.hf import families, files
from moe_ext.hf.families import FAMILIES, Family, Part
from moe_ext.hf.files import Stored, listed
from moe_ext.model import GPT, parameter_dtype
from moe_ext.optim import build_optimizer
from moe_ext.run import absolute, write
from moe_ext.snapshot import DTYPES, NAMES
from moe_ext.upcycle import source_of, whole

TRIED = "5.24.0"        # of transformers
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken",
             "*.model", "tekken.json", "chat_template*", "additional_chat_templates/*")
LICENSE = ("LICENSE*", "NOTICE*")
SHORT = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}   # the dtypes that parameters may have
LONG = {short: long for long, short in SHORT.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SEQUENCE = 4096         # tokens of a run's sequences, where the model could have more


class Origin(NamedTuple):
    """A folder of transformers, or what RUN/hf keeps of one."""
    folder: Path
    config: object              # transformers' own
    layout: str                 # how the experts lay, of Family.layouts
    dtype: str                  # of their tensors, as safetensors says it,
    others: dict[str, str]      # but of these


class Theirs(NamedTuple):
    """A folder of transformers, its tensors not yet read."""
    origin: Origin
    family: Family
    model: ModelConfig
    tensors: dict[str, Stored | files.MXFP4]
    table: dict[str, list[Part]]    # of each of our tensors
    dtypes: dict[str, str]          # of each of theirs in it
    said: list[str]                 # what is left out, or not as it stands there


# ---- what is there ---------------------------------------------------------------------------------------------------
def read(folder: Path) -> Theirs:
    """Errors: ConfigError, and CheckpointError naming each tensor that is missing, not known, or of another shape or
    dtype than its config.json wants."""
    require(folder.is_dir(), f"no folder {folder}: give one of save_pretrained or of a download from the hub")
    check_transformers()
    config, method = read_config(folder)
    family = families.of(config)
    model, found = family.read(config), files.weights(folder)
    if method:
        found = files.unpacked(found)
    layout, table, said = account(folder, family, model, found, config)
    if packed := sum(isinstance(stored, files.MXFP4) for stored in found.values()):
        said.append(f"{packed} tensors were MXFP4 and are bf16 now")
    dtypes = {part.name: found[part.name].dtype for parts in table.values() for part in parts}
    main = usual(dtypes)
    origin = Origin(folder, config, layout, main, {name: dtype for name, dtype in dtypes.items() if dtype != main})
    return Theirs(origin, family, model, found, table, dtypes, said)


def check_transformers() -> None:
    """ConfigError without a transformers that can be used; a warning for a version that was not tried."""
    try:
        from transformers import __version__ as version
    except ImportError as error:
        raise ConfigError(f"transformers, which reads the configs of Hugging Face, cannot be imported ({error}): pip "
                          "install \"moe_ext[hf]\"") from None
    here, tried = ([int(number) for number in re.findall(r"\d+", text)[:2]] for text in (version, TRIED))
    require(here >= [5], f"transformers is {version}, whose configs are of another form than those of 5: pip install "
            "-U transformers")
    if here != tried:
        warnings.warn(f"transformers is {version}; {TRIED} is what this was tried with", stacklevel=2)


def read_config(folder: Path):
    """-> transformers' config of a folder, without its quantisation, and that one's name ("": none). ConfigError."""
    path = folder / "config.json"
    if not path.is_file():
        adapters, cached = (folder / "adapter_config.json").is_file(), sorted(folder.glob("snapshots/*/config.json"))
        raise ConfigError(f"{folder} holds no config.json" + (
            ", only adapters of peft: merge_and_unload them into their model, and save_pretrained that" if adapters else
            f": give {cached[0].parent}" if cached else
            ": give a folder of save_pretrained or of a download from the hub"))
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError(f"{type(raw).__name__}, wanted fields")
        method = (raw.pop("quantization_config", None) or {"quant_method": ""}).get("quant_method", "of no method")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): copy it again") from None
    families.of(SimpleNamespace(model_type=str(raw.get("model_type"))))
    require(method in ("", "mxfp4"), f"{path}: quantization_config is {method}, wanted mxfp4 or none: load the model "
            "dequantised with transformers, and save_pretrained it")
    from transformers import AutoConfig
    try:
        return AutoConfig.for_model(**raw), method
    except Exception as error:      # its checks raise classes of their own
        raise ConfigError(f"{path}: transformers refuses it: {' '.join(str(error).split())}") from None


def account(folder: Path, family: Family, model: ModelConfig, found: dict, config) -> tuple[str, dict, list[str]]:
    """-> how the experts lie, {name of ours: its Parts}, and what is left out. CheckpointError as in read."""
    tables = {layout: family.parts(model, layout) for layout in family.layouts}
    wanted = {layout: {part.name: part for parts in table.values() for part in parts}
              for layout, table in tables.items()}
    layout = min(wanted, key=lambda layout: len(wanted[layout].keys() ^ found.keys()))
    parts = wanted[layout]

    extra = {name for name in found if name not in parts}
    more = getattr(config, "num_nextn_predict_layers", None) or 0
    beyond = tuple(f"model.layers.{model.layers + i}." for i in range(more))
    free = {"RoPE's frequencies, which the GPT computes": {n for n in extra if n.endswith("rotary_emb.inv_freq")},
            "multi-token prediction, which the GPT does not have": {n for n in extra if n.startswith(beyond)}}
    head, embeddings = (found.get(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    if model.tied and head and embeddings and {head.dtype, embeddings.dtype} <= SHORT.keys() and torch.equal(
            head.read(), embeddings.read()):
        free["the head, which is the embeddings"] = {"lm_head.weight"}
    extra -= set().union(*free.values())

    missing = [name for name in parts if name not in found]
    wrong = [f"{name} {found[name].dtype} {list(found[name].shape)} instead of {list(part.shape)} in "
             f"{', '.join(LONG)}" for name, part in parts.items() if name in found
             and (tuple(found[name].shape) != part.shape or found[name].dtype not in SHORT)]
    problems = [f"{what}: {listed(names)}" for what, names in (
        ("missing", missing), ("not known", sorted(extra)), ("of another shape or dtype", wrong)) if names]
    if problems:
        raise CheckpointError(f"{folder} does not hold the tensors of its config.json ({family.model_type}, layout "
                              f"{layout}):\n  " + "\n  ".join(problems))
    return layout, tables[layout], [f"left out: {what} ({len(names)} tensors)" for what, names in free.items() if names]


# ---- theirs -> ours --------------------------------------------------------------------------------------------------
def import_(source: Path, out: Path, *, seq_len: int = 0) -> str:
    """Make the run folder `out` of a folder of transformers -> what was done. seq_len: tokens of the run's sequences;
    0: the model's max_position_embeddings, at most SEQUENCE. Errors: ConfigError, CheckpointError, OSError."""
    with whole(out) as work:
        theirs = read(source)
        longest, origin = theirs.model.seq_len, theirs.origin
        require(0 <= seq_len <= longest, f"--seq-len is {seq_len}, but max_position_embeddings {longest}")
        seq_len = seq_len or min(longest, SEQUENCE)
        text = (source / "tokenizer.json").is_file()
        folder = out.absolute()
        config = absolute(Config(
            model=replace(theirs.model, seq_len=seq_len),
            data=DataConfig(valid="", tokenizer=str(folder / "tokenizer.json") if text else ""),
            train=TrainConfig(micro_batch=1, dtype="fp64" if "F64" in theirs.dtypes.values() else SHORT[origin.dtype],
                              sample_tokens=min(TrainConfig.sample_tokens, seq_len // 2)),
            optim=OptimConfig(lr=2e-5, min_lr=2e-6),        # these weights are no random ones
            log=LogConfig(folder=str(folder.parent), name=folder.name)))
        total = write_checkpoint(work / "ckpt", config, theirs)
        write(work, "config.toml", dumps(config).encode())
        if text:
            load_tokenizer(source / "tokenizer.json")       # ConfigError if it is none
            copy_files(source, work, ("tokenizer.json",))
        (work / "hf").mkdir()
        copy_files(source, work / "hf", ("config.json", "generation_config.json", *TOKENIZER, *LICENSE))
        (work / "hf" / "imported.json").write_text(json.dumps(
            {"layout": origin.layout, "dtype": origin.dtype, "others": origin.others}, indent=1))
    what = said_of(total, theirs.dtypes, theirs.model, origin.layout)
    said = [f"{theirs.family.model_type} of {what}, from {source}", *theirs.said]
    if seq_len < longest:
        said.append(f"model.seq_len is {seq_len} of max_position_embeddings {longest} (--seq-len)")
    if not text:
        said.append(f"no text, only tokens: {source} has no tokenizer.json (AutoTokenizer's save_pretrained "
                    "writes one)")
    return f"{out}: " + "; ".join([*said, f"go on with --weights {out}"])


def write_checkpoint(folder: Path, config: Config, theirs: Theirs) -> int:
    """step-000000 in one file, as one process saves a run that has just begun -> its parameters."""
    gpt = GPT(config.model, dtype=parameter_dtype(config), device="meta")
    named, optimizer = checkpoint.named_tensors(gpt), build_optimizer(gpt, config.optim)
    state = State(0, None, asdict(config), {}, {
        "class": checkpoint.class_of(optimizer), "movers": checkpoint.movers(gpt, optimizer),
        "states": {name: {} for name in checkpoint.moved_parameters(gpt, optimizer)}}, {})
    generator = torch.Generator().manual_seed(config.train.seed).get_state()
    entries = {f"model.{name}": x for name, x in named.items()} | {"rng.cpu": generator}

    def ours():
        with progress("import", sum(x.nbytes for x in named.values()), "bytes") as advance:
            for name, meta in named.items():
                x = torch.empty_like(meta, device="cpu", requires_grad=False)
                for part in theirs.table[name]:
                    view = part.of(x)
                    view.copy_(theirs.tensors[part.name].read().view(view.shape))
                    advance(view.nbytes)
                yield x
                del x, view     # before the next one is made
            yield generator

    work, final = checkpoint.begin(folder, "step-000000")
    snapshot.write(work / "shard-00001-model-00001-of-00001.safetensors",
                [(name, NAMES[x.dtype], tuple(x.shape)) for name, x in entries.items()], ours(), {"format": "pt"})
    checkpoint.finish(work, final, state, 0)
    return gpt.num_parameters()[0]


# ---- ours -> theirs --------------------------------------------------------------------------------------------------
def export(source: Path, out: Path, *, dtype: str = "", layout: str = "", max_shard_size: str = "5GB",
           family: str = "", like: Path | None = None) -> str:
    """Make the folder `out` of transformers of a checkpoint, or of a run's newest -> what was done.

    dtype: of LONG, with a selection bias and its router in float32 at least, as theirs keep them; "as-imported": of
    each tensor what it was; "": that, or what the checkpoint has. layout: of the experts; "": as imported, or the
    architecture's usual one. family: the architecture; "": as imported, or the first that can say the model. like:
    another folder of transformers, or an imported run, to take for RUN/hf. Errors: as import_."""
    require(dtype in ("", "as-imported", *LONG), f"--dtype is {dtype}, wanted as-imported, {', '.join(LONG)}"
            f"{did_you_mean(dtype, LONG)}")
    room, path = read_size(max_shard_size), source_of(source)
    run = path.absolute().parents[1]
    require(out.resolve() != (run / "hf").resolve(), f"--out {out} is where a run keeps what an import brought: choose "
            "another folder")
    with whole(out) as work:
        check_transformers()
        config = build(Config, checkpoint.read_state(path).config)
        require(config.model.tune.lora_rank == 0, f"{path} has adapters (model.tune.lora_rank is not 0), which belong "
                f"into the matrices first: python -m moe_ext.tune merge {source} --out FOLDER, then export that")
        gpt = GPT(config.model, dtype=parameter_dtype(config), device="meta")
        checkpoint.check_model(path, gpt)
        origin = origin_of(run, like)
        chosen = choose(config.model, family, origin)
        same = origin if origin and origin.config.model_type == chosen.model_type else None
        require(same is not None or dtype != "as-imported", f"--dtype as-imported, but {run} was not imported as "
                f"{chosen.model_type} (hf/imported.json): give another, or --like the folder that the model came from")
        layout = layout or (same.layout if same else next(iter(chosen.layouts)))
        table, found = chosen.parts(config.model, layout), files.tensors(sorted(path.glob("*.safetensors")), "model.")
        dtypes = {part.name: dtype_of(name, part, found[f"model.{name}"], dtype, same, config.model)
                  for name, parts in table.items() for part in parts}
        total = gpt.num_parameters()[0]
        size, shards = write_weights(work, found, table, dtypes, room, total)
        words, said = write_tokenizer(work, run, origin, config.model)
        write_configs(work, chosen, config.model, same, dtypes, words)
    said = [f"{chosen.model_type} of {said_of(total, dtypes, config.model, layout)}", f"{size:,} bytes in {shards} "
            f"file{'s' * (shards > 1)}, from {path}", *said, "left out: the optimizer's state"]
    return f"{out}: " + "; ".join(said)


def origin_of(run: Path, like: Path | None) -> Origin | None:
    """What is known of where a run came from. ConfigError."""
    kept = (like or run) / "hf"
    if not kept.is_dir():
        return read(like).origin if like else None
    try:
        imported = json.loads((kept / "imported.json").read_text())
        return Origin(kept, read_config(kept)[0], *(imported[name] for name in ("layout", "dtype", "others")))
    except (FileNotFoundError, LookupError, json.JSONDecodeError) as error:
        raise ConfigError(f"{kept}/imported.json: {type(error).__name__}: {error}: not as an import wrote it: give "
                          "--like the folder that the model came from") from None


def choose(model: ModelConfig, name: str, origin: Origin | None) -> Family:
    """The architecture to write. ConfigError, with what stands in the way, if there is none."""
    if name or origin:
        name = name or origin.config.model_type
        require(name in FAMILIES, f"--family is {name}, wanted one of {', '.join(FAMILIES)}"
                f"{did_you_mean(name, FAMILIES)}")
        FAMILIES[name].write(model)
        return FAMILIES[name]
    reasons = []
    for family in FAMILIES.values():
        try:
            family.write(model)
            return family
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError("no architecture of transformers has all of this model:\n  " + "\n  ".join(reasons))


def dtype_of(name: str, part: Part, ours: Stored, dtype: str, origin: Origin | None, model: ModelConfig) -> str:
    """The dtype of a tensor of theirs, as safetensors says it. name, ours: the tensor of ours that it is of."""
    bias = name.endswith(".select_bias_E")
    if dtype in LONG:
        kept = bias or (model.moe.select_bias_rate > 0 and name.endswith(".mlp.gate.weight"))
        return LONG[dtype] if not kept or dtype == "fp64" else "F32"
    if origin is None:
        return ours.dtype
    wanted = origin.others.get(part.name, origin.dtype)
    if bias:        # training moves it by less than 16 bits tell
        x = ours.read()
        return wanted if torch.equal(x.to(DTYPES[wanted]).to(x.dtype), x) else "F32"
    return wanted


def read_size(text: str) -> int:
    """"5GB" -> bytes. ConfigError."""
    number, unit = text[:-2], text[-2:].upper()
    require(unit in UNITS and re.fullmatch(r"\d+(\.\d+)?", number) is not None and float(number) > 0,
            f"--max-shard-size is {text!r}, wanted a number and {', '.join(UNITS)}, as in 5GB")
    return int(float(number) * UNITS[unit])


def write_weights(work: Path, found: dict[str, Stored], table: dict[str, list[Part]], dtypes: dict[str, str], room: int,
                  parameters: int) -> tuple[int, int]:
    """model.safetensors, or files of at most `room` bytes (or one tensor) and their index -> bytes, files."""
    shards, sizes = [[]], [0]
    for name, parts in table.items():
        for part in parts:
            size = math.prod(part.shape) * DTYPES[dtypes[part.name]].itemsize
            if shards[-1] and sizes[-1] + size > room:
                shards.append([])
                sizes.append(0)
            shards[-1].append((name, part))
            sizes[-1] += size

    def theirs(shard, advance):
        for name, group in itertools.groupby(shard, key=lambda entry: entry[0]):
            x = found[f"model.{name}"].read()
            for _, part in group:
                yield rounded(part, x, DTYPES[dtypes[part.name]])
                advance(math.prod(part.shape) * DTYPES[dtypes[part.name]].itemsize)
            del x       # before the next one is read

    where = {}
    with progress("export", sum(sizes), "bytes") as advance:
        for number, shard in enumerate(shards, start=1):
            shard.sort(key=lambda entry: -DTYPES[dtypes[entry[1].name]].itemsize)
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            snapshot.write(work / file, [(part.name, dtypes[part.name], part.shape) for _, part in shard],
                        theirs(shard, advance), {"format": "pt"})
            where |= {part.name: file for _, part in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_parameters": parameters, "total_size": sum(sizes)}, "weight_map": where}
        (work / files.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return sum(sizes), len(shards)


def rounded(part: Part, ours: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of theirs. CheckpointError where that would make a number infinite."""
    value = part.of(ours).reshape(part.shape)
    result = value.to(dtype)
    if not torch.equal(result.isinf(), value.isinf()):
        raise CheckpointError(f"{part.name} has values up to {value.abs().max():g}, beyond what {SHORT[NAMES[dtype]]} "
                              "holds: give --dtype bf16 or fp32")
    return result


def write_tokenizer(work: Path, run: Path, origin: Origin | None, model: ModelConfig) -> tuple[dict, list[str]]:
    """The run's tokenizer, for AutoTokenizer -> {"eos_token_id": id} if it is one of ours that has such a token, and
    what there is to say."""
    own = run / "tokenizer.json"
    if origin:
        theirs = origin.folder / own.name
        if not own.is_file() or (theirs.is_file() and theirs.read_bytes() == own.read_bytes()):
            copy_files(origin.folder, work, TOKENIZER)
            return {}, []
    if not own.is_file():
        return {}, ["no tokenizer: the run has none"]
    special = {token.content: number for number, token in load_tokenizer(own).get_added_tokens_decoder().items()}
    end = next((name for name in ENDS if name in special), None)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.seq_len,
             "clean_up_tokenization_spaces": False} | ({"eos_token": end} if end else {})
    copy_files(run, work, (own.name,))
    (work / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return {"eos_token_id": special[end]} if end else {}, [
        "the tokenizer is the run's, another than the imported one"] * (origin is not None)


def write_configs(work: Path, family: Family, model: ModelConfig, origin: Origin | None, dtypes: dict[str, str],
                  words: dict) -> None:
    """config.json, the imported one if it still says the model, and generation_config.json. words: of the tokenizer."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if origin is None:
        config = family.write(model)
    else:
        config = copy.deepcopy(origin.config)
        config.max_position_embeddings = longest = max(config.max_position_embeddings, model.seq_len)
        words = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")} | words
        if families.differences(model, family.read(config)):
            config = family.write(replace(model, seq_len=longest))
        if getattr(config, "num_nextn_predict_layers", None):
            config.num_nextn_predict_layers = 0
    for name, value in words.items():
        setattr(config, name, value)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]]
    config.dtype = str(DTYPES[usual(dtypes)]).removeprefix("torch.")
    config.save_pretrained(work)
    if origin is None:
        GenerationConfig(**words).save_pretrained(work)
    else:
        copy_files(origin.folder, work, ("generation_config.json", *LICENSE))


# ---- both ------------------------------------------------------------------------------------------------------------
def copy_files(folder: Path, to: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        target = to / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def usual(dtypes: dict[str, str]) -> str:
    return Counter(dtypes.values()).most_common(1)[0][0]


def said_of(parameters: int, dtypes: dict[str, str], model: ModelConfig, layout: str) -> str:
    (main, _), *others = Counter(dtypes.values()).most_common()
    others = ", ".join(f"{count} tensors in {SHORT[dtype]}" for dtype, count in others)
    said = f"{parameters:,} parameters in {SHORT[main]}" + (f" ({others})" if others else "")
    return said + (f", layout {layout}" if model.moe.experts else "")
