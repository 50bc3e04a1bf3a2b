"""Threads, seeds, kernels and precision, as the flags say."""

import argparse
import contextlib
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from engine.errors import UserError
from engine.processes import join_processes, processes

SET_BY_TORCHRUN = ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def setup(args: argparse.Namespace) -> torch.device:
    """Threads, seeds and kernels as the flags say; returns the device."""
    if args.threads and args.threads > 1024:  # the system would refuse them one by one, and abort
        raise UserError(f'--threads {args.threads}: at most 1024')
    missing = [name for name in SET_BY_TORCHRUN if name not in os.environ]
    if processes() > 1 and missing:
        raise UserError(
            f'WORLD_SIZE is {processes()} and there is no {missing[0]}: start with torchrun, or unset it'
        )
    torch.set_num_threads(args.threads or cores())
    mps = torch.backends.mps.is_available()
    name = args.device or ('cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu')
    try:
        device = torch.device(name)
        if device.type == 'cuda' and torch.cuda.is_available():
            index = int(os.environ['LOCAL_RANK']) if processes() > 1 else device.index
            if index is not None:  # what is recorded, and what a process opens, is on the current one
                torch.cuda.set_device(index)
        if device.type not in ('cpu', 'cuda', 'mps'):
            raise UserError(f'--device {name}: say cpu, cuda or mps')
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: {str(error).splitlines()[0]}') from None
    device = join_processes(device)
    torch.backends.cudnn.benchmark = not args.deterministic  # it chooses by timing, differently every time
    torch.backends.cudnn.allow_tf32 = False  # convolutions of losses are in float32, as their products are
    torch.backends.cuda.matmul.allow_tf32 = False  # torch's default, which containers override
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True, warn_only=True)  # names what has none
        torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel for every empty tensor
    seed_all(args.seed)
    return device


def exact(x: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


def cores() -> int:
    """Cores that this process may use: torch counts those of the whole machine."""
    if (chosen := os.environ.get('OMP_NUM_THREADS', '')).isdecimal():
        return max(int(chosen), 1)
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    # a container's or a job's share: 'max' (older: -1), or microseconds per period
    for files in (['cpu.max'], ['cpu/cpu.cfs_quota_us', 'cpu/cpu.cfs_period_us']):
        with contextlib.suppress(OSError, ValueError):
            quota, period = ' '.join(Path('/sys/fs/cgroup', file).read_text() for file in files).split()
            if int(quota) > 0:
                count = min(count, -(-int(quota) // int(period)))
    return max(count, 1)


def random_state(device: torch.device) -> torch.Tensor:
    """Of torch's global generators: two that differ say that something has drawn from them."""
    own = {'cuda': lambda: torch.cuda.get_rng_state(device), 'mps': lambda: torch.mps.get_rng_state()}
    here = own.get(device.type, lambda: torch.empty(0, dtype=torch.uint8))()
    return torch.cat([torch.get_rng_state(), here.cpu()])


def seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


PRECISIONS = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}


def autocast(device: torch.device, amp: str) -> Callable[[], torch.autocast]:
    """To be called at every use, `with amp():`, since threads cannot share one.

    Casts of weights are not cached: the cache is one for all threads, and what is recorded must not use it.
    """
    return partial(torch.autocast, device.type, PRECISIONS[amp], enabled=amp != 'off', cache_enabled=False)


def refuse_fp16(args: argparse.Namespace) -> None:
    """Where steps are taken without a torch.amp.GradScaler: in fp16 small gradients become 0."""
    if args.amp == 'fp16':
        raise UserError('--amp fp16: this scales no gradients; use bf16, which needs none')


def refuse_amp(args: argparse.Namespace) -> None:
    """Where everything is computed in float32, rather than leave a flag unread."""
    if args.amp != 'off':
        raise UserError(f'--amp {args.amp}: not for this tool, which computes in float32')


def precision(amp: Callable[[], torch.autocast], device: torch.device) -> torch.dtype | None:
    """What autocast turns weights into, None if it is off."""
    with amp():
        on = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if on else None


def compile_networks(args: argparse.Namespace, *nets: nn.Module) -> None:
    """With --compile: in place, so names of weights, copies and checkpoints stay as they are."""
    for net in nets if args.compile else ():
        net.compile()
