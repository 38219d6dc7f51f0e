"""docs/transformers.md: its Python runs from top to bottom, that of ranks on two, and does what it says."""

import os
import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PAGE = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text()
pytestmark = [
    pytest.mark.c_core,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="Trainer and the mesh would move models to the GPUs"),
]


def code(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def parameters(model):
    return dict(model.named_parameters())


def test_the_page_s_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    register, resume, lora = code("python")
    names = {}
    exec(register, names)
    saved = {name: p.detach().clone() for name, p in parameters(names["model"]).items()}
    assert "moe_ext" not in Path("model/config.json").read_text()

    exec(resume, names)
    want = parameters(names["model"])
    assert all(torch.equal(p, want[name]) for name, p in parameters(names["resumed"]).items())
    assert not torch.equal(want["model.layers.0.mlp.experts.down_proj"], saved["model.layers.0.mlp.experts.down_proj"])

    exec(lora, names)
    want = names["model"](names["tokens"]).logits
    assert (names["tuned"](names["tokens"]).logits - want).norm() < 1e-5 * want.norm()
    reloaded = names["AutoModelForCausalLM"].from_pretrained("tuned", experts_implementation="moe_ext")
    assert torch.equal(reloaded(names["tokens"]).logits, names["tuned"](names["tokens"]).logits)

    (ranks,) = code("python ranks")

    def body(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        exec(ranks, names)

    run_ranks(2, body, tmp_path)
    trained = parameters(names["AutoModelForCausalLM"].from_pretrained("trained"))
    assert all(0 < (p - saved[name]).norm() < 0.1 * saved[name].norm() + 0.1 for name, p in trained.items())
