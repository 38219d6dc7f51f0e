"""What would end a run hours later and can be known before step 1: `preflight(config)`.

Every rank calls it at the start of a run, and --dry-run after it has printed the plan. It looks at every token of the
data, at the tokenizer and whether all tokens are of it, at the questions, at the sample's prompt and its room in the
context, and at the run folder: whether it can be written and has room for the checkpoints. It leaves nothing behind.
What is wrong is raised as ConfigError, or as the FileNotFoundError or ValueError of a data file, in a sentence that
says what to type.
"""
from __future__ import annotations

import math
import shutil
import tempfile

from moe_ext import checkpoint, choices, generate, plan
from moe_ext.config import Config, ConfigError, named_sets, require
from moe_ext.data import Blend, IndexedDataset, Loader, open_data
from moe_ext.model import GPT, pick_device
from moe_ext.run import check_tokenizer, loader_options

CHUNK = 2**24       # tokens looked at in one piece


def preflight(config: Config, rank: int = 0,
              ranks: int = 1) -> tuple[IndexedDataset | Blend, IndexedDataset | Blend | None]:
    """-> the training and the held-out tokens (None without data.valid and data.split). Of these each of the `ranks`
    looks through its own share; rank 0 alone looks at the rest."""
    t, device = config.train, pick_device(config)
    require(not t.memory_snapshot or device.type == "cuda", f"train.memory_snapshot records CUDA allocations, but "
            f"train.device is {device.type}: leave it off; profile/ops.txt shows what each op allocates")
    train, valid, _ = open_data(config.data.train, config.data.valid, config.data.split)
    require(valid or not t.keep_best, f"train.keep_best keeps the checkpoint of the best evaluation, but data.split "
            f"{config.data.split} holds nothing out: give it a second share or leave it off")
    for data in filter(None, (train, valid, *(open_data(text).train
                                              for text in named_sets(config.data.eval_sets).values()))):
        Loader(data, seq_len=config.model.seq_len, batch_size=1, **loader_options(config))  # long enough
        for _, dataset in data.parts:
            check_tokens(dataset, config.model.vocab_size, rank, ranks)
    if rank == 0:
        if config.log.wandb:
            check_wandb()
        if config.data.tokenizer:
            check_text(config)
        check_tokenizer(config)
        if config.data.choices:
            choices.read(config.data.choices, generate.load_tokenizer(config.data.tokenizer), config.model)
        check_folder(config)
    return train, valid


def check_tokens(dataset: IndexedDataset, vocab_size: int, part: int, parts: int) -> None:
    """ConfigError if any id in this part of the file is not below vocab_size."""
    begin, end = (len(dataset.tokens) * i // parts for i in (part, part + 1))
    for at in range(begin, end, CHUNK):
        piece = dataset.tokens[at:min(at + CHUNK, end)]
        low, high = int(piece.min()), int(piece.max())
        require(0 <= low <= high < vocab_size, f"{dataset.path}: got token ids from {low} to {high}, wanted ids below "
                f"model.vocab_size {vocab_size}: set --model.vocab-size to that of the tokenizer that made this file, "
                "or prepare the data again")


def check_text(config: Config) -> None:
    """The tokenizer and, if there will be a sample, its prompt."""
    path, vocab_size, t = config.data.tokenizer, config.model.vocab_size, config.train
    tokenizer = generate.load_tokenizer(path)
    ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    require(ids <= vocab_size, f"{path} has {ids} token ids, but model.vocab_size is {vocab_size}: set "
            f"--model.vocab-size {ids}, or give the tokenizer that made the data")
    if t.sample_tokens:
        try:
            generate.check_prompt(tokenizer.encode(t.sample_prompt).ids, t.sample_tokens, config.model)
        except ValueError as error:
            raise ConfigError(f"the sample at the end of the run: {error}; see --train.sample-prompt and "
                              "--train.sample-tokens (0: no sample)") from None


def check_wandb() -> None:
    """ConfigError unless the package is there; a folder of that name, as it leaves behind, is not."""
    try:
        import wandb
        found = hasattr(wandb, "init")
    except ImportError:
        found = False
    require(found, "log.wandb sends the numbers to Weights & Biases, which needs its package: pip install wandb, or "
            "leave log.wandb empty")


def check_folder(config: Config) -> None:
    """The run folder, or where it will be made: a file can be written there, and the checkpoints have room."""
    t, folder = config.train, config.run_folder
    for wanted in (folder, folder / "ckpt"):
        place = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=place) as probe:
                probe.write(bytes(4096))
        except OSError as error:
            raise ConfigError(f"the run folder {folder} cannot be written: {place}: {error.strerror}: mend that or "
                              "choose another --log.folder") from None
    size = plan.checkpoint_size(config, GPT(config.model, device="meta").num_parameters()[0])
    saves = math.ceil(t.steps / (t.save_every or t.steps))
    held = min(t.keep_last + 1, saves) + t.keep_best if t.keep_last else 1     # 0 keeps all, unless they are moved away
    needed = size * max(1, held - len(checkpoint.whole(folder / "ckpt")))
    free = shutil.disk_usage(place).free
    require(free >= needed, f"{place} has {plan.mib(free)} free, but a checkpoint takes {plan.mib(size)} and "
            f"{held} will be there at a time: free some, lower --train.keep-last, or choose another --log.folder")
