"""Text from a run: where it ends, which options are refused, and what a model that has diverged says."""
import json
import shutil

import pytest
import test_model
import torch
from test_train import data, main, straight  # noqa: F401
from tokenizers import Tokenizer

from moe_ext import generate
from moe_ext.evaluate import load_run
from moe_ext.generate import complete


@pytest.fixture(scope="module")
def folder(straight, tmp_path_factory):                                                     # noqa: F811
    """A run folder whose tokenizer has an end-of-text token."""
    folder = tmp_path_factory.mktemp("runs") / "debug"
    shutil.copytree(straight, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["</s>", "<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.sha256").unlink()
    return folder


def test_it_ends_at_the_end_of_the_text_unless_told_not_to(folder, monkeypatch, capsys):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fox, end, dog = (tokenizer.encode(text).ids for text in (" fox", "<|endoftext|>", " dog"))
    script = [*fox, *tokenizer.encode("</s>").ids, *end, *dog]
    for options, text, drawn in (([], "the quick fox", len(fox) + 2),
                                 (["--ignore-eos"], "the quick fox dog", len(script))):
        rest = iter(script)
        monkeypatch.setattr(generate, "pick", lambda *_, rest=rest: next(rest))
        main(monkeypatch, generate, folder, "--prompt", "the quick", "--max-tokens", len(script), *options)
        assert capsys.readouterr().out == text + "\n"
        assert len(list(rest)) == len(script) - drawn


def test_another_end_of_text(folder, tmp_path, monkeypatch):
    """Without <|endoftext|> it is the </s> of other tokenizers; an ordinary token of that spelling is none."""
    run = load_run(folder)
    for make, text in ((Tokenizer.add_special_tokens, "the"), (lambda tokenizer, names: None, "the</s>")):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        plain = Tokenizer(tokenizer.model)
        plain.pre_tokenizer, plain.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
        make(plain, ["</s>"])
        plain.save(str(tmp_path / "tokenizer.json"))
        rest = iter(plain.encode("</s>").ids)
        monkeypatch.setattr(generate, "pick", lambda *_, rest=rest: next(rest))
        assert complete(run._replace(folder=tmp_path), "the", len(plain.encode("</s>").ids)) == text


@pytest.mark.parametrize("options, words", [
    (["--max-tokens", "0"], "max_tokens is 0, wanted at least 1"),
    (["--max-tokens", "-3"], "max_tokens is -3"),
    (["--max-tokens", "32"], r"1 prompt tokens \+ 32 new ones, .* context is 32: at most 31 fit"),
    (["--temperature", "-0.5"], "temperature is -0.5, wanted 0"),
    (["--temperature", "nan"], "temperature is nan"),
    (["--top-k", "-1"], "top_k is -1, wanted 0"),
    (["--top-p", "0"], r"top_p is 0.0, wanted a share of the probability in \(0, 1\]"),
    (["--top-p", "1.5"], "top_p is 1.5"),
    (["--prompt", ""], "the prompt has no tokens"),
    (["--prompt", "fox " * 40], "the prompt has .* tokens, but the model's context is 32: give at most 31"),
])
def test_options_out_of_range(folder, monkeypatch, options, words):
    with pytest.raises(SystemExit, match=f"^error: generate: {words}"):
        main(monkeypatch, generate, folder, "--prompt", "the", "--max-tokens", "5", *options)


def test_the_smallest_temperature_takes_the_likeliest():
    logits_V = torch.tensor([1.0, 3.0, 2.0])
    assert generate.pick(logits_V, 1e-320, 0, 1.0, torch.Generator()) == 1


def test_ids_beyond_the_vocabulary(folder):
    with pytest.raises(ValueError, match="the prompt has token ids from 3 to 320, but the model's vocabulary is 320"):
        list(generate.generate(load_run(folder).model, [3, 320], 5))


@pytest.mark.parametrize("where", ["layers.0.mlp.gate", "norm"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite(folder, where, temperature):
    run = load_run(folder)
    torch.nn.init.constant_(run.model.get_submodule(where).weight, float("nan"))
    with pytest.raises(FloatingPointError, match="the model's logits are not finite: its weights have diverged"):
        complete(run, "the", 5, temperature=temperature)


def test_a_tokenizer_that_pads_and_cuts(folder, tmp_path):
    """As some files of others ask for; a text is all its tokens and no more."""
    tokenizer = generate.load_tokenizer(folder / "tokenizer.json")
    want = tokenizer.encode("the quick brown fox").ids
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert generate.load_tokenizer(tmp_path / "tokenizer.json").encode("the quick brown fox").ids == want


# ---- several prompts -------------------------------------------------------------------------------------------------

def continued(model, prompts, **options):
    """Each prompt's new tokens."""
    steps = generate.generate_all(model, prompts, 5, **options)
    return [[token for token in tokens if token is not None] for tokens in zip(*steps, strict=True)]


@pytest.mark.c_core
@pytest.mark.parametrize("name", test_model.VARIANTS)
def test_a_prompt_gets_what_it_gets_alone(name):
    """With others of other lengths and without, with a cache and without; greedy is the argmax."""
    model = test_model.make(test_model.VARIANTS[name]).eval()
    prompts = [torch.randint(61, (length,), generator=torch.Generator().manual_seed(length)).tolist()
               for length in (3, 7, 1, 7)]
    for options in (dict(temperature=0), dict(temperature=1.0, top_k=0)):
        want = [list(generate.generate(model, prompt, 5, **options)) for prompt in prompts]
        for cache in (True, False):
            assert continued(model, prompts, cache=cache, **options) == want
            assert [list(generate.generate(model, prompt, 5, cache=cache, **options)) for prompt in prompts] == want
    greedy = list(prompts[0])
    for _ in range(5):
        greedy.append(int(model.logits(torch.tensor([greedy]))[0, -1].argmax()))
    assert greedy[3:] == list(generate.generate(model, prompts[0], 5, temperature=0))


def test_each_ends_on_its_own():
    model = test_model.make(test_model.VARIANTS["qwen3_moe"]).eval()
    prompts = [[1, 2, 3], [4], [5, 6]]
    whole = continued(model, prompts, temperature=0)
    end = whole[0][2]
    cut = [text[:text.index(end)] if end in text else text for text in whole]
    assert len(cut[0]) < 5 and continued(model, prompts, temperature=0, ends=[end]) == cut
    assert list(generate.generate(model, [1, 2, 3], 5, temperature=0, ends=[end])) == cut[0]


def test_a_file_of_prompts(folder, tmp_path, monkeypatch, capsys):
    """Five prompts, in batches of train.micro_batch = 4, in their order."""
    prompts = ["the quick", "fox", "the lazy dog and runs away", "brown é", "def"]
    (tmp_path / "prompts").write_text("\n\n".join(prompts) + "\n")
    options = ["--max-tokens", 6, "--temperature", 0]
    main(monkeypatch, generate, folder, "--prompts", tmp_path / "prompts", *options)
    got = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for text, prompt in zip(got, prompts, strict=True):
        main(monkeypatch, generate, folder, "--prompt", prompt, *options)
        assert capsys.readouterr().out == text + "\n" and text.startswith(prompt) and len(text) > len(prompt)


def test_files_that_are_no_prompts(folder, tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    (tmp_path / "long").write_text("fox\n" + "fox " * 40)
    for name, words in {"nowhere": "no file of prompts .*nowhere", "empty": "empty is empty: write a prompt per line",
                        "bytes": "bytes is no UTF-8 text: ", "long": r"the prompt has .* at most 31 \(prompt 2 of 2\)",
                        }.items():
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            main(monkeypatch, generate, folder, "--prompts", tmp_path / name, "--max-tokens", 5)
