"""Multiple choice: the file's text and tokens, each ending's likelihood beside a plain loop over one at a time, the
scores, on every mesh, in a run and as a command, and what is no question."""
import dataclasses
import json
import math

import pytest
import torch
from ranks import run_ranks
from test_model import VARIANTS, make
from test_train import data, flags, main, records, straight  # noqa: F401
from test_train_mesh import MESHES, fit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import moe_ext.train
from moe_ext import choices, evaluate
from moe_ext.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig, load, parse
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import build

RAW = {"ind": 24, "activity_label": "Roof removal", "ctx_a": "A man sits on the roof.", "ctx_b": "he",
       "ctx": "A man sits on the roof. he", "split": "val", "split_type": "indomain",
       "endings": ["is wrapping  a pair [step] of skis.", "runs away.", "jumps over the lazy dog.", "is brown."],
       "label": 3, "source_id": "activitynet~v_-JhWjGDPHMY"}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def quiz(number, seed=0):
    """Questions of 3 to 60 words of context and 1 to 8 of each ending."""
    words, generator = "the quick brown fox jumps over lazy dog and runs away".split(), torch.Generator()
    generator.manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist())
    return [{"ctx": draw(3, 60), "endings": [draw(1, 9) for _ in range(4)], "label": i % 4} for i in range(number)]


@pytest.fixture
def tokenizer(data):                                                                        # noqa: F811
    return Tokenizer.from_file(str(data / "tokenizer.json"))


CONTEXT = ModelConfig(vocab_size=320, seq_len=512)


# ---- the file --------------------------------------------------------------------------------------------------------

def text_of(tokenizer, ending):
    """-> context and ending of the tokens that the model sees."""
    return [tokenizer.decode(part) for part in (ending.tokens[:-ending.scored], ending.tokens[-ending.scored:])]


def test_the_text_of_lm_evaluation_harness(tokenizer, tmp_path):
    wikihow = RAW | {"activity_label": " How to sit", "ctx_a": "[header] Sit [title] Find a seat.  [step] Sit",
                     "ctx_b": "", "label": "2"}
    first, second = choices.read(write(tmp_path / "q.jsonl", RAW, "", wikihow), tokenizer, CONTEXT)
    assert (first.label, second.label) == (3, 2)
    assert [text_of(tokenizer, ending) for ending in first.endings] == [
        ["Roof removal: A man sits on the roof. He", text] for text in (
            " is wrapping a pair of skis.", " runs away.", " jumps over the lazy dog.", " is brown.")]
    assert [ending.characters for ending in first.endings] == [27, 10, 24, 9]
    assert text_of(tokenizer, second.endings[1])[0] == "How to sit: Sit. Find a seat.  Sit"


def test_plain_text(tokenizer, tmp_path):
    """As build-nanogpt reads it: the tokens of ctx, then those of a blank and the ending."""
    file = write(tmp_path / "q.jsonl", RAW)
    (question,) = choices.read(file, tokenizer, CONTEXT, plain=True)
    for ending, text in zip(question.endings, RAW["endings"], strict=True):
        context, tokens = tokenizer.encode(RAW["ctx"]).ids, tokenizer.encode(" " + text).ids
        assert ending == (context + tokens, len(tokens), len(text))
    bare = {name: RAW[name] for name in ("ctx", "endings", "label")}
    assert choices.read(write(file, bare), tokenizer, CONTEXT) == [question]


def test_blanks_behind_the_context_are_the_endings(tokenizer, tmp_path):
    file = write(tmp_path / "q.jsonl", {"ctx": "the fox  ", "endings": ["jumps", "runs"], "label": 0})
    (question,) = choices.read(file, tokenizer, CONTEXT)
    assert text_of(tokenizer, question.endings[0]) == ["the fox", "   jumps"] and question.endings[0].characters == 5


def test_a_token_across_the_boundary_is_the_endings(tmp_path):
    """Without a split between words, "a b" may be one token: context and ending are what the model learnt, whole."""
    whole = Tokenizer(models.BPE())
    whole.decoder = decoders.ByteLevel()
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.train_from_iterator(["xa b"] * 9, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, limit_alphabet=256))
    file = write(tmp_path / "q.jsonl", {"ctx": "yyxa", "endings": ["b", "c"], "label": 0})
    (question,) = choices.read(file, whole, CONTEXT)
    assert text_of(whole, question.endings[0]) == ["yy", "xa b"] and question.endings[0].scored == 1
    assert question.endings[0].tokens == whole.encode("yyxa b").ids
    assert text_of(whole, question.endings[1]) == ["yy", "xa c"] and question.endings[1].scored == 2


def test_a_long_context_is_cut_from_the_left(tokenizer, tmp_path):
    file = write(tmp_path / "q.jsonl", RAW)
    (whole,), (cut,) = (choices.read(file, tokenizer, dataclasses.replace(CONTEXT, seq_len=n)) for n in (512, 28))
    for long, short in zip(whole.endings, cut.endings, strict=True):
        assert len(long.tokens) > 29 and short == long._replace(tokens=long.tokens[-29:])
    longest = max(ending.scored for ending in whole.endings)
    choices.read(file, tokenizer, dataclasses.replace(CONTEXT, seq_len=longest))
    with pytest.raises(ValueError, match=rf"ending \d has {longest} tokens, but model.seq_len is {longest - 1}:"):
        choices.read(file, tokenizer, dataclasses.replace(CONTEXT, seq_len=longest - 1))


def test_no_special_tokens(tokenizer, tmp_path):
    tokenizer.add_special_tokens(["<|endoftext|>"])
    file = write(tmp_path / "q.jsonl", {"ctx": "a <|endoftext|>", "endings": ["b", "<|endoftext|>"], "label": 0})
    (question,) = choices.read(file, tokenizer, CONTEXT)
    assert max(map(max, (ending.tokens for ending in question.endings))) < 320
    assert text_of(tokenizer, question.endings[1]) == ["a <|endoftext|>", " <|endoftext|>"]


GOOD = {"ctx": "the fox", "endings": ["a", "b"], "label": 0}
BROKEN = {
    "cut JSON": ('{"ctx": "the', "line 2: .*Unterminated string"),
    "deep JSON": ("[" * 10**5, "line 2: maximum recursion depth exceeded"),
    "a list": ("[1]", r"line 2: got \[1\], wanted an object in HellaSwag's layout"),
    "no endings": (GOOD | {"endings": None}, 'line 2: .* wanted a list of two or more texts as "endings"'),
    "one ending": (GOOD | {"endings": ["a"]}, "line 2: .* wanted a list of two or more texts"),
    "numbers": (GOOD | {"endings": ["a", 3]}, "line 2: .* wanted a list of two or more texts"),
    "empty ending": (GOOD | {"endings": ["a", " "]}, "line 2: .* wanted endings that are not empty"),
    "ending of brackets": (RAW | {"endings": ["a", "[step]"], "label": 0}, "line 2: .* wanted endings that are not "),
    "no context": (GOOD | {"ctx": None}, 'line 2: .* wanted a text as "ctx"'),
    "empty context": (GOOD | {"ctx": "\n"}, "line 2: .* wanted a context"),
    "label": (GOOD | {"label": 2}, 'line 2: .* wanted a "label" from 0 to 1'),
    "negative label": (GOOD | {"label": "-1"}, 'line 2: .* wanted a "label" from 0 to 1'),
    "no answers": (GOOD | {"label": ""}, r"line 2: .* \(files without answers cannot be scored\)"),
    "true": (GOOD | {"label": True}, 'line 2: .* wanted a "label"'),
    "half a pair": (GOOD | {"ctx": "\ud800"}, "line 2: .*surrogates not allowed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_lines_that_are_no_question(tokenizer, tmp_path, name):
    line, words = BROKEN[name]
    with pytest.raises(ValueError, match=r"q.jsonl: " + words):
        choices.read(write(tmp_path / "q.jsonl", GOOD, line, GOOD), tokenizer, CONTEXT)


def test_files_that_are_no_questions(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of questions .*nowhere\.jsonl: give one in HellaSwag's "):
        choices.read(tmp_path / "nowhere.jsonl", tokenizer, CONTEXT)
    with pytest.raises(ValueError, match="got no question, wanted one JSON object a line"):
        choices.read(write(tmp_path / "q.jsonl", "", " "), tokenizer, CONTEXT)
    (tmp_path / "bytes.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xff\n")
    with pytest.raises(ValueError, match=r"bytes\.jsonl: line 2: 'utf-8' codec"):
        choices.read(tmp_path / "bytes.jsonl", tokenizer, CONTEXT)
    with pytest.raises(ValueError, match=r"line 1: got token id .* wanted ids below model\.vocab_size 99: give the "):
        choices.read(write(tmp_path / "q.jsonl", GOOD), tokenizer, dataclasses.replace(CONTEXT, vocab_size=99))


# ---- the likelihoods -------------------------------------------------------------------------------------------------

def alone(model, ending):
    """log p of one ending from the whole logits of its text."""
    tokens = torch.tensor([ending.tokens])
    log_p_SV = model.logits(tokens[:, :-1])[0].double().log_softmax(-1)
    return log_p_SV[range(tokens.shape[1] - 1), tokens[0, 1:]][-ending.scored:].sum()


def endings(model_config, number=13):
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(number):
        tokens = torch.randint(model_config.vocab_size, (2 + i % model_config.seq_len,), generator=generator).tolist()
        made.append(choices.Ending(tokens, 1 + i % (len(tokens) - 1), 7))
    return made


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("name", ["dense", "gpt2", "qwen3_moe", "deepseek", "capacity_position"])
def test_likelihoods_are_those_of_one_ending_at_a_time(name, micro_batch):
    config, model = Config(model=VARIANTS[name], train=TrainConfig(micro_batch=micro_batch)), make(VARIANTS[name])
    made, head = endings(config.model), model.lm_head.cross_entropy
    got = choices.log_likelihoods(model, config, made)
    assert model.training and model.lm_head.cross_entropy is head
    with torch.no_grad():
        torch.testing.assert_close(got, torch.stack([alone(model.eval(), e) for e in made]), rtol=1e-12, atol=1e-12)


def test_logits_that_are_not_finite():
    config = Config(model=VARIANTS["qwen3_moe"])
    model = make(config.model)
    torch.nn.init.constant_(model.norm.weight, math.nan)
    with pytest.raises(FloatingPointError, match="the log-likelihood of the endings is nan"):
        choices.log_likelihoods(model, config, endings(config.model))
    torch.nn.init.constant_(model.layers[0].mlp.gate.weight, math.inf)
    with pytest.raises(FloatingPointError, match=r"the logits of the router layers.0.mlp are not finite for "):
        choices.log_likelihoods(model, config, endings(config.model))


def test_scores(monkeypatch):
    """Question by question: what the sum, the mean per character and the mean per token choose."""
    def question(label, *sizes):
        return choices.Question([choices.Ending([0] * 9, tokens, characters) for tokens, characters in sizes], label)

    asked = [*(question(label, (1, 1), (4, 2), (2, 9)) for label in range(3)),
             *(question(label, (1, 1), (1, 1)) for label in range(2))]
    log_p = torch.tensor([-2.0, -3, -8] * 3 + [-1, -1] * 2, dtype=torch.float64)
    # -2 is the largest sum, -8/9 the largest per character, -3/4 the largest per token; of equals the first
    monkeypatch.setattr(choices, "log_likelihoods", lambda *_: log_p)
    got = choices.score(None, None, asked)
    error = math.sqrt(0.4 * 0.6 / 4)
    assert got == {"questions": 5, **{name: value for score in ("acc", "acc_norm", "acc_token") for name, value in
                                      ((score, 0.4), (score + "_stderr", error))}}
    monkeypatch.setattr(choices, "log_likelihoods", lambda *_: log_p[:3])
    right = [[choices.score(None, None, [q])[name] for name in ("acc", "acc_norm", "acc_token")] for q in asked[:3]]
    assert right == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert math.isnan(choices.score(None, None, asked[:1])["acc_stderr"])


# ---- meshes ----------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(vocab_size=61, seq_len=16, layers=2, dim=16, heads=4, hidden=24, position="learned", kv_heads=2,
                    moe=MoEConfig(experts=4, top_k=2, hidden=12, dense_layers=1, score="sigmoid", select_bias_rate=0.01,
                                  shared_hidden=8, scope="micro_batch", capacity_factor=1.0))


@pytest.mark.c_core
@pytest.mark.parametrize("sizes", [dict(fsdp=2, ep=2), dict(tp=2, etp=2), dict(rep=2, fsdp=2, tp=1, ep=2),
                                   dict(fsdp=2, tp=2, ep=4), dict(pp=2, tp=2),
                                   dict(sp=2, tp=2, ep=4), dict(pp=2, sp=2)], ids=str)
def test_every_mesh_finds_the_same(sizes, tmp_path):
    """Also where the last batch leaves ranks without endings."""
    mesh = MeshConfig(**sizes)
    config = Config(model=MODEL, mesh=mesh, train=TrainConfig(micro_batch=2, dtype="fp64", device="cpu"))
    made = endings(MODEL, 11)

    def found(mesh):
        model = build(dataclasses.replace(config, mesh=mesh.config), mesh)
        first = choices.log_likelihoods(model, config, made, mesh)
        return first, choices.log_likelihoods(model, config, made[:1], mesh)

    want = found(Mesh(MeshConfig()))
    for got in run_ranks(mesh.world, lambda rank: found(Mesh(mesh)), tmp_path):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- a run and the command -------------------------------------------------------------------------------------------

def test_during_training_and_as_a_command(data, tmp_path, monkeypatch, capsys):             # noqa: F811
    file = write(tmp_path / "quiz.jsonl", *quiz(9))
    monkeypatch.chdir(tmp_path)
    folder = moe_ext.train.train(parse(flags(data, tmp_path, train__steps=10, data__choices="quiz.jsonl",
                                             data__valid="", train__sample_tokens=0)))
    assert load(folder / "config.toml").data.choices == str(file)
    run = evaluate.load_run(folder)
    questions = choices.read(file, Tokenizer.from_file(str(data / "tokenizer.json")), run.config.model)
    with torch.no_grad():
        sums = [[alone(run.model, ending) for ending in question.endings] for question in questions]
    want = sum(s.index(max(s)) == q.label for s, q in zip(sums, questions, strict=True)) / 9
    (record,) = [r for r in records(folder) if "choices_acc" in r]
    assert record["step"] == 10 and record["choices_acc"] == want and record["choices_questions"] == 9
    line = (f"choices of 9 | acc {want:.4f} +- {record['choices_acc_stderr']:.4f} | acc_norm "
            f"{record['choices_acc_norm']:.4f}")
    assert f"eval 10/10 | {line}" in (folder / "run.log").read_text()
    for options in ([], ["--choices", file]):
        capsys.readouterr()
        main(monkeypatch, evaluate, folder, *options)
        assert capsys.readouterr().out.startswith(f"step 10 | {line}")


def test_a_run_on_two_ranks_records_the_same(data, tmp_path):                                # noqa: F811
    options = dict(train__dtype="fp64", train__steps=5, data__choices=write(tmp_path / "quiz.jsonl", *quiz(9)),
                   data__eval_sets=f"train={data / 'train'}", data__tokenizer=data / "tokenizer.json")
    one, two = (fit(data, tmp_path / name, tmp_path / f"store-{name}", **options, **mesh)
                for name, mesh in (("one", {}), ("two", MESHES["fsdp2-ep2"])))
    want, got = ([r for r in records(folder) if "loss" not in r] for folder in (one, two))
    assert [sorted(r) for r in got] == [sorted(r) for r in want] and len(want) == 3 and "choices_acc" in want[2]
    for a, b in zip(got, want, strict=True):
        assert a.pop("seconds") > 0 < b.pop("seconds")
        assert a == pytest.approx(b, rel=1e-9)


def test_refused(data, straight, tmp_path, monkeypatch):                                    # noqa: F811
    bad = write(tmp_path / "bad.jsonl", GOOD, GOOD | {"label": 5})
    for options, words in ((dict(data__choices=bad), "bad.jsonl: line 2: .* from 0 to 1"),
                           (dict(data__choices="nowhere"), "no file of questions nowhere")):
        for more in ([], ["--dry-run"]):
            with pytest.raises(SystemExit, match=f"^error: .*{words}"):
                main(monkeypatch, moe_ext.train, *flags(data, tmp_path / "runs", **options), *more)
        assert not (tmp_path / "runs" / "debug").exists()
    with pytest.raises(ConfigError, match=r"data\.choices quiz\.jsonl is text: give --data\.tokenizer the file"):
        DataConfig(choices="quiz.jsonl", tokenizer="")
    with pytest.raises(SystemExit, match=r"^error: .*bad\.jsonl: line 2"):
        main(monkeypatch, evaluate, straight, "--choices", bad)
    (tmp_path / "run").mkdir()
    for name in ("config.toml", "run.log", "ckpt"):
        (tmp_path / "run" / name).symlink_to(straight / name)
    with pytest.raises(SystemExit, match=r"^error: no tokenizer .*run/tokenizer\.json"):
        main(monkeypatch, evaluate, tmp_path / "run", "--choices", write(bad, GOOD))
