"""Recipes and the command line: what is accepted, and the sentence for everything else."""
import dataclasses
import inspect
import itertools
import re
import typing

import pytest

import moe_ext.train
from moe_ext import config as C
from moe_ext.parallel.mesh import check_world


def classes(cls=C.Config):
    yield cls
    for hint in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from classes(hint)


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_every_field_is_documented_and_they_are_few():
    count = 0
    for cls in classes():
        if cls is C.Config:
            continue
        source = inspect.getsource(cls)
        for f in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(typing.get_type_hints(cls)[f.name]):
                beside_or_above = rf"^    ({f.name}: .*= .*# \S|# .*\n    {f.name}: )"
                assert re.search(beside_or_above, source, re.M), f"{cls.__name__}.{f.name} says no unit"
                count += 1
    assert 0 < count <= 136


def test_a_rule_is_read_patterns_first(tmp_path):
    path = write(tmp_path, "[optim]\nname = 'shampoo'\n[optim.shampoo]\nepsilon = 1e-10\n")
    config = C.parse([str(path), "--optim.muon.momentum", "0.9", "--optim.rule",
                      "matrices:muon, experts: shampoo 5e-1,*.gate.weight : adamw 2 , embeddings: adamw, norms: adamw"])
    assert config.optim.rules == [("*.gate.weight", "adamw", 2.0), ("matrices", "muon", 1.0),
                                  ("experts", "shampoo", 0.5), ("embeddings", "adamw", 1.0), ("norms", "adamw", 1.0)]
    assert config.optim.optimizers == ["adamw", "muon", "shampoo"]
    assert (config.optim.muon.momentum, config.optim.shampoo.epsilon) == (0.9, 1e-10)
    assert C.OptimConfig(name="muon").rules == [("matrices", "muon", 1.0), ("experts", "muon", 1.0),
                                                ("embeddings", "adamw", 1.0), ("norms", "adamw", 1.0)]
    assert C.OptimConfig().optimizers == ["adamw"]


def test_round_trip(tmp_path):
    text = '[model]\nlayers = 2\nmoe.experts = 4\n[optim]\nlr = 3e-5\nmin_lr = 0\n[data]\ntrain = "a \\"b\\" \\\\ c"\n'
    config = C.load(write(tmp_path, text))
    assert (config.model.layers, config.model.moe.experts, config.optim.lr, config.log.name) == (2, 4, 3e-5, "recipe")
    again = tmp_path / "config.toml"
    again.write_text(C.dumps(config))
    assert C.load(again) == config


def test_command_line_comes_last(tmp_path):
    path = write(tmp_path, "[train]\nsteps = 500\nmicro_batch = 3\n")
    config = C.parse([str(path), "--train.steps", "200", "--model.moe.score", "sigmoid", "--train.recompute"])
    assert (config.train.steps, config.train.micro_batch, config.model.moe.score) == (200, 3, "sigmoid")
    assert config.train.recompute and not config.model.qk_norm
    for norm, want in (([], "auto"), (["--model.moe.norm-p", "0"], 0.0), (["--model.moe.norm-p", "auto"], "auto")):
        config = C.parse([str(path), "--model.moe.experts", "4", "--model.moe.top-k", "1", *norm])
        assert (config.model.moe.top_k, config.model.moe.norm_p) == (1, want)


@pytest.mark.parametrize("text, words", [
    ("[model]\nlayer = 2\n", ["unknown field model.layer", "did you mean model.layers?"]),
    ("[modle]\nlayers = 2\n", ["unknown field modle", "did you mean model?"]),
    ("[model.moe]\ntopk = 2\n", ["unknown field model.moe.topk", "model.moe.top_k?"]),
    ("[train]\nqqqqqq = 2\n", ["unknown field train.qqqqqq", "known: seed, steps"]),
    ("[train]\nsteps = 'ten'\n", ["train.steps", "'ten' (str)", "wanted int"]),
    ("[train]\nsteps = 1.5\n", ["train.steps", "1.5 (float)", "wanted int"]),
    ("[train]\nsteps = true\n", ["train.steps", "True (bool)", "wanted int"]),
    ("[model]\nqk_norm = 1\n", ["model.qk_norm", "1 (int)", "wanted bool"]),
    ("model = 3\n", ["model: got 3", "wanted a table [model]"]),
    ("[optim]\nschedule = 'cosin'\n", ["optim.schedule", "'cosin'", "cosine, wsd, constant", "did you mean cosine?"]),
    ("[model.moe]\nexperts = 2\ntop_k = 3\n", ["model.moe.top_k is 3", "2 experts"]),
    ("[model]\ndim = 250\n", ["model.dim 250", "model.heads 4"]),
    ("[model]\nheads = 4\nkv_heads = 3\n", ["model.heads 4", "model.kv_heads 3"]),
    ("[model]\ndim = 12\n", ["RoPE", "even"]),
    ("[model]\nrope_fraction = 0.01\n", ["model.rope_fraction 0.01", "64 columns is 0", "at least one"]),
    ("[model]\nrope_fraction = 1.5\n", ["model.rope_fraction 1.5", "at most the head's"]),
    ("[model]\nrope_fraction = 0.5\nposition = 'learned'\n", ["model.rope_fraction", "learned: leave both at 1"]),
    ("[model]\nrope_scale = 4\n", ["model.rope_scale 4.0", "model.rope_context", "positive"]),
    ("[model]\nrope_scale = 0.5\nrope_context = 4\n", ["model.rope_scale 0.5", "above 1"]),
    ("[model]\nrope_stretch = 'llama3'\n", ["model.rope_stretch is llama3", "stretches nothing: set both or none"]),
    ("[model]\nrope_stretch = 'dynamic'\n", ["model.rope_stretch", "'dynamic'", "yarn_rounded, llama3, linear"]),
    ("[model]\nrope_base = 1\n", ["model.rope_base is 1.0", "above 1"]),
    ("[model]\nwindow = -1\n", ["model.window -1", "negative"]),
    ("[model]\nwindow_full_every = 2\n", ["model.window_full_every 2", "model.window is 0: set both or none"]),
    ("[model]\nqk_norm_over = 'width'\n", ["model.qk_norm_over is width", "set model.qk_norm too"]),
    ("[model]\nattention_bias = 'kqv'\n", ["model.attention_bias", "'kqv'", "did you mean qkv?"]),
    ("[model]\ndropout = 1.0\n", ["model.dropout is 1.0"]),
    ("[model.moe]\nexperts = 4\nscore = 'topk_softmax'\nselect_bias_rate = 0.1\n", ["select_bias_rate", "sigmoid"]),
    ("[model.moe]\nexperts = 4\ntop_k = 1\nnorm_p = 1\n", ["norm_p 1.0", "no gradient", "auto or 0"]),
    ("[model.moe]\nexperts = 4\ntop_k = 1\nscore = 'topk_softmax'\n", ["topk_softmax", "no gradient", "sigmoid"]),
    ("[model.moe]\nexperts = 6\ngroups = 4\n", ["model.moe.groups is 4", "6 experts", "of equal size"]),
    ("[model.moe]\nexperts = 6\ngroups = 6\ntop_groups = 6\n", ["model.moe.groups is 6", "at least 2 experts"]),
    ("[model.moe]\nexperts = 6\ngroups = 0\n", ["model.moe.groups is 0", "1 group, or several"]),
    ("[model.moe]\nexperts = 6\ngroups = 2\ntop_groups = 3\n", ["model.moe.top_groups is 3", "choose 1 to 2"]),
    ("[model.moe]\nexperts = 8\ngroups = 4\ntop_k = 3\n", ["top_groups is 1", "enough for model.moe.top_k 3"]),
    ("[model.moe]\nexperts = 8\ngroups = 2\nscore = 'topk_softmax'\n", ["model.moe.groups", "logits: use sigmoid"]),
    ("[model.moe]\nexperts = 8\ngroups = 2\nbalanced = true\n", ["balanced ignores groups", "groups to 1"]),
    ("[model.moe]\nexperts = 8\nshared_gate = true\n", ["shared_gate", "shared_hidden is 0: set both or none"]),
    ("[model.moe]\nexperts = 4\nscale = 0\n", ["model.moe.scale is 0.0"]),
    ("[model.moe]\nnorm_p = 'atuo'\n", ["model.moe.norm_p", "'atuo'", "did you mean auto?"]),
    ("[model.moe]\nnorm_p = true\n", ["model.moe.norm_p", "True (bool)", "wanted float"]),
    ("[model.moe]\nexperts = 4\nnorm_p = -1\n", ["model.moe.norm_p is -1.0", "auto, 0"]),
    ("[optim]\nmin_lr = 1.0\n", ["optim.lr 0.001", "optim.min_lr 1.0"]),
    ("[optim]\nname = 'moun'\n", ["optim.name", "'moun'", "did you mean muon?"]),
    ("[optim]\nstate = 'cpu'\n", ["optim.state", "'cpu'", "full, bf16, host"]),
    ("[optim]\nstate = 'bf16'\nbeta2 = 0.999\n", ["optim.beta2 is 0.999", "bf16", "at most 0.99"]),
    ("[optim]\nmuon = 0.9\n", ["optim.muon: got 0.9", "wanted a table [optim.muon]"]),
    ("[optim.muon]\nmomentom = 0.9\n", ["unknown field optim.muon.momentom", "did you mean optim.muon.momentum?"]),
    ("[optim.muon]\nmomentum = 1.0\n", ["optim.muon.momentum is 1.0", "[0, 1)"]),
    ("[optim]\nstate = 'bf16'\n[optim.muon]\nmomentum = 0.995\n", ["optim.muon.momentum is 0.995", "at most 0.99"]),
    ("[optim]\nlr = inf\n", ["optim.lr inf", "finite"]),
    ("[optim]\nweight_decay = inf\n", ["optim.weight_decay is inf", "finite"]),
    ("[optim.muon]\nns_steps = 0\n", ["optim.muon.ns_steps is 0", "1 .. 99"]),
    ("[optim.muon]\nns_steps = 100\n", ["optim.muon.ns_steps is 100", "1 .. 99"]),
    ("[optim.shampoo]\nepsilon = inf\n", ["optim.shampoo.epsilon is inf", "finite"]),
    ("[optim.muon]\nadjust_lr_fn = 'match_rms'\n", ["adjust_lr_fn", "did you mean match_rms_adamw?"]),
    ("[optim.shampoo]\nprecondition_frequency = 0\n", ["optim.shampoo.precondition_frequency is 0"]),
    ("[optim.shampoo]\nmax_preconditioner_dim = -1\n", ["optim.shampoo.max_preconditioner_dim is -1"]),
    ("[optim.shampoo]\nstart_preconditioning_step = 10\n", ["start_preconditioning_step is 10", "0 or at least",
                                                            "precondition_frequency 20"]),
    ("[optim.shampoo]\nepsilon = 0\n", ["optim.shampoo.epsilon is 0.0", "positive"]),
    ("[optim]\nrule = 'matrices: muno'\n", ["optim.rule", "'matrices: muno'", "adamw, muon, shampoo after the colon",
                                            "did you mean muon?"]),
    ("[optim]\nrule = 'matrix: adamw'\n", ["'matrix: adamw'", "layers.*.gate.weight", "did you mean matrices?"]),
    ("[optim]\nrule = 'matrices adamw'\n", ["'matrices adamw'", "wanted KIND or PATTERN: OPTIMIZER [FACTOR"]),
    ("[optim]\nrule = '*: adamw,'\n", ["got ''", "between commas"]),
    ("[optim]\nrule = '*: adamw twice'\n", ["'*: adamw twice'", "a positive number after the optimizer"]),
    ("[optim]\nrule = '*: adamw 0'\n", ["'*: adamw 0'", "a positive number"]),
    ("[optim]\nrule = '*: adamw nan'\n", ["'*: adamw nan'", "a positive number"]),
    ("[optim]\nrule = 'norms: muon, matrices: adamw'\n", ["'norms: muon'", "orthogonal", "write \"norms: adamw\""]),
    ("[optim]\nrule = '*: adamw, norms: adamw'\n", ["nothing is left for norms", "* takes all"]),
    ("[optim]\nrule = 'norms: adamw, norms: adamw 2'\n", ["says twice what moves norms"]),
    ("[optim]\nname = 'muon'\nrule = '*: adamw'\n", ["gives nothing to optim.name muon"]),
    ("[train]\nsteps = 50\n", ["optim.warmup 100", "train.steps 50"]),
    ("[train]\nmicro_batch = 0\n", ["train.micro_batch is 0"]),
    ("[train]\nmemory_snapshot = true\n", ["set train.profile_steps"]),
    ("[train]\nbatch_ramp = '16,16'\n", ["train.batch_ramp is '16,16'", "as in 16,16,1000"]),
    ("[train]\nbatch_ramp = '16,0,100'\n", ["train.batch_ramp is '16,0,100'", "three positive numbers"]),
    ("[train]\nbatch_ramp = '12,8,100'\naccumulation = 4\n", ["its start 12 is no multiple of the 8", "nearest is 16"]),
    ("[train]\nbatch_ramp = '8,3,100'\naccumulation = 4\n", ["its increment 3 is no multiple", "the nearest is 8"]),
    ("[train]\nbatch_ramp = '16,8,100'\naccumulation = 2\n", ["do not lead from 16 to the 16", "change one"]),
    ("[train]\nbatch_ramp = '8,16,100'\naccumulation = 4\n", ["increments of 16 do not lead from 8 to the 32"]),
    ("[log]\npeak_tflops = -1\n", ["log.peak_tflops is -1.0", "negative"]),
    ("[mesh]\nsp = 0\n", ["mesh.sp is 0; it must be positive"]),
    ("[mesh]\nsp = 3\n", ["mesh.sp 3 * mesh.tp 1", "model.seq_len 256", "nearest mesh.sp that fits is 2",
                          "model.seq_len 255"]),
    ("[mesh]\nsp = 2\ntp = 2\n[model]\nseq_len = 6\n", ["mesh.sp 2 * mesh.tp 2", "mesh.sp that fits is 1",
                                                          "model.seq_len 8"]),
    ("[mesh]\nsp = 8\n", ["mesh.sp 8 is more than the 4 heads that Ulysses can give out (model.heads 4): ",
                          "nearest mesh.sp that fits is 4", "or set mesh.attention to gather"]),
    ("[mesh]\nsp = 4\ntp = 2\n", ["mesh.sp 4 is more than the 2 heads", "(model.heads 4 / mesh.tp 2)", "fits is 2"]),
    ("[mesh]\nsp = 4\n[model]\nheads = 6\ndim = 192\n", ["mesh.sp 4 must divide model.heads 6", "fits is 2"]),
    ("[mesh]\nsp = 4\n[model]\nheads = 12\nkv_heads = 6\ndim = 192\n",
     ["mesh.sp 4 must divide model.heads 12", "divide key/value heads 6 or be a multiple", "fits is 2", "gather"]),
    ("[mesh]\nsp = 3\n[model.moe]\nexperts = 8\n", ["mesh.sp 3 * mesh.tp 1", "mesh.sp that fits is 2"]),
    ("[mesh]\nsp = 3\nattention = 'gather'\n", ["mesh.sp 3 * mesh.tp 1", "mesh.sp that fits is 2"]),
    ("[mesh]\nattention = 'ring'\n", ["mesh.attention", "'ring'", "ulysses, gather"]),
    ("[mesh]\nattention = 'ulyses'\n", ["mesh.attention", "did you mean ulysses?"]),
    ("[mesh]\nsp = 2\nep = 4\n[model.moe]\nexperts = 8\n",
     ["mesh.ep * mesh.etp = 4 does not divide mesh.fsdp * mesh.sp * mesh.tp = 2", "does is 2"]),
    ("[mesh]\nfsdp = 3\nsp = 2\ntp = 2\n", ["mesh.fsdp * mesh.sp 6 does not divide model.dim 256", "does is 4"]),
    ("[mesh]\nsp = 4\n[model.moe]\nexperts = 192\nbalanced = true\n", ["model.moe.balanced", "the 128 of a sequence"]),
    ("[mesh]\npp = 8\n", ["mesh.pp 8", "model.layers is 4"]),
    ("[mesh]\npp = 2\n[pipeline]\nchunks = 3\n", ["pipeline.chunks 3", "6 pieces", "set pipeline.chunks to 2"]),
    ("[mesh]\npp = 2\n[pipeline]\nlayers = '3,2'\n", ["pipeline.layers 3,2", "2 pieces of 5 blocks", "as in 2,2"]),
    ("[mesh]\npp = 2\n[pipeline]\nlayers = '4,0'\n", ["pipeline.layers 4,0", "none of them empty"]),
    ("[mesh]\npp = 2\n[pipeline]\nlayers = '4'\n", ["pipeline.layers 4: got 1 pieces", "= 2 pieces"]),
    ("[mesh]\npp = 2\n[pipeline]\nlayers = '2, 2'\n", ["pipeline.layers is '2, 2'", "as in 3,4,4,3"]),
    ("[pipeline]\nchunks = 2\n", ["pipeline.chunks is 2", "mesh.pp 1 is no pipeline", "or pipeline.chunks to 1"]),
    ("[pipeline]\nlines = true\n", ["pipeline.lines is True", "or pipeline.lines to false"]),
    ("[pipeline]\ntrace = 3\n", ["pipeline.trace is 3", "set mesh.pp to 2 or more"]),
    ("[pipeline]\nlive = 3\n", ["pipeline.live is 3", "or pipeline.live to 0"]),
    ("[pipeline]\nlayers = '4'\n", ["pipeline.layers is 4", "or pipeline.layers to \"\""]),
    ("[pipeline]\nschedule = 'bcf'\n", ["pipeline.schedule", "'bcf'", "did you mean bfc?"]),
    ("[mesh]\npp = 2\n[pipeline]\nchunks = 2\nschedule = '1f1b'\n", ["pipeline.schedule is 1f1b", "interleaved"]),
    ("[mesh]\npp = 2\n[train]\naccumulation = 3\n[pipeline]\nchunks = 2\n",
     ["train.accumulation", "multiples of 2", "the nearest is 2"]),
    ("[mesh]\npp = 2\n[train]\naccumulation = 4\nmicro_batch = 1\nbatch_ramp = '1,1,9'\n[pipeline]\nchunks = 2\n",
     ["train.batch_ramp 1,1,9: ", "3 micro-batches", "the nearest is 2"]),
    ("[mesh]\npp = 2\n[pipeline]\nchunks = 2\nlive = 1\nschedule = 'bfc'\n", ["pipeline.live is 1", "2 chunks"]),
    ("[mesh]\npp = 2\n[pipeline]\nlive = 4\n", ["pipeline.live is 4", "interleaved"]),
    ("[train]\nloss_scale_window = 0\n", ["train.loss_scale_window is 0", "positive"]),
    ("[train]\nloss_scale_hysteresis = 0\n", ["train.loss_scale_hysteresis is 0", "positive"]),
    ("[train]\nrecompute = true\nrecompute_attention = true\n", ["leave train.recompute_attention off"]),
    ("[mesh]\nfsdp = 4\nep = 3\n", ["mesh.ep * mesh.etp = 3 does not divide mesh.fsdp * mesh.sp * mesh.tp = 4",
                                    "does is 2"]),
    ("[mesh]\ntp = 2\netp = 4\n", ["mesh.etp is 4", "1 or mesh.tp = 2"]),
    ("[mesh]\ntp = 3\n", ["mesh.tp 3 does not divide model.seq_len 256", "nearest that does is 2"]),
    ("[mesh]\nfsdp = 2\n[model.moe]\nexperts = 6\nbalanced = true\n", ["model.moe.balanced", "the 512 of a sequence"]),
    ("[mesh]\nfsdp = 2\nep = 2\n", ["mesh.ep and mesh.etp spread experts"]),
    ("[mesh]\nfsdp = 2\n[model]\nheads = 3\n[model.moe]\nbalanced = true\n", ["model.heads 3"]),
    ("[train]\nkeep_best = true\n[data]\nvalid = ''\n", ["train.keep_best", "data.valid is empty"]),
    ("[model\n", ["is not TOML", "line 1"]),
])
def test_bad_recipes(tmp_path, text, words):
    with pytest.raises(C.ConfigError) as error:
        C.load(write(tmp_path, text))
    assert "recipe.toml" in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_the_batch_ramp_is_megatrons():
    """Of --rampup-batch-size 16 16 1000 to 64 (its num_microbatches_calculator)."""
    config = C.Config(train=C.TrainConfig(micro_batch=16, accumulation=4, batch_ramp="16,16,1000"))
    rule = {0: 16, 333: 16, 334: 32, 666: 32, 667: 48, 999: 48, 1000: 64, 10**9: 64}
    assert {consumed: config.sequences_after(consumed) for consumed in rule} == rule
    assert config.sequences_per_step == 64 and config.tokens_per_step == 64 * 256
    steps, consumed = 0, 0
    while steps < config.train.steps:
        steps, consumed = steps + 1, consumed + config.sequences_after(consumed)
    assert config.tokens_in_all == consumed * 256 < 1000 * 64 * 256
    assert C.Config().sequences_after(0) == 8 and C.Config().tokens_in_all == 1000 * 8 * 256


def test_meshes_with_stages():
    """Twice two, and one of four; each with every mesh that a stage can be."""
    assert [mesh.pp for mesh in C.meshes(4)] == [1] * len(C.meshes(4))
    assert [mesh.pp for mesh in C.pipelines(4)] == [2] * len(C.meshes(2)) + [4] and C.pipelines(1) == []
    assert all(mesh.world == 4 and mesh.stage * mesh.pp == 4 for mesh in C.pipelines(4))
    assert len(set(C.pipelines(8))) == len(C.pipelines(8)) == len(C.meshes(4)) + len(C.meshes(2)) + len(C.meshes(1))


def test_another_world_is_told_the_nearest_mesh():
    """Of the model's, with stages where it has some."""
    mesh, model = C.MeshConfig(pp=4, tp=2), C.ModelConfig(layers=6)
    with pytest.raises(C.ConfigError, match=r"pp 4 \* rep 1 \* fsdp 1 \* tp 2 = 8 ranks, but 4 processes run: start "
                                            r"8, or take the nearest mesh of 4: --mesh.pp 2$"):
        check_world(mesh, 4, C.Config(model=model, mesh=mesh))
    mesh = C.MeshConfig(pp=2)
    with pytest.raises(C.ConfigError, match=r"nearest mesh of 3: --mesh.pp 3$"):
        check_world(mesh, 3, C.Config(model=model, mesh=mesh))


def test_the_nearest_mesh_may_share_sequences():
    """Also on stages, and with the form of attention that was asked for."""
    mesh = C.MeshConfig(pp=2, sp=2)
    with pytest.raises(C.ConfigError, match=r"the mesh has pp 2 \* rep 1 \* fsdp 1 \* sp 2 \* tp 1 = 4 ranks, but 8 "
                                            r"processes run: start 4, or take the nearest mesh of 8: --mesh.fsdp 2$"):
        check_world(mesh, 8, C.Config(mesh=mesh))
    mesh, model = C.MeshConfig(sp=4, attention="gather"), C.ModelConfig(heads=3, dim=192)
    with pytest.raises(C.ConfigError, match=r"nearest mesh of 2: --mesh.sp 2$"):
        check_world(mesh, 2, C.Config(mesh=mesh, model=model))


@pytest.mark.parametrize("sizes, model", [
    (dict(sp=8, attention="gather"), dict()),                       # more than heads
    (dict(sp=4, attention="gather"), dict(heads=6, dim=192)),
    (dict(sp=4), dict(heads=8, kv_heads=2)),                        # two ranks get each key/value head
    (dict(sp=2), dict(heads=8, kv_heads=4)),
    (dict(sp=2, tp=2), dict(heads=8, kv_heads=2)),
    (dict(attention="gather"), dict(heads=3, dim=192, seq_len=7)),  # nobody shares anything
], ids=str)
def test_sequences_that_can_be_shared(sizes, model):
    config = C.Config(model=C.ModelConfig(**model), mesh=C.MeshConfig(**sizes))
    assert config.mesh.sequence == sizes.get("sp", 1) * sizes.get("tp", 1)


def test_meshes_that_share_sequences():
    """Every one once, of all that a brute force finds."""
    every = {C.MeshConfig(rep=rep, fsdp=fsdp, sp=sp, tp=8 // (rep * fsdp * sp), ep=ep, etp=etp)
             for rep, fsdp, sp in itertools.product(C.divisors(8), repeat=3) if 8 % (rep * fsdp * sp) == 0
             for etp in {1, 8 // (rep * fsdp * sp)} for ep in C.divisors(8 // rep // etp)}
    assert set(C.sequences(8)) == {mesh for mesh in every if mesh.sp > 1}
    assert len(C.sequences(8)) == len(set(C.sequences(8))) and C.sequences(1) == []


def test_config_files_from_before_mesh_attention_load(tmp_path):
    text = C.dumps(C.Config())
    assert 'attention = "ulysses"\n' in text
    assert C.load(write(tmp_path, text.replace('attention = "ulysses"\n', ""))).mesh == C.MeshConfig()


def test_micro_batches_of_all_steps():
    """Of a whole step, or of each that a ramp leads through; a pipeline must take them all."""
    train = C.TrainConfig(micro_batch=2, accumulation=8)
    assert C.Config(train=train).micro_batches == [8]
    mesh = C.MeshConfig(pp=2, fsdp=2)
    config = C.Config(train=dataclasses.replace(train, batch_ramp="8,8,100"), mesh=mesh,
                      pipeline=C.PipelineConfig(chunks=2))
    assert config.sequences_per_step == 32 and config.micro_batches == [2, 4, 6, 8]


def test_missing_recipe_and_missing_argument(tmp_path):
    with pytest.raises(C.ConfigError, match=r"no recipe .*nowhere.toml: give a .toml file"):
        C.load(tmp_path / "nowhere.toml")
    with pytest.raises(C.ConfigError, match=r"usage: python -m moe_ext.train RECIPE"):
        C.parse(["--train.steps", "3"])


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_needs_no_recipe(monkeypatch, capsys, word):
    monkeypatch.setattr("sys.argv", ["train", word])
    with pytest.raises(SystemExit) as error:
        moe_ext.train.main()
    said = capsys.readouterr().out
    assert error.value.code == 0
    for option in ("RECIPE.toml", "--train.steps INT", "--model.moe.top-k INT", "--resume", "--weights", "--dry-run"):
        assert option in said


@pytest.mark.parametrize("cls", list(classes()), ids=lambda cls: cls.__name__)
def test_help_ends_no_sentence_halfway(cls):
    """It has the comment beside a field, of which a second line would be lost, or those above it."""
    assert not re.search(r"\n    \w+: [^\n]*# [^\n]*\n {5,}#", inspect.getsource(cls))


@pytest.mark.parametrize("args, words", [
    (["--train.steps", "ten"], ["--train.steps", "ten"]),
    (["--train.stpes", "10"], ["--train.stpes", "--train.steps INT"]),
])
def test_bad_command_lines(tmp_path, capsys, args, words):
    with pytest.raises(SystemExit) as error:
        C.parse([str(write(tmp_path, "")), *args])
    assert error.value.code == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said


@pytest.mark.parametrize("args, words", [
    (["--model.heads", "3"], "model.dim 256 is not a multiple of model.heads 3: change one or set model.head_dim"),
    (["--mesh.pp", "0"], "mesh.pp is 0; it must be positive"),
    (["--mesh.pp", "8"], "mesh.pp 8 * pipeline.chunks 1 cut the model into 8 pieces, and each needs a block, but "
                         "model.layers is 4: mesh.pp can be 4 at most"),
    (["--mesh.sp", "3"], "mesh.sp 3 * mesh.tp 1 ranks cannot share model.seq_len 256 evenly: the nearest mesh.sp that "
                         "fits is 2, the nearest model.seq_len 255"),
    (["--mesh.sp", "8"], "mesh.sp 8 is more than the 4 heads that Ulysses can give out (model.heads 4): the nearest "
                         "mesh.sp that fits is 4, or set mesh.attention to gather, which takes any number of heads"),
    (["--pipeline.chunks", "2", "--pipeline.lines"], "pipeline.chunks is 2, pipeline.lines is True, but mesh.pp 1 is "
     "no pipeline: set mesh.pp to 2 or more, or pipeline.chunks to 1, pipeline.lines to false"),
])
def test_options_that_describe_no_run_are_one_sentence(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.setattr("sys.argv", ["train", str(write(tmp_path, "")), *args])
    with pytest.raises(SystemExit) as error:
        moe_ext.train.main()
    assert error.value.code == f"error: {words}" and capsys.readouterr() == ("", "")
