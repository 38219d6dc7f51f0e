"""Expert parallelism of transformers' models by the exchange of this package: ep_implementation="moe_ext".

    import moe_ext.transformers
    from transformers.distributed import DistributedConfig
    mesh = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="moe_ext")
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moe_ext", distributed_config=mesh)

A token goes once to each rank that owns one of its experts and comes back as one row, weighted and summed, where
"all_to_all" sends a row for each of its K experts both ways (moe_ext.parallel.experts; one host read a layer). With
experts_implementation="moe_ext" the experts of a rank take the rows as they come; any other gets what all of them
understand, one row for each copy, sorted by expert. The ranks of a TP group share a batch and exchange a slice each.

An expert's gradient is the sum over the batches of its expert group, as with transformers' own implementations; the
FSDP that DistributedConfig sets up divides it by dp_size: as all others, it is that of the mean of the losses.

Every rank of an expert group runs the same forwards and backwards, each with any number of tokens. A rank that stays
away for longer than TokenExchangeEP.timeout is a RuntimeError on the others, on GPUs in forward alone (in backward the
timeout of the process group ends them); ranks that do not come for the same thing are a ValueError on all.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moe_ext import ops
from moe_ext.parallel.collectives import as_autocast
from moe_ext.parallel.experts import ExpertExchange
from moe_ext.parallel.transport import TorchTransport

NAME = "moe_ext"
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Meeting(TorchTransport):
    """Ranks that say with their counts what they come for, and whose waits end in words.

    facts: {name: (int, n)} of the next exchange; each n consecutive ranks must have the same int. Errors: ValueError on
    all ranks if they have not; RuntimeError: a rank has not come within the timeout, or is gone.
    """

    def __init__(self, group, timeout):
        super().__init__(group, timeout)
        self.facts, self.names = {}, dist.get_process_group_ranks(group)

    def counts(self, mine):
        facts = mine.new_tensor([fact for fact, _ in self.facts.values()]).expand(self.ranks, -1)
        all_PPn = super().counts(torch.cat([mine, facts], 1))
        counts_PPn, facts_PPn = all_PPn.split([mine.shape[1], len(self.facts)], 2)
        for (what, (_, n)), fact_P in zip(self.facts.items(), facts_PPn[:, 0].T.tolist(), strict=True):
            if any(len(set(fact_P[first : first + n])) > 1 for first in range(0, self.ranks, n)):
                got = ", ".join(f"{fact} on rank {rank}" for fact, rank in zip(fact_P, self.names, strict=True))
                raise ValueError(f'ep_implementation="{NAME}": {what} must be the same on {n} ranks, got {got}')
        return counts_PPn

    def _run(self, timeout, collective, *args):
        try:
            super()._run(timeout, collective, *args)
        except RuntimeError as error:
            raise RuntimeError(
                f'ep_implementation="{NAME}": rank {self.names[self.rank]} waited in vain for ranks {self.names} to '
                f"exchange tokens ({error}). They must run the same number of forwards and backwards: give each as "
                f"many batches as the others, or more time than TokenExchangeEP.timeout = {self.timeout}"
            ) from error


class TokenExchangeEP(EPImplementation):
    """See above. ValueError: a mesh that is neither of CPUs over gloo nor of GPUs over NCCL."""

    timeout = timedelta(minutes=10)

    def __init__(self, experts, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        group, device = ep_mesh.get_group(), ep_mesh.device_type
        backend = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",")).get(device)
        if backend is None or backend != BACKENDS.get(device):
            raise ValueError(
                f'ep_implementation="{NAME}" exchanges tokens of CPUs over gloo and of GPUs over NCCL, got a mesh of '
                f'{device} over {backend}. Hint: ep_implementation="all_to_all"'
            )
        self.config = experts.config
        self.exchange = ExpertExchange(self.num_local_experts * ep_mesh.size(), Meeting(group, self.timeout))

    def __call__(self, hidden_states, top_k_index, top_k_weights):
        (tokens, width), shared, ranks = hidden_states.shape, self.tp_mesh.size(), self.ep_mesh.size()
        x_TD, ids_TK, weights_TK = as_autocast(hidden_states), top_k_index, top_k_weights
        if weights_TK.dtype != x_TD.dtype:
            weights_TK = weights_TK.float()
        grad = torch.is_grad_enabled()
        self.exchange.transport.facts = {
            "whether hidden_states requires a gradient": (grad and x_TD.requires_grad, ranks),
            "whether top_k_weights requires a gradient": (grad and weights_TK.requires_grad, ranks),
            "the bytes of a value of hidden_states": (x_TD.itemsize, ranks),
            "the bytes of a value of top_k_weights": (weights_TK.itemsize, ranks),
            "the number of tokens of the batch that a TP group shares": (tokens, shared),
        }
        if shared > 1:
            x_TD, ids_TK, weights_TK = (self._slice(t) for t in (x_TD, ids_TK, weights_TK))
        x_RD, weights_RK, ids_RK, num_copies, trip = self.exchange.dispatch(x_TD, weights_TK, ids_TK)
        y_TD = self.exchange.combine(self._experts(x_RD, weights_RK, ids_RK, num_copies), trip)
        if shared > 1:
            whole = {"shape": (tokens, width), "stride": (width, 1)}
            y_TD = DTensor.from_local(y_TD, self.tp_mesh, [Shard(0)], **whole).full_tensor()
        return y_TD

    def _slice(self, x):
        """This rank's rows of what its TP group shares; their gradients are gathered."""
        whole = DTensor.from_local(x, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _experts(self, x_RD, weights_RK, ids_RK, num_copies):
        """The experts of this rank on the rows that came: y_RD, weighted and summed."""
        E, (R, K) = self.num_local_experts, ids_RK.shape
        if R == 0:  # a row of zeros keeps inputs and parameters on the way back, which the other ranks take
            ids_11 = ids_RK.new_zeros(1, 1, dtype=torch.int64)
            return self.experts_forward(x_RD.sum(0, keepdim=True), ids_11, weights_RK.sum().view(1, 1))[:0]
        if self.config._experts_implementation == NAME:
            return self.experts_forward(x_RD, ids_RK, weights_RK, num_copies=num_copies)
        index = ops.route_index(ids_RK, E)
        x_ND = torch.ops.moe_ext.gather(x_RD, None, index.order_N, index.bins_E, None, num_copies, K, 0)
        ids_N = torch.arange(E, device=ids_RK.device).repeat_interleave(index.counts_E, output_size=num_copies)
        y_ND = self.experts_forward(x_ND, ids_N[:, None], torch.ones_like(x_ND[:, :1]))
        return ops.scatter(y_ND, index.order_N, None, weights_RK.flatten(), index.bins_E, K)


EPImplementationInterface.register(NAME, TokenExchangeEP)
