"""Small programs that show one thing each about the ranks of a run:

    torchrun --standalone --nproc-per-node 2 -m moe_ext.check env           is this set of ranks in order?
    torchrun --standalone --nproc-per-node 2 -m moe_ext.check all-to-all    uneven rows between ranks, every transport
    torchrun --standalone --nproc-per-node 2 -m moe_ext.check mesh          a small GPT, whose losses no mesh may change
    torchrun --standalone --nproc-per-node 2 -m moe_ext.check dmoe          our MoE layer beside plain torch
    torchrun --standalone --nproc-per-node 2 -m moe_ext.check ulysses       a long sequence's attention, beside its plan
    torchrun --standalone --nproc-per-node 2 -m moe_ext.check shampoo       one sentence learnt, alike on every mesh
    torchrun --standalone --nproc-per-node 2 -m moe_ext.check muon          the same with Muon
    torchrun --standalone --nproc-per-node 2 -m moe_ext.check pdb           the debugger on any rank

Without torchrun each runs as one process. The exit status is 0 if everything was as it should be. `--help` lists the
options of each; sizes of a mesh may also come from the environment (export DP=1 SHARD=2 TP=1 EP=1).
"""
