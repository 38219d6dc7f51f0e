"""Text from a run: `python -m moe_ext.generate RUN_DIR --prompt "def main" [--max-tokens 200 --temperature 0.8 ...]`.

Each token is drawn from softmax(logits / temperature) cut to the top_k largest and to the smallest set that holds top_p
of the probability; temperature 0 takes the largest. The text ends before a token that ends texts, unless --ignore-eos
draws on: those that an imported model's generation_config.json names, or else the tokenizer's. Keys and values of
earlier tokens are cached. `--prompts FILE` continues many, several at a time, each as if it were alone.
"""
from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import tyro

from moe_ext.config import ConfigError, ModelConfig, require
from moe_ext.data.tokenise import ENDS
from moe_ext.evaluate import Run, load_run
from moe_ext.model import GPT, KVCache, precision
from moe_ext.replay import Tape
from moe_ext.run import same_tokenizer


def pick(logits_V, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token id. top_k 0 and top_p 1 cut nothing; the likeliest token always stays. FloatingPointError for logits
    that are not finite."""
    if not logits_V.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights have diverged, or the activations "
                                 "overflow; use an earlier checkpoint")
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.double().cpu()
    p, ids = ((logits_V - logits_V.max()) / temperature).softmax(-1).sort(descending=True, stable=True)
    p[top_k or len(p):] = 0
    p[1:][p.cumsum(-1)[:-1] >= top_p] = 0       # those before it hold top_p already
    return int(ids[torch.multinomial(p, 1, generator=generator)])


def check_prompt(prompt: list[int], max_tokens: int, config: ModelConfig) -> None:
    """ValueError unless prompt and max_tokens more tokens fit into the model's vocabulary and context."""
    if not prompt:
        raise ValueError("generate: the prompt has no tokens: give at least one")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise ValueError(f"generate: the prompt has token ids from {min(prompt)} to {max(prompt)}, but the model's "
                         f"vocabulary is {config.vocab_size}: use the tokenizer that made its data")
    room = config.seq_len - len(prompt)
    if room < 1:
        raise ValueError(f"generate: the prompt has {len(prompt)} tokens, but the model's context is {config.seq_len}: "
                         f"give at most {config.seq_len - 1}")
    if max_tokens > room:
        raise ValueError(f"generate: {len(prompt)} prompt tokens + {max_tokens} new ones, but the model's context is "
                         f"{config.seq_len}: at most {room} fit")


def generate(model: GPT, prompt: list[int], max_tokens: int, **options) -> Iterator[int]:
    """Yields token ids that continue `prompt`: max_tokens, or those before the first that ends it. Options and errors
    as in generate_all."""
    for tokens in generate_all(model, [prompt], max_tokens, **options):
        yield tokens[0]


@torch.no_grad()
def generate_all(model: GPT, prompts: list[list[int]], max_tokens: int, *, temperature=0.8, top_k=50, top_p=1.0, seed=0,
                 cache=True, ends: Collection[int] = (), tape: Tape | None = None) -> Iterator[list[int | None]]:
    """Yields the next token id of each of the prompts, None from its first of `ends` on; max_tokens times, or until all
    have ended. A prompt gets what it gets alone: its draws are those of `seed`, and pads before it make the lengths
    equal. cache=False runs the whole text again for each token and gives the same. tape: takes down the experts of all
    tokens, pads in front, but of the last, which runs through no layer. Errors: ValueError if a prompt and its
    continuation do not fit into the model's context or an option is out of range; FloatingPointError."""
    for prompt in prompts:
        check_prompt(prompt, max_tokens, model.config)
    for name, value, ok, wanted in (
            ("max_tokens", max_tokens, max_tokens > 0, "at least 1"),
            ("temperature", temperature, 0 <= temperature < math.inf, "0 (the likeliest token) or a positive number"),
            ("top_k", top_k, top_k >= 0, "0 (all tokens) or a positive number"),
            ("top_p", top_p, 0 < top_p <= 1, "a share of the probability in (0, 1]; 1 cuts nothing")):
        if not ok:
            raise ValueError(f"generate: {name} is {value}, wanted {wanted}")
    device, longest = model.norm.weight.device, max(map(len, prompts))
    text_BS = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    pads_B1 = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
    padded, kept = bool(pads_B1.any()), KVCache(model.config) if cache else None
    generators, ended = [torch.Generator().manual_seed(seed) for _ in prompts], [False] * len(prompts)
    new_BS = text_BS
    for _ in range(max_tokens):
        mask_BS = None      # the cache knows the pads; what is new is real
        if padded and new_BS.shape[1] >= longest:
            mask_BS = torch.arange(new_BS.shape[1], device=device) >= pads_B1
        x_BSD, _ = model.hidden(new_BS, cache=kept, token_mask=mask_BS, tape=tape)
        logits_BV = model.lm_head(x_BSD[:, -1]).cpu()       # of the last token alone: a text's logits are large
        picked = [0 if done else pick(logits_V, temperature, top_k, top_p, generator)
                  for done, logits_V, generator in zip(ended, logits_BV, generators, strict=True)]
        ended = [done or token in ends for done, token in zip(ended, picked, strict=True)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, picked, strict=True)]
        new_BS = torch.tensor(picked, device=device)[:, None]
        if not cache:
            new_BS = text_BS = torch.cat([text_BS, new_BS], dim=1)


def load_tokenizer(path: str | Path):
    """A file of the `tokenizers` library, without the padding and truncation that it may ask for. ConfigError if it is
    missing or is not one."""
    from tokenizers import Tokenizer
    require(Path(path).is_file(), f"no tokenizer {path}: give --data.tokenizer the file that made the data, or \"\" to "
            "sample no text")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises nothing narrower
        raise ConfigError(f"{path} is no tokenizer of the `tokenizers` library: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def end_ids(folder: Path, tokenizer) -> list[int]:
    """The tokens before which a text of this run ends: eos_token_id, one or several, of an imported model's
    generation_config.json or, if that has none, of its config.json; else the tokenizer's first of ENDS. ConfigError."""
    for path in (folder / "hf" / "generation_config.json", folder / "hf" / "config.json"):
        if path.is_file():
            try:
                ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise ConfigError(f"{path} holds no fields in JSON: {error}: mend or delete it") from None
            ids = ids if isinstance(ids, list) or ids is None else [ids]
            require(ids is None or all(type(i) is int for i in ids), f"{path}: eos_token_id is {ids!r}, wanted a token "
                    "id or a list of them: mend or delete it")
            if ids is not None:
                return ids
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    return [special[name] for name in ENDS if name in special][:1]


def complete(run: Run, prompt: str, max_tokens: int, **options) -> str:
    """Prompt and continuation as text; options as in complete_all."""
    return complete_all(run, [prompt], max_tokens, **options)[0]


def complete_all(run: Run, prompts: list[str], max_tokens: int, *, ignore_eos: bool = False, **options) -> list[str]:
    """Each prompt with its continuation as text, to the end-of-text token unless ignore_eos; other options as in
    generate_all, which runs train.micro_batch of them at a time, the longest first."""
    path = run.folder / "tokenizer.json"
    require(path.is_file(), f"no {path}: the run was trained without data.tokenizer, so it cannot read or write text")
    same_tokenizer(run.folder, path)
    tokenizer = load_tokenizer(path)
    ends = [] if ignore_eos else end_ids(run.folder, tokenizer)
    texts = [tokenizer.encode(prompt).ids for prompt in prompts]
    for number, tokens in enumerate(texts, start=1):
        try:
            check_prompt(tokens, max_tokens, run.config.model)
        except ValueError as error:
            raise ValueError(f"{error} (prompt {number} of {len(texts)})" if len(texts) > 1 else str(error)) from None
    by_length = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    with precision(run.config, run.model.norm.weight.device):
        for begin in range(0, len(texts), run.config.train.micro_batch):
            batch = by_length[begin:begin + run.config.train.micro_batch]
            for tokens in generate_all(run.model, [texts[i] for i in batch], max_tokens, ends=ends, **options):
                for i, token in zip(batch, tokens, strict=True):
                    texts[i] += [] if token is None else [token]
    return tokenizer.decode_batch(texts)


def read_prompts(path: Path) -> list[str]:
    """A prompt per line; empty lines are none. ConfigError."""
    require(path.is_file(), f"no file of prompts {path}: give a text file with a prompt per line")
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise ConfigError(f"{path} is no UTF-8 text: {error}") from None
    require(len(prompts) > 0, f"{path} is empty: write a prompt per line")
    return prompts


def main() -> None:
    def command(run: tyro.conf.Positional[Path], /, prompt: str = "def ", prompts: Path | None = None,
                max_tokens: int = 100, temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0, seed: int = 0,
                cache: bool = True, ignore_eos: bool = False, checkpoint: Path | None = None) -> None:
        """Text from a run.

        Args:
            run: the run folder
            prompt: text to continue
            prompts: a file of them, one per line, in its stead; the texts are printed as JSON strings, one per line
            max_tokens: new tokens
            temperature: divides the logits; 0 takes the likeliest token
            top_k: keep this many of the likeliest tokens; 0 keeps all
            top_p: keep the likeliest tokens that hold this share of the probability
            seed: of the draws
            cache: keep keys and values of earlier tokens
            ignore_eos: go on beyond the end-of-text token
            checkpoint: folder of one checkpoint, or best; the newest of the run if not given
        """
        many = read_prompts(prompts) if prompts else [prompt]
        for text in complete_all(load_run(run, checkpoint), many, max_tokens, temperature=temperature, top_k=top_k,
                                 top_p=top_p, seed=seed, cache=cache, ignore_eos=ignore_eos):
            print(json.dumps(text, ensure_ascii=False) if prompts else text)

    try:
        tyro.cli(command, prog="python -m moe_ext.generate")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
