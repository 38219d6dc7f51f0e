"""The driver: `torchrun -m moe_ext.train recipes/tiny.toml [--train.steps 100 ...] [--resume auto] [--dry-run]`.

`python -m moe_ext.train` does the same in one process. Every rank of the mesh runs this loop; what it computes does not
depend on the mesh (README, "Which mesh should I use"). Rank 0 writes the run folder, log.folder/log.name:
    config.toml       every field, defaults included: `moe_ext.train RUN/config.toml` repeats the run
    run.log           what the console showed          metrics.jsonl, tb/   the same as numbers (moe_ext.log)
    progress.txt      starts and checkpoints of all restarts
    lock              while the run is on              abandoned/      what a start left behind (moe_ext.run)
    ckpt/step-NNNNNN  checkpoints (moe_ext.checkpoint) tokenizer.json       a copy, so that the folder is whole; .sha256
    plot.png          loss and expert load             profile/             traces, with train.profile_steps
    trace.json        a pipeline's actions, with pipeline.trace
What can be known to fail is checked before step 1 (moe_ext.preflight). SIGTERM, SIGHUP or SIGUSR1 to any rank and the
first Ctrl-C save a checkpoint and end the run with exit status 0; `--resume auto` continues it, bit for bit on the same
mesh. torchrun passes SIGTERM, SIGINT and SIGHUP on, kills what runs 30 s later (--shutdown-timeout) and ends with
status 1; SIGUSR1, which SLURM's --signal can send, must be named to it, or it dies and the run with it, unsaved:
`torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1`. Logits, losses and gradients that are not finite end the
run with a sentence before they reach the parameters (in fp16 they skip the step and halve the loss scale). A rank that
dies ends all others with a sentence.
"""
from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_ext import checkpoint, choices, keep_freed_memory, private, tune
from moe_ext.config import Config, TuneConfig, named_sets, parse, plain, require
from moe_ext.data import Loader, open_data
from moe_ext.data.loader import sent
from moe_ext.evaluate import evaluate, held_out, load_run, not_finite
from moe_ext.generate import complete, load_tokenizer
from moe_ext.halves import halves
from moe_ext.log import Log, Memory, Silence, Spending, Timers, peak_flops, plot
from moe_ext.model import GPT, parameter_dtype, precision
from moe_ext.optim import LossScaler, build_optimizer, count_zeros, learning_rate, parameter_norm, set_learning_rate
from moe_ext.optim.groups import check_rule
from moe_ext.parallel.failure import RankFailure, facts
from moe_ext.parallel.launch import joined
from moe_ext.parallel.mesh import Mesh, check_world
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.shard import build
from moe_ext.plan import describe
from moe_ext.preflight import preflight
from moe_ext.run import (
    absolute,
    begin,
    carry,
    check,
    check_words,
    data_lines,
    loader_options,
    locked,
    own,
    same_evaluation,
)


@dataclass(frozen=True)
class Command(Config):
    """Train a GPT: a recipe, overridden field by field."""
    type: str = ""          # dense, capacity or dropless: the recipe's model as that, at the same active FLOPs
    resume: str = ""        # auto: go on from the run folder's newest checkpoint, if any; or the folder of a checkpoint
    weights: str = ""       # a new run that begins with these weights: of a checkpoint, or a run folder's newest
    dry_run: bool = False   # print the model, its parameters, tokens per step and memory, check what a run would, stop


def train(config: Config, resume: str = "", weights: str = "") -> Path:
    """One run from start, or from a checkpoint, to its last step; returns the run folder. Errors: ConfigError,
    CheckpointError, FileNotFoundError, FloatingPointError (a loss or gradient that is not finite), RankFailure. That a
    sample or plot at the end fails is only said."""
    folder = config.run_folder
    with (joined(config, facts(config, resume=resume, weights=weights), hint=lambda: resumable(folder)) as mesh,
          locked(folder, mesh.rank)):
        log, done = fit(config, mesh, resume, weights)
    t, finale = config.train, {"plot": lambda: plot(folder)}
    if t.sample_tokens and config.data.tokenizer:
        finale = {"sample": lambda: complete(load_run(folder), t.sample_prompt, t.sample_tokens)} | finale
    for name, make in finale.items() if done and mesh.rank == 0 else []:
        try:
            log.say(f"{name}: {make()}")
        except Exception as error:          # whatever it is, the run is done and saved
            log.say(f"no {name}: {type(error).__name__}: {error}")
    log.close()
    return folder


def fit(config: Config, mesh: Mesh, resume: str, weights: str = "") -> tuple[Log, bool]:
    """The training loop of one rank -> its log, and whether the run is done (False: it was asked to stop)."""
    t, folder, device = config.train, config.run_folder, mesh.device
    start_from = find_checkpoint(folder, resume)
    weights_from = find_weights(weights, resume, start_from)
    began = time.perf_counter()
    data, valid = checkpoint.together(lambda: preflight(config, mesh.rank, mesh.world))

    # what a step needs
    loader = Loader(data, seq_len=config.model.seq_len, seed=t.seed, batch_size=config.sequences_per_step,
                    vocab_size=config.model.vocab_size, **loader_options(config))
    paths = ({"valid": config.data.valid or config.data.train} if valid else {}) | named_sets(config.data.eval_sets)
    sets = {name: valid if name == "valid" else open_data(path).train for name, path in paths.items()}
    here = [loader.identity(), *(dataset.digest for dataset in sets.values())]
    there = checkpoint.on_rank_0(lambda: here)
    for path, mine, its in zip((config.data.train, *paths.values()), here, there, strict=True):
        require(mine == its, f"{path} is not the text that rank 0 has there: copy its folder to every host, or use "
                "storage that they share")
    if config.optim.rule or config.model.tune != TuneConfig():      # without these there are no names to check
        checkpoint.together(lambda: check_names(config, GPT(config.model, device="meta")))
    read = time.perf_counter()
    torch.manual_seed(t.seed)
    model = build(config, mesh)
    optimizer = build_optimizer(model, config.optim, mesh.timeout)
    scaler = LossScaler(t.loss_scale, window=t.loss_scale_window, hysteresis=t.loss_scale_hysteresis,
                        enabled=t.dtype == "fp16")
    state, done, best, best_step, seconds = None, 0, None, None, 0.0
    if start_from is not None:
        checkpoint.on_rank_0(lambda: check(start_from, config, loader))
        state = checkpoint.load(start_from, model=model, optimizer=optimizer, loader=loader,
                                config=dataclasses.asdict(config))
        done, seconds = state.step, state.extra.pop("seconds", 0.0)
        if same_evaluation(start_from, state, config):
            best, best_step = state.best_loss, state.best_step
        if scaler.enabled and state.extra:
            scaler.load_state_dict(state.extra)
    elif weights_from is not None:
        checkpoint.on_rank_0(lambda: check_words(weights_from, config))
        first = checkpoint.load(weights_from, model=model, start=True)

    # the run folder
    setup = mesh.each([1e3 * (time.perf_counter() - read), 1e3 * (read - began)])
    lines = checkpoint.on_rank_0(lambda: begin(config, start_from, state))
    if source := start_from or weights_from:
        checkpoint.on_rank_0(lambda: carry(source, folder))
    log = Log(config, samples=loader.row, seconds=seconds, flops_per_token=model.flops_per_token(),
              peak_flops=peak_flops(config, device) * mesh.world) if mesh.rank == 0 else Silence()
    log.start(model, start_from, done, lines, data_lines(config, data), setup)
    if start_from and weights:
        log.say(f"the weights are those of {start_from}: --weights {weights} was for the start of this run")
    elif weights_from:
        changed = checkpoint.differences(first.config, dataclasses.asdict(config))
        log.say("\n".join([f"weights from {weights_from}, {first.step} steps old; optimizer and data begin anew",
                           *(f"with {name} {now!r}, there {was!r}" for name, was, now in changed
                             if name.startswith("model."))]))
    texts = {}      # rank 0 alone reads them through, for it alone tells of them
    checkpoint.on_rank_0(lambda: texts.update({name: held_out(dataset, config.data.tokenizer)
                                               for name, dataset in sets.items()}))
    questions = checkpoint.on_rank_0(lambda: choices.read(
        config.data.choices, load_tokenizer(config.data.tokenizer), config.model) if config.data.choices else [])

    saver = checkpoint.Saver(device, mesh.timeout, told=log.saved)

    def save(step, behind, keep_last=t.keep_last):
        mesh.at(f"step {step}, saving")
        with log.paused():
            saver.wait()        # for the one before
            log.saving(step)
            saver.save(folder / "ckpt", behind=behind, model=model, optimizer=optimizer, loader=loader, step=step,
                       config=dataclasses.asdict(absolute(config)), best_loss=best, keep_last=keep_last,
                       extra=scaler.state_dict() | {"seconds": log.seconds},
                       best_step=best_step if t.keep_best else None)

    if start_from and not own(start_from, config):
        save(done, behind=False)    # now, so that whatever happens next, this folder goes on from there
    timers = Timers(device)
    spending = Spending(optimizer, config.optim.optimizers, timers, config.log.timers)
    pipeline = Pipeline(model, mesh, config.pipeline, micro_batch=t.micro_batch, micros=t.accumulation, folder=folder)
    step = done

    @contextmanager
    def around(part):
        with precision(config, device) if part == "forward" else nullcontext(), timers(part):
            yield

    with Stop() as stop, Profile(config, mesh) as profile, saver:
        for step in range(done + 1, t.steps + 1):
            mesh.at(f"step {step}")
            last = step == t.steps
            told = step == done + 1 or step % config.log.every == 0 or last     # it will have a line
            timers.on = told and config.log.timers
            set_learning_rate(optimizer, lr := learning_rate(step, config.optim, t.steps))
            loader.batch_size = sequences = config.sequences_after(loader.row)

            def feed(micro, step=step):
                with timers("data"):
                    batch = loader.batch(*mesh.rows(micro, t.micro_batch))
                draws = mesh.draws(t.seed, step, batch.row0, config.model.seq_len)
                tokens, targets = (sent(x, device) for x in (batch.tokens, batch.targets))
                borders = batch.borders(device)
                return tokens, targets, draws, None, borders.get("documents_BS"), borders.get("positions_BS")

            with halves(model, config):
                totals = pipeline.step(feed, sequences // (t.micro_batch * config.mesh.dp), tokens=loader.targets,
                                       scale=scaler.scale, around=around)
            wishes = sent(torch.tensor([float(bool(stop.asked)), float(saver.failed())]), device)
            loss, aux, balance, counts_LE, dropped_L, bad_L, wishes = pipeline.sum(*totals, wishes)
            # here, where clipping waits for the gradients anyway; behind optimizer.step() a read would wait for that
            loss, aux, balance, asked, failed = torch.cat([torch.stack([loss, aux, balance]), wishes]).tolist()
            if failed:
                saver.wait()        # and raise what went wrong
            counts_LE = counts_LE.long()
            problem = not_finite(config.model, bad_L, {"the loss": loss, "the balance loss or the z-loss": aux})
            with diverging(step, folder, saver):
                if problem and not scaler.enabled:
                    raise FloatingPointError(f"{problem}: lower optim.lr, lengthen optim.warmup or set optim.clip")
                with timers("optimizer"):
                    grad_norm = scaler.clip(model.named_parameters(), config.optim.clip, model.holders)
            zeros = count_zeros(model.named_parameters(), model.holders) if told and grad_norm is not None else None
            if grad_norm is not None:
                with timers("optimizer"):
                    optimizer.step()
                model.update_select_bias(counts_LE)
            else:
                log.say(f"step {step}: {problem or 'a gradient overflowed'}, so it moves nothing; the loss scale is "
                        f"{scaler.scale:g}")
            optimizer.zero_grad()
            spending.tick()
            loader.advance()
            profile.step()

            balance = balance if config.model.moe.balance_weight and len(counts_LE) else None
            log.tick(sequences, loss if grad_norm is not None else None, balance)
            if told:
                log.step(step, sequences=sequences, loss=loss, aux=aux, grad_norm=grad_norm, zeros=zeros,
                         parameter_norm=parameter_norm(model.named_parameters(), model.holders), lr=lr,
                         loss_scale=scaler.scale, counts_LE=counts_LE,
                         dropped_L=dropped_L if config.model.moe.capacity_factor else None,
                         epoch=loader.epoch, memory=[Memory(*row) for row in mesh.each(Memory.now(device))],
                         times=mesh.each(timers.milliseconds()) if timers.on else [],
                         spent=mesh.each(spending.now()))
            if (sets or questions) and (last or (t.eval_every and step % t.eval_every == 0 and not asked)):
                mesh.at(f"step {step}, evaluating")
                with log.paused(), diverging(step, folder, saver):
                    losses = {name: evaluate(model, config, dataset, t.eval_batches, mesh)
                              for name, dataset in sets.items()}
                    for name, text in texts.items():
                        log.evaluation(step, losses[name], text.entropy, name, **text.compare(losses[name]))
                    if questions:
                        log.choices(step, choices.score(model, config, questions, mesh))
                if valid and (best is None or losses["valid"] < best):
                    best, best_step = losses["valid"], step
            due = (t.save_every and step % t.save_every == 0) or (t.keep_best and best_step == step)
            if last or asked or (due and grad_norm is not None):
                save(step, not (last or asked), t.keep_last if grad_norm is not None else 0)    # no overflow displaces
            elif step == done + 1 and t.saves_on_the_way:
                saver.reserve(model, optimizer)
            if asked and not last:
                log.say(f"stopped by {stop.asked or 'another rank'} after step {step}; continue with --resume auto")
                break
        pipeline.close()
    return log, step == t.steps


@contextmanager
def diverging(step: int, folder: Path, saver: checkpoint.Saver):
    """A FloatingPointError from inside says its step and what to do next."""
    try:
        yield
    except FloatingPointError as error:
        saver.settle()      # it may become what the run continues from
        raise FloatingPointError(f"step {step}: {error}; {resumable(folder)}") from error


class Stop:
    """Between enter and exit, SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C only sets `asked` to the signal's name. A second
    Ctrl-C acts as usual; a second SIGTERM does not: a cluster's scheduler and torchrun may both pass on the first. What
    was ignored stays so: SIGHUP under nohup, Ctrl-C in the background of a script."""
    SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
    asked = ""

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in self.SIGNALS
                       if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def ask(self, number, frame):
        self.asked = signal.Signals(number).name
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Where to start from. A run folder that holds checkpoints is never written over without being asked."""
    newest = checkpoint.on_rank_0(lambda: checkpoint.latest(folder / "ckpt"))
    require(newest is None or resume != "", f"{folder} holds {newest and newest.name} of an earlier run: continue it "
            "with --resume auto, choose another --log.name, or delete the folder")
    return newest if resume in ("", "auto") else Path(resume)


def find_weights(weights: str, resume: str, start_from: Path | None) -> Path | None:
    """The checkpoint whose weights a new run begins with: the folder --weights, or the newest of that run folder."""
    require(not weights or resume in ("", "auto"), f"--resume {resume} continues a run and --weights {weights} begins "
            "a new one: give one of them")
    if not weights or start_from:
        return None
    path = Path(weights)
    found = checkpoint.on_rank_0(
        lambda: path if (path / "state.json").is_file() else checkpoint.latest(path / "ckpt"))
    require(found is not None, f"--weights {weights}: neither a checkpoint (it holds no state.json) nor a run folder "
            "with one (it holds no ckpt/step-NNNNNN)")
    return found


def resumable(folder: Path) -> str:
    newest = checkpoint.latest(folder / "ckpt")
    return f"--resume auto continues from {newest}" if newest else "no checkpoint has been saved yet"


class Profile:
    """torch.profiler over train.profile_steps steps from the third on, with CUDA's memory history if asked for:
    profile/trace.json (chrome://tracing), ops.txt, memory.pickle; on a mesh trace-rank0.json and so on. Does nothing if
    there are none."""

    def __init__(self, config: Config, mesh: Mesh):
        self.folder, self.trace, self.memory = config.run_folder / "profile", None, config.train.memory_snapshot
        self.rank, self.device = f"-rank{mesh.rank}" if mesh.world > 1 else "", mesh.device
        if self.memory:
            private.require("train.memory_snapshot")
        if config.train.profile_steps:
            schedule = torch.profiler.schedule(wait=1, warmup=1, active=config.train.profile_steps, repeat=1)
            self.trace = torch.profiler.profile(schedule=schedule, on_trace_ready=self.write, profile_memory=True)

    def __enter__(self):
        if self.trace:
            self.trace.start()
        if self.memory:
            torch.cuda.memory._record_memory_history()
        return self

    def step(self):
        if self.trace:
            self.trace.step()

    def write(self, trace):
        self.folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.folder / f"trace{self.rank}.json"))
        cost = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=cost, row_limit=40)
        (self.folder / f"ops{self.rank}.txt").write_text(table)
        if self.memory:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory{self.rank}.pickle"))

    def __exit__(self, *exception):
        if self.trace:
            self.trace.stop()
        if self.memory:
            torch.cuda.memory._record_memory_history(enabled=None)


def check_names(config: Config, model: GPT) -> None:
    """ConfigError where the patterns of model.tune or optim.rule do not fit the names of the whole model."""
    tune.check(model)
    check_rule(model, config.optim)


def rehearse(config: Config, model: GPT, resume: str, weights: str) -> None:
    """What a run refuses before its first step, without its ranks and their memory: `model` lies on the meta device."""
    start_from = find_checkpoint(config.run_folder, resume)
    weights_from = find_weights(weights, resume, start_from)
    data, _ = preflight(config)
    check_names(config, model)
    print("\n".join(data_lines(config, data)))
    if start_from:
        check(start_from, config, Loader(data, seq_len=config.model.seq_len, batch_size=config.sequences_per_step,
                                         seed=config.train.seed))
    elif weights_from:
        check_words(weights_from, config)
    if path := start_from or weights_from:
        checkpoint.check_model(path, model, config=dataclasses.asdict(config) if start_from else None,
                               start=not start_from)


def main() -> None:
    keep_freed_memory()     # a step whose tensors are faulted in anew takes longer
    try:
        command = parse(sys.argv[1:], Command)
        if not command.dry_run:
            train(plain(command), command.resume, command.weights)
        elif int(os.environ.get("RANK", 0)) == 0:
            check_world(command.mesh, int(os.environ.get("WORLD_SIZE", command.mesh.world)), plain(command))
            model = GPT(command.model, dtype=parameter_dtype(command), device="meta")
            print(describe(command, model), flush=True)
            rehearse(plain(command), model, command.resume, command.weights)
    except (ValueError, OSError, FloatingPointError, RankFailure) as error:
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))     # a note: what was not saved


if __name__ == "__main__":
    main()
