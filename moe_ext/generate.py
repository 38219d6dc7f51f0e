"""Text from a run: `python -m moe_ext.generate RUN_DIR --prompt "def main" [--max-tokens 200 --temperature 0.8 ...]`.

Each token is drawn from softmax(logits / temperature) cut to the top_k largest and to the smallest set that holds top_p
of the probability; temperature 0 takes the largest. The text ends before the tokenizer's end-of-text token, unless
--ignore-eos draws on. Keys and values of earlier tokens are cached.
"""
from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro

from moe_ext.config import ConfigError, ModelConfig, require
from moe_ext.evaluate import Run, load_run
from moe_ext.model import GPT, KVCache, precision
from moe_ext.run import same_tokenizer

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")    # end-of-text tokens; the first is moe_ext.data's


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


@torch.no_grad()
def generate(model: GPT, prompt: list[int], max_tokens: int, *, temperature=0.8, top_k=50, top_p=1.0, seed=0,
             cache=True, end: int | None = None) -> Iterator[int]:
    """Yields token ids that continue `prompt`: max_tokens, or those before the first that is `end`. cache=False runs
    the whole text again for each token and gives the same. Errors: ValueError if prompt and continuation do not fit
    into the model's context or an option is out of range; FloatingPointError."""
    check_prompt(prompt, max_tokens, model.config)
    for name, value, ok, wanted in (
            ("max_tokens", max_tokens, max_tokens > 0, "at least 1"),
            ("temperature", temperature, 0 <= temperature < math.inf, "0 (the likeliest token) or a positive number"),
            ("top_k", top_k, top_k >= 0, "0 (all tokens) or a positive number"),
            ("top_p", top_p, 0 < top_p <= 1, "a share of the probability in (0, 1]; 1 cuts nothing")):
        if not ok:
            raise ValueError(f"generate: {name} is {value}, wanted {wanted}")
    device = model.norm.weight.device
    generator, kept = torch.Generator().manual_seed(seed), KVCache(model.config) if cache else None
    text = new = list(prompt)
    for _ in range(max_tokens):
        logits_BSV = model.logits(torch.tensor([new if cache else text], device=device), kept)
        new = [pick(logits_BSV[0, -1], temperature, top_k, top_p, generator)]
        if new[0] == end:
            return
        text = text + new
        yield new[0]


def load_tokenizer(path: str | Path):
    """A file of the `tokenizers` library. ConfigError if it is missing or is not one."""
    from tokenizers import Tokenizer
    require(Path(path).is_file(), f"no tokenizer {path}: give --data.tokenizer the file that made the data, or \"\" to "
            "sample no text")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises nothing narrower
        raise ConfigError(f"{path} is no tokenizer of the `tokenizers` library: {error}") from None


def complete(run: Run, prompt: str, max_tokens: int, *, ignore_eos: bool = False, **options) -> str:
    """Prompt and continuation as text, to the end-of-text token unless ignore_eos; other options as in `generate`."""
    path = run.folder / "tokenizer.json"
    require(path.is_file(), f"no {path}: the run was trained without data.tokenizer, so it cannot read or write text")
    same_tokenizer(run.folder, path)
    tokenizer = load_tokenizer(path)
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    end = None if ignore_eos else next((special[name] for name in ENDS if name in special), None)
    tokens = tokenizer.encode(prompt).ids
    with precision(run.config, run.model.norm.weight.device):
        tokens = tokens + list(generate(run.model, tokens, max_tokens, end=end, **options))
    return tokenizer.decode(tokens)


def main() -> None:
    def command(run: tyro.conf.Positional[Path], /, prompt: str = "def ", max_tokens: int = 100,
                temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0, seed: int = 0, cache: bool = True,
                ignore_eos: bool = False, checkpoint: Path | None = None) -> None:
        """Text from a run.

        Args:
            run: the run folder
            prompt: text to continue
            max_tokens: new tokens
            temperature: divides the logits; 0 takes the likeliest token
            top_k: keep this many of the likeliest tokens; 0 keeps all
            top_p: keep the likeliest tokens that hold this share of the probability
            seed: of the draws
            cache: keep keys and values of earlier tokens
            ignore_eos: go on beyond the end-of-text token
            checkpoint: folder of one checkpoint, or best; the newest of the run if not given
        """
        print(complete(load_run(run, checkpoint), prompt, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                       seed=seed, cache=cache, ignore_eos=ignore_eos))

    try:
        tyro.cli(command, prog="python -m moe_ext.generate")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
