"""What a run tells: console and RUN/run.log, RUN/metrics.jsonl, RUN/tb (TensorBoard), RUN/progress.txt, wandb; plots.

    line.py      log.style "line"           megatron.py   log.style "megatron"      meter.py   time and memory
    writer.py    Log: all of it, of rank 0  files.py      what is written           draw.py    the plots

metrics.jsonl holds one object per line, of a step that has a line or of an evaluation; losses in nats per token. Of a
step:

    step, tokens, samples, seconds  behind it, over all restarts: steps, tokens, sequences, running time without pauses
    sequences, epoch, world         of this step; passes over the training tokens so far; ranks
    loss, aux, mean_loss, balance   this step's loss and what balance and z-loss add to it; means since the last line,
                                    of the loss and of the balance loss without its weight (1: balanced)
    grad_norm, zeros, parameter_norm    before clipping; values of the gradients that are 0; after the step
    lr, loss_scale, skipped         steps since the last line that overflow skipped (fp16)
    ms, tokens_per_s, mfu           of the steps since the last line; mfu: share of the devices' peak, if it is known
    load, dead                      the fullest expert of any layer over its layer's mean; experts without a copy
    load_L, dead_L, entropy_L       the same per MoE layer; the entropy of its experts' loads over that of even ones
    dropped_L, counts_LE            copies that capacity dropped, per layer; all that chose an expert, these too
    memory_mib, max_memory_mib      of the rank that has most: of its GPU, or of the process
    time_ms                         with log.timers: {part of the step: [least, most of any rank]}
    optimizer                       {name: of the rank that has most its ms per step since the last line and their share
                                    of "ms" (on CUDA with log.timers alone), state_mib kept between steps, sent_mib in a
                                    step to owners of matrices and back; of all ranks its fallbacks since the last line,
                                    if there were any: how often Shampoo found no new inverse root}

and an evaluation: step, tokens, seconds, valid_loss, valid_perplexity, unigram_entropy and other forms of the loss; of
another set NAME_loss and so on, of multiple choice choices_acc and so on. A resumed run appends; steps beyond its start
are set aside first (moe_ext.run). Where a step stands twice, as in folders of earlier versions, the later line holds.
Those also lack some of these names.

Nothing here ends a run: what a full disk, a closed terminal, TensorBoard or wandb refuses is said once, and the run
goes on; lines that the disk refused are written when it takes them again.

`python -m moe_ext.log plot RUN .. [-o out.png] [--by step|tokens|time]` draws the curves (matplotlib).
"""
from moe_ext.log.draw import plot
from moe_ext.log.files import read_metrics, split_events, split_metrics
from moe_ext.log.line import beside, chosen, measured, perplexity
from moe_ext.log.meter import Memory, Spending, Timers, peak_flops
from moe_ext.log.writer import Log, Silence

__all__ = ["Log", "Memory", "Silence", "Spending", "Timers", "beside", "chosen", "measured", "peak_flops",
           "perplexity", "plot", "read_metrics", "split_events", "split_metrics"]
