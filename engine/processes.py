"""Several processes under torchrun, and batches gathered from all of them."""

import copy
import inspect
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many torchrun started, 1 without it; known before anything is initialised."""
    return int(os.environ.get('WORLD_SIZE', 1))


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun: meet the other processes; returns this one's device."""
    if processes() == 1:
        return device
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, place, many = next(dist.rendezvous('env://'))
        # After a failure torchrun offers the same store again, with addresses of dead processes still in it.
        # On one machine the count of restarts gives each start a corner of its own; several machines do not
        # count alike (docs/running.md, "Several machines").
        if os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
            store = dist.PrefixStore(f'start {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group(
            'nccl' if device.type == 'cuda' else 'gloo', store=store, rank=place, world_size=many
        )
    return device


def leave_processes() -> None:
    """Close what join_processes opened, once every process has come here; nothing without torchrun.

    The threads of a process group that are still there when Python ends may ask it for a lock that is gone;
    then the process aborts after its work is done.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def distributed(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around a training step; the module itself without torchrun.

    All processes get rank 0's weights here, but no buffers, of which same_buffers takes care, at any step:
    batch norm statistics belong to their process (evaluation uses rank 0's).
    """
    if processes() == 1:
        return module
    ids = [device] if device.type == 'cuda' else None
    newer = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    sync = {'forward_sync_buffers' if newer else 'broadcast_buffers': False}
    return DistributedDataParallel(module, ids, find_unused_parameters=True, **sync)


@torch.no_grad()
def same_buffers(net: nn.Module) -> None:
    """Give all processes rank 0's buffers: batch norm statistics, and what losses keep."""
    if processes() > 1:
        for buffer in net.buffers():
            _from_rank_0(buffer)


@torch.no_grad()
def same_weights(*modules: nn.Module) -> None:
    """Give all processes rank 0's parameters and buffers, once before a training."""
    for module in modules if processes() > 1 else ():
        for value in (*module.parameters(), *module.buffers()):
            _from_rank_0(value)


def _from_rank_0(value: Tensor) -> None:
    sent = value.contiguous()  # NCCL takes no others; vkd has a matrix that lies column by column
    dist.broadcast(sent, 0)
    if sent is not value:
        value.copy_(sent)


@torch.no_grad()
def averaged(parameters: Iterable[nn.Parameter]) -> None:
    """After backward: give all processes the mean of their gradients, in one message.

    For a loop that has no single module to wrap, see distributed. A parameter without a gradient anywhere
    keeps none, so its optimiser leaves it alone as in one process; where only some have one, others count 0.
    """
    if processes() == 1:
        return
    learnt = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learnt]
    has = grads[0].new_tensor([p.grad is not None for p in learnt])
    sent = torch.cat([*(grad.flatten() for grad in grads), has])
    dist.all_reduce(sent)
    sent /= processes()
    *means, has = sent.split([*(p.numel() for p in learnt), len(learnt)])
    somewhere = has.tolist() if any(p.grad is None for p in learnt) else [1] * len(learnt)  # else no wait
    for p, grad, mean, known in zip(learnt, grads, means, somewhere):
        if known:
            p.grad = grad.copy_(mean.view_as(p))


def summed(x: Tensor) -> Tensor:
    """The sum over all processes."""
    if processes() > 1:
        dist.all_reduce(x)
    return x


def gathered(x) -> list:
    """[what each process has], in order."""
    if processes() == 1:
        return [x]
    everyone = [None] * processes()
    dist.all_gather_object(everyone, x)
    return everyone


def mine(batch: Tensor) -> Tensor:
    """This process's part of a batch that all have; its length is a multiple of their number."""
    return batch.chunk(processes())[rank()]


def joined(x: Tensor) -> Tensor:
    """(N, ...) of every process -> (processes x N, ...), in order."""
    return x if processes() == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """(N, ...) -> (processes x N, ...); backward sums the gradients of all processes' losses."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(processes())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(processes())[rank()]


class Gathered:
    """Feats of all processes, gathered when they are asked for."""

    def __init__(self, f) -> None:
        self._f = f

    def __getattr__(self, name: str):
        value = getattr(self._f, name)
        one = isinstance(value, Tensor)
        gathered = _Gather.apply(value) if one else [_Gather.apply(x) for x in value]
        setattr(self, name, gathered)
        return gathered


def gather_batches(s, t, b):
    """Student, teacher and batch of all processes, for losses that relate samples to each other."""
    if processes() == 1:
        return s, t, b
    everything = copy.copy(b)
    everything.target = _Gather.apply(b.target)
    return Gathered(s), Gathered(t), everything
