"""log.style "megatron": what Megatron-LM prints (release 0.9, of autumn 2024), so that what reads its logs reads ours.
What only a pipeline prints is that of its dynamic kind, MegatronDPP (summer of 2025), whose footprint says "block".

Format and order are Megatron's, the numbers are this run's: "GPU" is a rank, on whatever device, and a line about a
thing that a run of ours does not have is left out. Where the meaning could be taken for another:

    lm loss, load_balancing_loss    means over the steps since the last line that were not skipped, as there; the second
                                    without its weight, so that 1 is balanced (with balance_form "mse", 0 is)
    throughput per GPU              by Megatron's formula (moe_ext.plan.megatron), which is not that of "mfu"
    elapsed time per iteration      as "ms" of the other style
    num zeros, params norm          of this step's gradients, and of the parameters after it
    number of nan iterations        always 0: a loss that is not finite ends a run, or in fp16 skips the step
    reserved, on a CPU              the process's resident memory, as "allocated"
    number of parameters, buckets   of Megatron's ranks and its rule for buckets; what FSDP stores is in `--dry-run`
"""
import dataclasses
import math
from datetime import datetime
from pathlib import Path

from tokenizers import Tokenizer

from moe_ext.config import Config
from moe_ext.log.meter import Timers
from moe_ext.model import GPT, parameter_dtype
from moe_ext.parallel.schedule import SCHEDULES
from moe_ext.plan import megatron as formulas

TIMERS = dict(zip(Timers.PARTS, ("batch-generator", "forward-compute", "backward-compute", "optimizer"), strict=True))


class Megatron:
    """What the console and run.log show, as text, in this style. clock: the time of day; a test gives its own."""

    def __init__(self, config: Config, clock=datetime.now):
        self.config, self.clock, self.first = config, clock, True
        self.flops_per_token = formulas.num_floating_point_operations(config) / config.tokens_per_step

    def start(self, model: GPT, loaded: Path | None, step: int, told: list[str], data: list[str],
              setup: list[list[float]]) -> str:
        """The banner, up to the first iteration."""
        config, tp = self.config, self.config.mesh.tp
        whole = GPT(config.model, device="meta")        # of which a rank's model has parts
        lines = [f"using world size: {config.mesh.world}, data-parallel size: {config.mesh.dp}, context-parallel size: "
                 f"{config.mesh.sp}, tensor-model-parallel size: {tp}, encoder-tensor-model-parallel size: 0, "
                 f"pipeline-model-parallel size: {config.mesh.pp}, encoder-pipeline-model-parallel size: 0"]
        if config.pipeline.chunks > 1:
            lines.append(f"Number of virtual stages per pipeline stage: {config.pipeline.chunks}")
        if config.train.dtype == "fp16":
            lines.append("WARNING: Setting args.check_for_nan_in_loss_and_grad to False since dynamic loss scaling is "
                         "being used")
        lines += [f"using {parameter_dtype(config)} for parameters ...",
                 "------------------------ arguments ------------------------",
                 *sorted((f"  {name} {'.' * (48 - len(name))} {value}" for name, value in arguments(config).items()),
                         key=str.lower),
                 "-------------------- end of arguments ---------------------"]
        size = config.model.vocab_size
        if config.data.tokenizer:
            lines.append("> building HuggingFaceTokenizer tokenizer ...")
            size = max(Tokenizer.from_file(config.data.tokenizer).get_vocab().values(), default=-1) + 1
        lines.append(f" > padded vocab (size: {size}) with {config.model.vocab_size - size} dummy tokens (new size: "
                     f"{config.model.vocab_size})")
        if config.log.tensorboard:
            lines.append("> setting tensorboard ...")
        if config.mesh.world > 1:
            lines.append("> initializing torch distributed ...")
        return "\n".join([
            *lines, f"> initialized tensor model parallel with size {tp}",
            f"> initialized pipeline model parallel with size {config.mesh.pp}",
            f"> setting random seeds to {config.train.seed} ...", self.at("after megatron is initialized"),
            "building GPT model ...", formulas.parameter_lines(config, whole),
            *([formulas.bucket_lines(config, whole)] if config.mesh.pp == 1 else []),
            *([f" loading distributed checkpoint from {loaded.parent} at iteration {step}",
               f"  successfully loaded checkpoint from {loaded.parent} {self.shards} at iteration {step}"] if loaded
              else ["    will not load any checkpoints and will start from random"]),
            self.at("after model, optimizer, and learning rate scheduler are built"), *targets(config), *data,
            self.at("after dataloaders are built"), "done with setup ...",
            timers(dict(zip(("model-and-optimizer-setup", "train/valid/test-data-iterators-setup"),
                            [(min(column), max(column)) for column in zip(*setup, strict=True)], strict=True))),
            *told, "training ...", self.at("before the start of training step")])

    def at(self, place: str) -> str:
        return f"[{place}] datetime: {self.time()} "

    def time(self) -> str:
        return self.clock().strftime("%Y-%m-%d %H:%M:%S")

    def saving(self, step: int) -> str:
        return f"saving checkpoint at iteration {step:7d} to {self.config.run_folder / 'ckpt'} in torch_dist format"

    def saved(self, path: Path, step: int, waited: float, written: float) -> str:
        return f"  successfully saved checkpoint from iteration {step:7d} to {path.parent} {self.shards}"

    @property
    def shards(self) -> str:
        return f"[ t 1/{self.config.mesh.tp}, p 1/{self.config.mesh.pp} ]"

    def step(self, record: dict, eta: float) -> str:
        """The iteration line; under the first one of a start the footprint, under any the timers, if they are on."""
        seconds, world = record["ms"] / 1e3, self.config.mesh.world
        flops = self.flops_per_token * record["sequences"] * self.config.model.seq_len
        parts = [f" [{self.time()}] iteration {record['step']:8d}/{self.config.train.steps:8d}",
                 f"consumed samples: {record['samples']:12d}",
                 f"elapsed time per iteration (ms): {record['ms']:.1f}",
                 f"throughput per GPU (TFLOP/s/GPU): {flops / seconds / 1e12 / world:.1f}",
                 f"learning rate: {record['lr']:.6E}",
                 f"global batch size: {record['sequences']:5d}"]
        for name, key in (("lm loss", "mean_loss"), ("load_balancing_loss", "balance")):
            if record.get(key) is not None:
                parts.append(f"{name}: {record[key]:.6E}")
        parts.append(f"loss scale: {record['loss_scale']:.1f}")
        if record["grad_norm"] is not None:
            parts += [f"grad norm: {record['grad_norm']:.3f}", f"num zeros: {float(record['zeros'])}"]
        parts += [f"params norm: {record['parameter_norm']:.3f}",
                  f"number of skipped iterations: {record['skipped']:3d}", f"number of nan iterations: {0:3d}"]
        lines = [" | ".join(parts) + " |"]
        if self.first:
            self.first = False
            mesh = self.config.mesh
            lines.append(formulas.footprint(self.config, part="block" if mesh.pp > 1 else "layers"))
            lines += [f"[Rank {rank}] (after {record['step']} iterations) memory (MB) | allocated: {memory.allocated} "
                      f"| max allocated: {memory.max_allocated} | reserved: {memory.reserved} | max reserved: "
                      f"{memory.max_reserved}" for rank, memory in enumerate(record["memory"])
                      if rank % mesh.stage < mesh.sequence]
        if "time_ms" in record:
            lines.append(timers({TIMERS[part]: span for part, span in record["time_ms"].items()}))
        return "\n".join(lines)

    def evaluation(self, step: int, name: str, loss: float, entropy: float, numbers: dict[str, float]) -> str:
        place = f"iteration {step}" + (f" on {name} set" if name != "valid" else "")
        line = (f" validation loss at {place} | lm loss value: {loss:.6E} | "
                f"lm loss PPL: {math.exp(min(20, loss)):.6E} | ")
        rule = "-" * (len(line) + 1)
        return "\n".join([rule, line, rule])


def timers(spans: dict[str, tuple[float, float]]) -> str:
    """{name: (least, most) milliseconds of any rank}"""
    return "\n".join(["(min, max) time across ranks (ms):",
                      *(f"    {(name + ' ').ljust(48, '.')}: ({least:.2f}, {most:.2f})"
                        for name, (least, most) in spans.items())])


def targets(config: Config) -> list[str]:
    """How many sequences of each set a run takes."""
    t, valid = config.train, 0
    if config.data.valid or config.data.split:
        evaluations = t.steps // t.eval_every + bool(t.steps % t.eval_every) if t.eval_every else 1
        valid = evaluations * t.eval_batches * t.micro_batch * config.mesh.dp
    sizes = {"train": config.tokens_in_all // config.model.seq_len, "validation": valid, "test": 0}
    return ["> building train, validation, and test datasets ...", " > datasets target sizes (minimum size):",
            *(f"    {name + ':':11} {size}" for name, size in sizes.items())]


def arguments(config: Config) -> dict[str, object]:
    """Megatron's arguments, where ours have the same meaning, and all of ours under their own names."""
    c, m, t, o, mesh = config.model, config.model.moe, config.train, config.optim, config.mesh
    same = {
        "num_layers": c.layers, "hidden_size": c.dim, "num_attention_heads": c.heads, "kv_channels": c.head_width,
        "group_query_attention": c.kv_groups < c.heads, "num_query_groups": c.kv_groups, "seq_length": c.seq_len,
        "ffn_hidden_size": c.hidden, "max_position_embeddings": c.seq_len, "swiglu": c.act == "swiglu",
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[c.norm], "norm_epsilon": c.norm_eps,
        "add_bias_linear": c.bias, "qk_layernorm": c.qk_norm, "init_method_std": c.init_std,
        "position_embedding_type": {"rope": "rope", "learned": "learned_absolute"}[c.position],
        "rotary_base": c.rope_base, "rotary_percent": c.rope_fraction, "hidden_dropout": c.dropout,
        "untie_embeddings_and_output_weights": not c.tied, "num_experts": m.experts or None,
        "moe_router_topk": m.top_k, "moe_ffn_hidden_size": m.hidden, "moe_aux_loss_coeff": m.balance_weight,
        "moe_z_loss_coeff": m.z_weight or None, "moe_expert_capacity_factor": m.capacity_factor or None,
        "moe_token_drop_policy": {"position": "position", "probability": "probs"}[m.drop_by],
        "moe_router_pre_softmax": m.score == "softmax_topk", "moe_input_jitter_eps": m.jitter or None,
        "moe_router_score_function": "sigmoid" if m.score == "sigmoid" else "softmax",
        "moe_router_enable_expert_bias": m.select_bias_rate > 0, "moe_router_bias_update_rate": m.select_bias_rate,
        "moe_router_num_groups": m.groups if m.groups > 1 else None,
        "moe_router_group_topk": m.top_groups if m.groups > 1 else None,
        "moe_shared_expert_intermediate_size": m.shared_hidden or None, "moe_shared_expert_gate": m.shared_gate,
        "moe_token_dispatcher_type": "alltoall",
        "micro_batch_size": t.micro_batch, "global_batch_size": config.sequences_per_step, "train_iters": t.steps,
        "rampup_batch_size": list(config.ramp) if t.batch_ramp else None, "seed": t.seed, "bf16": t.dtype == "bf16",
        "fp16": t.dtype == "fp16", "params_dtype": parameter_dtype(config), "initial_loss_scale": t.loss_scale,
        "loss_scale_window": t.loss_scale_window, "hysteresis": t.loss_scale_hysteresis,
        "recompute_granularity": "full" if t.recompute else "selective" if t.recompute_attention else None,
        "eval_interval": t.eval_every, "eval_iters": t.eval_batches, "save_interval": t.save_every,
        "optimizer": {"adamw": "adam"}.get(o.name, o.name), "lr": o.lr, "min_lr": o.min_lr,
        "lr_decay_style": {"wsd": "WSD"}.get(o.schedule, o.schedule), "lr_warmup_iters": o.warmup,
        "lr_decay_iters": t.steps, "adam_beta1": o.beta1, "adam_beta2": o.beta2, "adam_eps": o.eps,
        "weight_decay": o.weight_decay, "clip_grad": o.clip, "world_size": mesh.world, "data_parallel_size": mesh.dp,
        "tensor_model_parallel_size": mesh.tp, "sequence_parallel": mesh.tp > 1,
        "pipeline_model_parallel_size": mesh.pp, "virtual_pipeline_model_parallel_size": (
            config.pipeline.chunks if config.pipeline.chunks > 1 else None),
        "use_dpp": mesh.pp > 1 and SCHEDULES[config.pipeline.schedule].dynamic,
        "context_parallel_size": mesh.sp, "cp_comm_type": (
            [{"ulysses": "a2a", "gather": "all_gather"}[mesh.attention]] if mesh.sp > 1 else None),
        "expert_model_parallel_size": mesh.ep,
        "expert_tensor_parallel_size": mesh.etp, "log_interval": config.log.every,
        "wandb_project": config.log.wandb, "wandb_exp_name": config.log.name, "save": config.run_folder / "ckpt",
        "tensorboard_dir": config.run_folder / "tb" if config.log.tensorboard else None,
        "train_data_path": config.data.train, "valid_data_path": config.data.valid or None,
        "tokenizer_model": config.data.tokenizer or None,
    }
    if "muon" in o.optimizers:
        same |= {"muon_momentum": o.muon.momentum, "muon_use_nesterov": o.muon.nesterov,
                 "muon_num_ns_steps": o.muon.ns_steps}
    return same | dict(leaves(dataclasses.asdict(config)))


def leaves(table: dict, prefix: str = ""):
    for name, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
