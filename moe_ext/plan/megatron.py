"""What Megatron-LM prints about a model before its first iteration, recomputed from a Config.

Each function is one formula or one block of text of Megatron-LM (release 0.9, of autumn 2024, whose logs many compare
with), on purpose with its approximations: the vocabulary padded to a multiple of 128 tp, attention without the causal
half, norms counted as if they had biases, no router, no linear biases, and memory that does not know expert
parallelism. What stands beside them as exact is counted on the model. `pp` and `vpp` are pipeline stages and model
chunks per stage of a config that has none itself; 0: those that it has. mesh.sp is its context parallelism (with
cp_comm_type a2a for mesh.attention "ulysses", all_gather for "gather"): its ranks hold the same parameters, are no
data-parallel ranks, and share the optimizer's state, which release 0.9 does not print.

The names of Megatron's arguments: L layers, h hidden size, a heads, g query groups, d kv_channels, f ffn_hidden_size,
s sequence length, B global batch, V padded vocabulary, m = 3/2 for a gated MLP, else 1.
"""
from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from moe_ext.config import Config, PipelineConfig, require
from moe_ext.layers.lora import is_factor
from moe_ext.model import GPT
from moe_ext.ops.enums import GATED
from moe_ext.parallel.tensor import COLUMNS, ROWS, SLICED
from moe_ext.plan.shares import stages

MB = 2**20
BUCKET, PER_RANK = 40_000_000, 1_000_000    # elements that close a bucket, or so many for each data-parallel rank


def padded_vocabulary(config: Config) -> int:
    """megatron/training/tokenizer: up to a multiple of make_vocab_size_divisible_by (128) * tp."""
    multiple = 128 * config.mesh.tp
    return -(-config.model.vocab_size // multiple) * multiple


def mlp_halves(config: Config) -> int:
    """2m: matrices of h x f in an MLP."""
    return 3 if config.model.act in GATED else 2


def num_floating_point_operations(config: Config) -> int:
    """Of one iteration, forward and backward without recomputation (megatron/training/training.py):

    12 B s L h^2 [(1 + g/a + s/h) (a d / h) + (f/h) k m + V / (2 L h)], f and k being those of each layer
    """
    c, moe = config.model, config.model.moe
    attention = c.dim * c.head_width * (c.heads + c.kv_groups) + c.seq_len * c.heads * c.head_width
    widths = ((c.layers - c.moe_layers) * c.hidden
              + c.moe_layers * (moe.top_k * moe.hidden + moe.shared_hidden))
    return config.tokens_per_step * (12 * c.layers * attention + 6 * mlp_halves(config) * c.dim * widths
                                     + 6 * padded_vocabulary(config) * c.dim)


def counted_parameters(config: Config) -> tuple[int, int]:
    """(of the transformer layers, of the embedding layers), as theoretical_memory_usage.py counts:

    2 L h^2 [(1 + g/a) (a d / h) + (f/h) E m + 2/h + 1 / (L h)], and h V, twice if untied
    """
    c, moe = config.model, config.model.moe
    widths = ((c.layers - c.moe_layers) * c.hidden
              + c.moe_layers * (moe.experts * moe.hidden + moe.shared_hidden))
    layers = (2 * c.layers * c.dim * c.head_width * (c.heads + c.kv_groups) + mlp_halves(config) * c.dim * widths
              + 4 * c.layers * c.dim + 2 * c.dim)
    return layers, (1 if c.tied else 2) * c.dim * padded_vocabulary(config)


def shards(config: Config, pp: int = 0) -> tuple[float, float]:
    """Parameters of (the most loaded rank, the others): layers / (pp tp), and the embedding / tp (both of them without
    a pipeline). Experts are not divided by ep."""
    layers, embeddings = counted_parameters(config)
    tp, pp, table = config.mesh.tp, pp or config.mesh.pp, config.model.dim * padded_vocabulary(config)
    return (layers / pp + (embeddings if pp == 1 else table)) / tp, layers / (pp * tp)


def bytes_per_parameter(config: Config, ranks: int) -> float:
    """bf16 weight, fp32 gradient, master weight and two moments: 18; with the distributed optimizer, which stands for
    our fsdp and sp, the last twelve over `ranks`."""
    return 6 + 12 / ranks if config.mesh.shards > 1 else 18


def weight_and_optimizer_memory(config: Config, pp: int = 0) -> float:
    """Megatron's estimate for the most loaded rank, in MB of 2^20 bytes. (Later releases divide by the ranks of the
    context too.)"""
    return shards(config, pp)[0] * bytes_per_parameter(config, config.mesh.dp) / MB


def footprint(config: Config, pp: int = 0, part: str = "layers") -> str:
    """The lines of report_theoretical_memory; `part` is "layers", in newer releases "block"."""
    (layers, embeddings), (most, others) = counted_parameters(config), shards(config, pp)
    memory = weight_and_optimizer_memory(config, pp)
    lines = [f"Number of parameters in transformer {part} in billions: {layers / 1e9: .2f}",
             f"Number of parameters in embedding layers in billions: {embeddings / 1e9:.2f}",
             f"Total number of parameters in billions: {(layers + embeddings) / 1e9:.2f}",
             f"Number of parameters in most loaded shard in billions: {most / 1e9:.4f}"]
    if (pp or config.mesh.pp) > 1:
        lines.append(f"Number of parameters in other shards in billions: {others / 1e9:.4f}")
    lines.append(f"Theoretical memory footprints: weight and optimizer={memory:.2f} MB")
    return "\n".join(lines)


class Parameter(NamedTuple):
    """A parameter of the model as a rank of Megatron would hold it."""
    name: str       # Megatron's
    size: int       # elements on a rank, after tp, ep and etp
    stage: int      # of the pipeline
    expert: bool    # one of ep's ranks has it: its gradients go another way


MODULES = {     # of a layer: ours -> Megatron's, in the order in which its modules are made
    "self_attn": "self_attention.core_attention.softmax_offset",
    "self_attn.o_proj": "self_attention.linear_proj",
    "input_layernorm": "self_attention.linear_qkv",
    "self_attn.q_proj": "self_attention.linear_qkv",
    "self_attn.k_proj": "self_attention.linear_qkv",
    "self_attn.v_proj": "self_attention.linear_qkv",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.gate_proj": "mlp.linear_fc1",
    "mlp.up_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
    "mlp.gate": "mlp.router",
    "mlp": "mlp.router.noise",
    "mlp.experts": "mlp.experts",
    "mlp.shared_gate": "mlp.shared_experts.gate_weight",
    "mlp.shared.gate_proj": "mlp.shared_experts.linear_fc1",
    "mlp.shared.up_proj": "mlp.shared_experts.linear_fc1",
    "mlp.shared.down_proj": "mlp.shared_experts.linear_fc2",
}
OUTSIDE = {     # of the layers
    "embed_tokens": "embedding.word_embeddings",
    "embed_positions": "embedding.position_embeddings",
    "norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
LEAVES = {"w13_E2FD": ("weight", 1), "w13_bias": ("bias", 1), "w2_EDF": ("weight", 2), "w2_bias": ("bias", 2)}


def parameters(config: Config, model: GPT, pp: int = 0, vpp: int = 0, grouped: bool | None = None) -> list[Parameter]:
    """What one tensor-parallel rank of each stage holds, in Megatron's order: q, k and v, and gate and up, are one
    matrix; a tied head is a copy on the last stage.

    grouped: an expert layer has two matrices, as with --moe-grouped-gemm, not two for each expert; None: unless there
    is a capacity, as in the runs that the figures of the documentation come from. Errors: ConfigError if the layers do
    not divide.
    """
    config = staged(config, pp, vpp)
    c, mesh, pp = config.model, config.mesh, config.mesh.pp
    grouped = not c.moe.capacity_factor if grouped is None else grouped
    owner = {layer: stage for stage, pieces in enumerate(stages(config)) for piece in pieces for layer in piece}
    order, held = list(dict.fromkeys([*MODULES.values(), *OUTSIDE.values()])), {}

    def add(layer, module, leaf, size, *, local=0, prefix="decoder.layers.{}.", expert=False):
        """A part of a parameter; parts of one name add up."""
        stage = 0 if layer < 0 else pp - 1 if layer == c.layers else owner[layer]
        name = f"{prefix.format(layer)}{module}.{leaf}".rstrip(".")
        key = layer, order.index(module.partition(".local")[0]), local, name
        held[key] = Parameter(name, size + (held[key].size if key in held else 0), stage, expert)

    for name, p in model.named_parameters():
        if is_factor(name):     # Megatron's model has none
            continue
        where, _, leaf = name.rpartition(".")
        split = mesh.tp if ROWS.search(name) or COLUMNS.search(name) or SLICED.search(name) else 1
        if not name.startswith("layers."):
            rows = padded_vocabulary(config) if split > 1 or where in ("embed_tokens", "lm_head") else p.shape[0]
            size = rows // split * p[0].numel()
            add(c.layers if where in ("norm", "lm_head") else -1, OUTSIDE[where], leaf, size, prefix="")
            if where == "embed_tokens" and c.tied and pp > 1:
                add(c.layers, "output_layer", leaf, size, prefix="")
            continue
        _, layer, where = where.split(".", 2)
        module = MODULES[where]
        if where == "mlp.experts":
            kind, matrix = LEAVES[leaf]
            here, size = c.moe.experts // mesh.ep, p[0].numel() // (1 if leaf == "w2_bias" else mesh.etp)
            if grouped:
                add(int(layer), module, f"{kind}{matrix}", here * size, local=matrix, expert=mesh.ep > 1)
            else:
                for e in range(here):
                    add(int(layer), f"{module}.local_experts.{e}.linear_fc{matrix}", kind, size, local=2 * e + matrix,
                        expert=mesh.ep > 1)
        elif where in ("self_attn", "mlp", "mlp.shared_gate"):      # sinks, noise
            add(int(layer), module, "", p.numel() // (mesh.tp if where == "self_attn" else 1))
        else:
            add(int(layer), module, f"layer_norm_{leaf}" if where == "input_layernorm" else leaf, p.numel() // split)
    return [held[key] for key in sorted(held)]


def staged(config: Config, pp: int = 0, vpp: int = 0) -> Config:
    """The config, with so many stages and chunks of each, which share the layers evenly, if it has none itself. Errors:
    ConfigError if it has others, or if the layers do not divide."""
    own, layers = (config.mesh.pp, config.pipeline.chunks), config.model.layers
    if (pp, vpp) == (pp and own[0], vpp and own[1]):
        return config
    require(own[0] == 1, f"--pp {pp} and --vpp {vpp} are for recipes without stages, but mesh.pp is {own[0]}: leave "
            "them out, or set --mesh.pp and --pipeline.chunks")
    pp, vpp = pp or 1, vpp or 1
    require(vpp == 1 or pp > 1, f"--vpp {vpp} divides the layers of a pipeline stage: it needs --pp above 1")
    require(layers % (pp * vpp) == 0, f"--pp {pp} x --vpp {vpp} does not divide model.layers {layers}: change one")
    even = ",".join([str(layers // pp // vpp)] * (pp * vpp))
    return replace(config, mesh=replace(config.mesh, pp=pp),
                   pipeline=PipelineConfig(chunks=vpp, layers=even, schedule="breadth_first"))


def exact_memory(config: Config, model: GPT, pp: int = 0, vpp: int = 0) -> tuple[float, float]:
    """The same estimate from the parameters that the most loaded stage really has, in MB: (all experts on every rank,
    as the formula has it; those that a rank has, their state over the ranks that have the same ones)."""
    config = staged(config, pp, vpp)
    mesh, held = config.mesh, parameters(config, model)
    each = [[sum(p.size for p in held if (p.stage, p.expert) == (stage, expert)) for expert in (False, True)]
            for stage in range(mesh.pp)]
    dense, experts = (bytes_per_parameter(config, ranks) for ranks in (mesh.dp * mesh.sp, mesh.rep * mesh.efsdp))
    return (max(d + e * mesh.ep for d, e in each) * dense / MB,
            max(d * dense + e * experts for d, e in each) / MB)


def parameter_lines(config: Config, model: GPT, pp: int = 0, vpp: int = 0) -> str:
    """One line for each (tensor, pipeline) rank."""
    config = staged(config, pp, vpp)
    held = [0] * config.mesh.pp
    for p in parameters(config, model):
        held[p.stage] += p.size
    return "\n".join(f" > number of parameters on (tensor, pipeline) model parallel rank ({t}, {stage}): {size}"
                     for stage, size in enumerate(held) for t in range(config.mesh.tp))


def buckets(config: Config, model: GPT, grouped: bool | None = None) -> list[list[list[Parameter]]]:
    """The gradient buckets of param_and_grad_buffer.py: those of the dense parameters, and those of the experts if ep
    divides them. Filled in the reverse order of the parameters; one is closed as soon as it holds the bucket size."""
    held = parameters(config, model, grouped=grouped)[::-1]
    enough = max(BUCKET, PER_RANK * config.mesh.dp)
    buffers = []
    for expert in (False, True):
        full, filling = [], []
        for p in held:
            if p.expert == expert:
                filling.append(p)
                if sum(q.size for q in filling) >= enough:
                    full, filling = [*full, filling], []
        buffers.append(full + ([filling] if filling else []))
    return [buffer for buffer in buffers if buffer]


def bucket_lines(config: Config, model: GPT, grouped: bool | None = None, names: bool = True) -> str:
    """The lines that Megatron logs about its buckets; `names`: of their parameters too."""
    lines = []
    for buffer in buckets(config, model, grouped):
        lines.append("INFO:megatron.core.distributed.param_and_grad_buffer:Number of buckets for gradient all-reduce / "
                     f"reduce-scatter: {len(buffer)}")
        for number, bucket in enumerate(buffer, 1):
            lines.append(f"Params for bucket {number} ({sum(p.size for p in bucket)} elements):")
            lines += [f"        module.{p.name}" for p in bucket if names]
    return "\n".join(lines)
