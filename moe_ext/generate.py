"""Text from a run: `python -m moe_ext.generate RUN_DIR --prompt "def main" [--max-tokens 200 --temperature 0.8 ...]`.

Each token is drawn from softmax(logits / temperature) cut to the top_k largest and to the smallest set that holds top_p
of the probability; temperature 0 takes the largest. Keys and values of earlier tokens are cached.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro

from moe_ext.checkpoint import CheckpointError
from moe_ext.config import ConfigError, require
from moe_ext.evaluate import Run, load_run
from moe_ext.model import GPT, KVCache, precision


def pick(logits_V, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token id. top_k 0 and top_p 1 cut nothing; the likeliest token always stays."""
    if temperature == 0:
        return int(logits_V.argmax())
    p, ids = (logits_V.double().cpu() / temperature).softmax(-1).sort(descending=True, stable=True)
    p[top_k or len(p):] = 0
    p[1:][p.cumsum(-1)[:-1] >= top_p] = 0       # those before it hold top_p already
    return int(ids[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def generate(model: GPT, prompt: list[int], max_tokens: int, *, temperature=0.8, top_k=50, top_p=1.0, seed=0,
             cache=True) -> Iterator[int]:
    """Yields max_tokens token ids that continue `prompt`. cache=False runs the whole text again for each token and
    gives the same. ValueError if prompt and continuation do not fit into the model's context."""
    if not prompt:
        raise ValueError("generate: the prompt has no tokens: give at least one")
    if len(prompt) + max_tokens > model.config.seq_len:
        raise ValueError(f"generate: {len(prompt)} prompt tokens + {max_tokens} new ones, but the model's context is "
                         f"{model.config.seq_len}: at most {model.config.seq_len - len(prompt)} fit")
    device = model.norm.weight.device
    generator, kept = torch.Generator().manual_seed(seed), KVCache(model.config) if cache else None
    text = new = list(prompt)
    for _ in range(max_tokens):
        logits_BSV = model.logits(torch.tensor([new if cache else text], device=device), kept)
        new = [pick(logits_BSV[0, -1], temperature, top_k, top_p, generator)]
        text = text + new
        yield new[0]


def complete(run: Run, prompt: str, max_tokens: int, **options) -> str:
    """Prompt and continuation as text; options as in `generate`."""
    from tokenizers import Tokenizer
    path = run.folder / "tokenizer.json"
    require(path.is_file(), f"no {path}: the run was trained without data.tokenizer, so it cannot read or write text")
    tokenizer = Tokenizer.from_file(str(path))
    tokens = tokenizer.encode(prompt).ids
    with precision(run.config, run.model.norm.weight.device):
        tokens = tokens + list(generate(run.model, tokens, max_tokens, **options))
    return tokenizer.decode(tokens)


def main() -> None:
    def command(run: tyro.conf.Positional[Path], /, prompt: str = "def ", max_tokens: int = 100,
                temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0, seed: int = 0, cache: bool = True,
                checkpoint: Path | None = None) -> None:
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
            checkpoint: folder of one checkpoint; the newest of the run if not given
        """
        print(complete(load_run(run, checkpoint), prompt, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                       seed=seed, cache=cache))

    tyro.cli(command, prog="python -m moe_ext.generate")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, CheckpointError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
