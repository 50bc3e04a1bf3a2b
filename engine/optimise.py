"""Learning rates as functions of the epoch, and the optimisers."""

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate(args: argparse.Namespace, epoch: float) -> float:
    """A pure function of the epochs done, so a resumed run needs no scheduler state.

    epoch: with its fraction, 2.5 in the middle of the third; the milestones of `steps` look at whole epochs.
    """
    if args.schedule == 'onecycle':
        return args.lr * one_cycle(epoch / args.epochs)
    begun = int(epoch) + 1e-9  # 0.55 * 100 is a rounding above 55
    return args.lr * args.lr_decay ** sum(begun >= share * args.epochs for share in args.milestones)


def one_cycle(done: float) -> float:
    """Share of the highest learning rate, for a share of the run: up for a fifth of it, then down to 0."""
    return min(done / 0.2, (1 - done) / 0.8)


def set_learning_rate(opt: torch.optim.Optimizer, lr: float) -> None:
    if not isinstance(opt.param_groups[0]['lr'], Tensor):
        for group in opt.param_groups:
            group['lr'] = lr
    elif getattr(opt, 'rate', None) != lr:  # a tensor is what a recorded step reads: filled where it lies
        opt.rate = lr
        for group in opt.param_groups:
            group['lr'].fill_(lr)


def phase_epochs(epochs_of_200: int, epochs: int, chosen: int | None = None) -> int:
    """Epochs of a phase: what the flag says, else the method's share of a run of 200, at least one."""
    if not epochs_of_200 or chosen is not None:
        return chosen if epochs_of_200 else 0
    return max(round(epochs_of_200 * epochs / 200), 1)


def optimiser(parameters: Iterable[nn.Parameter | dict], args: argparse.Namespace) -> torch.optim.Optimizer:
    """What --optim says. parameters: tensors, or groups of them as torch.optim takes them."""
    return {'sgd': sgd, 'adamw': adamw}[args.optim](parameters, args)


def adamw(parameters: Iterable[nn.Parameter | dict], args: argparse.Namespace) -> torch.optim.AdamW:
    return adam(parameters, args.lr, torch.optim.AdamW, weight_decay=args.weight_decay)


def adam(parameters: Iterable[nn.Parameter | dict], lr: float, kind=torch.optim.Adam, **options):
    """Adam or AdamW; on CUDA by the kernel that can skip an update on the device (Meter.guard)."""
    parameters = list(parameters)
    fused = on_cuda(parameters)
    opt = kind(parameters, lr, fused=fused, foreach=False, **options)

    def own_kernel(opt):
        """Whatever device the checkpoint came from."""
        for group in opt.param_groups:
            group |= {'fused': fused, 'foreach': False}
        for p, state in opt.state.items():
            if 'step' in state:
                state['step'] = state['step'].to(p.device if fused else 'cpu')

    opt.register_load_state_dict_post_hook(own_kernel)
    return opt


def on_cuda(parameters: list) -> bool:
    first = parameters[0]['params'][0] if isinstance(parameters[0], dict) else parameters[0]
    return first.is_cuda


def sgd(parameters: Iterable[nn.Parameter | dict], args: argparse.Namespace) -> torch.optim.SGD:
    """parameters: tensors, or groups of them as torch.optim takes them."""
    parameters = list(parameters)
    if not on_cuda(parameters):
        return torch.optim.SGD(
            parameters, args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=wants_nesterov(args)
        )
    return fused_sgd(parameters, args)


def wants_nesterov(args: argparse.Namespace) -> bool:
    """torch refuses it without momentum."""
    return getattr(args, 'nesterov', True) and args.momentum > 0


def fused_sgd(parameters: list, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD that can skip an update on the device (Meter.guard) and be recorded, the learning rate a tensor."""
    first = parameters[0]['params'][0] if isinstance(parameters[0], dict) else parameters[0]
    rate = torch.tensor(args.lr, device=first.device)
    opt = torch.optim.SGD(
        parameters,
        rate,
        args.momentum,
        weight_decay=args.weight_decay,
        nesterov=wants_nesterov(args),
        fused=True,
    )

    def zero_momentum(opt, *_):
        # the fused kernel wants a momentum of all parameters or of none: one whose first gradient comes late
        # starts from 0, which is what it would have
        for group in opt.param_groups if args.momentum else ():
            for p in group['params']:
                if p.grad is not None and opt.state[p].get('momentum_buffer') is None:
                    opt.state[p]['momentum_buffer'] = torch.zeros_like(p)

    def plain_rate(opt, state):
        """In a checkpoint the rate is a number, as it is on every other device."""
        groups = [group | {'lr': float(group['lr']), 'fused': None} for group in state['param_groups']]
        return state | {'param_groups': groups}

    def own_rate(opt):
        """Whatever device the checkpoint came from."""
        for group in opt.param_groups:
            rate.fill_(group['lr'])
            group |= {'lr': rate, 'fused': True, 'foreach': False}

    opt.register_step_pre_hook(zero_momentum)
    opt.register_state_dict_post_hook(plain_rate)
    opt.register_load_state_dict_post_hook(own_rate)
    return opt
