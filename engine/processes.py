"""Several processes under torchrun, and batches gathered from all of them."""

import copy
import os

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
        # count alike (README, "Several processes").
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

    All processes get rank 0's weights here. Buffers are not sent at every step: batch norm statistics belong
    to their process (evaluation uses rank 0's).
    """
    if processes() == 1:
        return module
    ids = [device] if device.type == 'cuda' else None
    return DistributedDataParallel(module, ids, broadcast_buffers=False, find_unused_parameters=True)


@torch.no_grad()
def same_buffers(net: nn.Module) -> None:
    """Give all processes rank 0's batch norm statistics."""
    if processes() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


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
