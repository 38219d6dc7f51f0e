"""Multiple choice by likelihood: `python -m moe_ext.evaluate RUN --choices FILE`, and data.choices during training.

FILE has HellaSwag's layout, one JSON object a line, of which these fields are read:
    {"activity_label": "Removing ice from car", "ctx_a": "A man scrapes the windshield.", "ctx_b": "he",
     "ctx": "A man scrapes the windshield. he", "endings": ["puts the brush away.", "eats it.", ..], "label": 0}

With activity_label, ctx_a and ctx_b the text is lm-evaluation-harness's, "activity_label: ctx_a Ctx_b", cleaned of
WikiHow's brackets, as the endings are; without them, or read `plain`, it is ctx and the endings as they stand. Context,
blank and ending are tokenised as one text; what follows the context's own tokens is the ending's. Each ending is scored
by log p(ending | context), the sum over its tokens, and the model's choice is the ending for which this is largest:
    acc         itself
    acc_norm    divided by the ending's characters, as in lm-evaluation-harness
    acc_token   divided by its tokens, as in build-nanogpt, which calls it acc_norm and reads plain
"""
from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from moe_ext.config import Config, MeshConfig, ModelConfig
from moe_ext.evaluate import not_finite
from moe_ext.model import GPT, precision
from moe_ext.parallel.mesh import Mesh


class Ending(NamedTuple):
    tokens: list[int]   # the context, its first tokens cut off if need be, and the ending
    scored: int         # how many of them are the ending's
    characters: int     # of the ending, without the blank before it


class Question(NamedTuple):
    endings: list[Ending]
    label: int          # which of them is right


# ---- the file --------------------------------------------------------------------------------------------------------
def read(path: str | Path, tokenizer, config: ModelConfig, plain: bool = False) -> list[Question]:
    """The questions of a file. tokenizer: of the `tokenizers` library; it adds no special tokens, and takes none for
    more than its characters. A context that does not fit into config.seq_len loses its first tokens, with each ending
    as many as that needs. Errors: FileNotFoundError; ValueError, which names the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of questions {path}: give one in HellaSwag's layout, such as "
                                "hellaswag_val.jsonl")
    found = []      # line, context, blank, endings, label
    for line, data in enumerate(path.read_bytes().split(b"\n"), start=1):
        if data.strip():
            try:
                found.append((line, *question(json.loads(data), plain)))
            except (ValueError, RecursionError) as error:       # JSON's and UTF-8's too
                raise ValueError(f"{path}: line {line}: {error}") from None
    if not found:
        raise ValueError(f"{path}: got no question, wanted one JSON object a line, in HellaSwag's layout")

    tokenizer.encode_special_tokens = True
    texts = [text for _, context, blank, endings, _ in found
             for text in (context, *(context + blank + ending for ending in endings))]
    encoded = iter(encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    questions = []
    for line, _, _, endings, label in found:
        context, rows = next(encoded), []
        for number, ending in enumerate(endings):
            ids = next(encoded)
            same = [a == b for a, b in zip(context, ids, strict=False)]
            begin = same.index(False) if False in same else len(same)
            scored = len(ids) - begin
            for wrong, problem in (
                    (begin == 0, "the context has no token of its own"),
                    (scored == 0, f"ending {number} has no token of its own"),
                    (scored > config.seq_len, f"ending {number} has {scored} tokens, but model.seq_len is "
                     f"{config.seq_len}: take the question out"),
                    (max(ids, default=0) >= config.vocab_size, f"got token id {max(ids, default=0)}, wanted ids below "
                     f"model.vocab_size {config.vocab_size}: give the tokenizer that made the training tokens")):
                if wrong:
                    raise ValueError(f"{path}: line {line}: {problem}")
            rows.append(Ending(ids[-config.seq_len - 1:], scored, len(ending)))
        questions.append(Question(rows, label))
    return questions


def question(record, plain: bool) -> tuple[str, str, list[str], int]:
    """A line of the file -> context, the blank after it, endings, label. ValueError for what is no question."""
    def wanted(ok, what):
        if not ok:
            raise ValueError(f"got {json.dumps(record)[:100]}, wanted {what}")

    wanted(isinstance(record, dict), "an object in HellaSwag's layout")
    endings, label = record.get("endings"), record.get("label")
    wanted(isinstance(endings, list) and len(endings) > 1 and all(isinstance(ending, str) for ending in endings),
           'a list of two or more texts as "endings"')
    raw = [record.get(name) for name in ("activity_label", "ctx_a", "ctx_b")]
    if not plain and all(isinstance(text, str) for text in raw):
        activity, before, last = raw
        context, endings = clean(f"{activity}: {before} {last.capitalize()}"), [clean(ending) for ending in endings]
    else:
        context = record.get("ctx")
        wanted(isinstance(context, str), 'a text as "ctx"')
    wanted(context.strip(), "a context")
    wanted(all(ending.strip() for ending in endings), "endings that are not empty")
    known = isinstance(label, (int, str)) and str(label) in map(str, range(len(endings)))
    wanted(known, f'a "label" from 0 to {len(endings) - 1} (files without answers cannot be scored)')
    "".join((context, *endings)).encode()       # half a surrogate pair is legal JSON, but no text
    text = context.rstrip()
    return text, context[len(text):] + " ", endings, int(label)


def clean(text: str) -> str:
    """Without the brackets that WikiHow has left in HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


# ---- the score -------------------------------------------------------------------------------------------------------
def score(model: GPT, config: Config, questions: list[Question], mesh: Mesh | None = None) -> dict[str, float]:
    """-> {"questions", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "acc_token", "acc_token_stderr"}, all of the
    questions; of equal endings the first is chosen. A standard error is that of a mean, NaN for one question.

    mesh: of a model that lies on one; every rank calls and gets the same. FloatingPointError for logits that are not
    finite.
    """
    log_p = iter(log_likelihoods(model, config, [ending for q in questions for ending in q.endings], mesh).tolist())
    right = {"acc": 0, "acc_norm": 0, "acc_token": 0}
    for endings, label in questions:
        sums = [next(log_p) for _ in endings]
        for name, sizes in (("acc", [1] * len(endings)), ("acc_norm", [ending.characters for ending in endings]),
                            ("acc_token", [ending.scored for ending in endings])):
            means = [total / size for total, size in zip(sums, sizes, strict=True)]
            right[name] += means.index(max(means)) == label
    n, scores = len(questions), {"questions": len(questions)}
    for name, count in right.items():
        scores |= {name: count / n,
                   f"{name}_stderr": math.sqrt(count / n * (1 - count / n) / (n - 1)) if n > 1 else math.nan}
    return scores


@torch.no_grad()
def log_likelihoods(model: GPT, config: Config, endings: list[Ending], mesh: Mesh | None = None) -> torch.Tensor:
    """log p of each ending, fp64, in nats. Endings of like length share a micro-batch, of at most train.micro_batch *
    model.seq_len tokens and pads; the data-parallel ranks share the endings."""
    device, config_mesh = next(model.parameters()).device, mesh.config if mesh else MeshConfig()
    dp, tp, shared = config_mesh.dp, config_mesh.tp, config_mesh.sequence
    by_length = sorted(range(len(endings)), key=lambda i: -len(endings[i].tokens))
    training, log_p, bad_L = model.training, torch.zeros(len(endings), dtype=torch.float64, device=device), 0
    model.eval()
    while by_length:
        length = math.ceil((len(endings[by_length[0]].tokens) - 1) / shared) * shared
        most = dp * (config.train.micro_batch * config.model.seq_len // length)
        batch, by_length = by_length[:most], by_length[most:]
        rows = math.ceil(len(batch) / dp)       # on every rank; the last may have rows of pads alone
        mine = batch[rows * mesh.dp_rank:][:rows] if mesh else batch
        tokens_BS = torch.zeros(rows, length, dtype=torch.long)
        targets_BS, mask_BS = torch.full_like(tokens_BS, -100), torch.zeros_like(tokens_BS, dtype=torch.bool)
        for row, ending in enumerate(endings[i] for i in mine):
            ids, end = torch.tensor(ending.tokens), len(ending.tokens) - 1
            tokens_BS[row, :end], mask_BS[row, :end] = ids[:-1], True
            targets_BS[row, end - ending.scored:end] = ids[1:][-ending.scored:]
        with precision(config, device), each_row(model.lm_head, rows):
            out = model(tokens_BS.to(device), targets_BS.to(device), token_mask=mask_BS.to(device))
        if model.lm_head is not None:
            log_p[mine] = -out.token_loss[:len(mine)].double()
        bad_L = bad_L + out.bad_L
    model.train(training)
    if mesh:
        log_p, bad_L = mesh.sum(log_p / tp, bad_L)
    if problem := not_finite(config.model, bad_L, {"the log-likelihood of the endings": log_p.sum().item()}):
        raise FloatingPointError(problem)
    return log_p


@contextmanager
def each_row(head, rows: int):
    """Inside, the loss is one number per row of the batch, and the head works for the targets alone. head: None where
    another stage has it."""
    if head is None:
        yield
        return
    cross_entropy = head.cross_entropy

    def by_row(x_TD, w_VD, targets_T):
        kept = [(x[targets != -100], targets[targets != -100])
                for x, targets in zip(x_TD.chunk(rows), targets_T.chunk(rows), strict=True)]
        return torch.stack([cross_entropy(x, w_VD, targets) for x, targets in kept])

    head.cross_entropy = by_row
    try:
        yield
    finally:
        head.cross_entropy = cross_entropy
