"""DOT, distillation-oriented trainer: an optimiser with more momentum for distillation than for the task.

B. Zhao, Q. Cui, R. Song, J. Liang, "DOT: A Distillation-Oriented Trainer", ICCV 2023.

    loss = loss_task + loss_kd, kept apart: each has its gradient, g_task and g_kd
    B    <- (momentum - delta) * B    + (1 - dampening) * (g_task + weight_decay * p)
    B_kd <- (momentum + delta) * B_kd + (1 - dampening) * g_kd
    p    <- p - lr * (B + B_kd)
    a parameter with only one of the gradients: plain momentum and weight decay

Tap: any loss that can be separated from cross-entropy. Per step: forward once; zero_grad();
loss_kd.backward(retain_graph=True); step_kd(); zero_grad(); loss_task.backward(); step().

Differences: the authors' updates, quirks included: a buffer starts as the gradient itself, and a parameter
with only the distillation gradient gets no weight decay at its first step. Several parameter groups work
here; the gradients are copied by step_kd, so either way of zero_grad is safe.

Source: megvii-research/mdistiller, mdistiller/engine/dot.py and mdistiller/engine/trainer.py.

Use:
    >>> import torch
    >>> from dot import DOT
    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> opt = DOT([p], lr=0.1)  # then, for each batch:
    >>> opt.zero_grad(); p.sum().backward(); opt.step_kd()
    >>> opt.zero_grad(); p.square().sum().backward(); opt.step(); p.max() < 1
    tensor(True)
"""

import torch
from torch import Tensor


class DOT(torch.optim.Optimizer):
    """SGD with two momentum buffers.

    Args:
        params: parameters or groups of them.
        lr: learning rate, >= 0.
        momentum: 0.9.
        delta: what is moved from the task's momentum to the distillation's, 0 <= delta <= momentum and
            delta < 1 - momentum; 0.075 on CIFAR-100, 0.09 on ImageNet.
        weight_decay, dampening: as in SGD; 0.

    Shape:
        gradients of the parameters' shapes. `step_kd()` stores the current gradients as the distillation's,
        `step()` takes the current ones as the task's and moves the parameters; without step_kd it is SGD with
        momentum. step_kd() replaces what it stored: gradients of micro-batches are not gathered. Not under a
        GradScaler: what step_kd stored would stay scaled. bfloat16 needs none.
        DistributedDataParallel averages the first backward after a forward only: with two, every process
        would go its own way. Run forward and both inside `net.no_sync()`, and all_reduce each gradient,
        divided by the number of processes, before step_kd() and before step().

    Raises:
        ValueError: an argument is out of its range. RuntimeError: a GradScaler calls step.
    """

    _step_supports_amp_scaling = True  # a GradScaler then shows itself by setting grad_scale before step

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f'DOT: lr and weight_decay must be >= 0, got {lr} and {weight_decay}')
        defaults = {'lr': lr, 'momentum': momentum, 'delta': delta, 'weight_decay': weight_decay}
        super().__init__(params, defaults | {'dampening': dampening})
        self._kd = {}  # parameter -> its distillation gradient, between step_kd and step

    def add_param_group(self, param_group: dict) -> None:
        momentum, delta = ((self.defaults | param_group)[key] for key in ('momentum', 'delta'))
        if not (0 <= delta <= momentum and delta < 1 - momentum):
            raise ValueError(
                f'DOT: 0 <= delta <= momentum and delta < 1 - momentum are needed, got {delta} and {momentum}'
            )
        super().add_param_group(param_group)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._kd = getattr(self, '_kd', {})  # a copy or a pickle has none

    @torch.no_grad()
    def step_kd(self) -> None:
        self._kd = {
            p: p.grad.clone() for group in self.param_groups for p in group['params'] if p.grad is not None
        }

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the stored and the current gradients."""
        if hasattr(self, 'grad_scale'):
            raise RuntimeError(
                'DOT: does not work with a GradScaler, the gradients that step_kd() stored are still scaled; '
                'use autocast in bfloat16, which needs no scaler'
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            decay, momentum, delta = group['weight_decay'], group['momentum'], group['delta']
            moves = []
            for p in group['params']:
                g_kd = self._kd.get(p)
                both = p.grad is not None and g_kd is not None
                if p.grad is not None:
                    mu = momentum - delta if both else momentum
                    moves.append((p, self._buffer(p, 'momentum_buffer', p.grad, decay, mu, group)))
                if g_kd is not None:
                    mu = momentum + delta if both else momentum
                    first = 'momentum_kd_buffer' not in self.state[p]
                    kd_decay = 0.0 if both or first else decay
                    moves.append((p, self._buffer(p, 'momentum_kd_buffer', g_kd, kd_decay, mu, group)))
            for p, buffer in moves:  # after all buffers: the decay above sees the parameters unmoved
                p.sub_(buffer, alpha=group['lr'])
        self._kd = {}
        return loss

    def _buffer(self, p: Tensor, key: str, grad: Tensor, decay: float, mu: float, group: dict) -> Tensor:
        d = grad.add(p, alpha=decay) if decay else grad
        state = self.state[p]
        if key in state:
            state[key].mul_(mu).add_(d, alpha=1 - group['dampening'])
        else:
            state[key] = d.clone()
        return state[key]


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def build(loss, probe, delta: float = 0.075, **options):
    """The loss beside which this optimiser works; delta goes with it."""
    kd = loss(**options)
    kd.delta = delta
    return kd


def optimiser(kd, parameters, args):
    if not 0 <= kd.delta <= args.momentum < 1 - kd.delta:
        raise ValueError(
            f'DOT: --momentum {args.momentum} and delta {kd.delta} do not fit: --kd_args delta=X (of several '
            f'methods dot.delta=X), 0 <= X <= momentum and momentum + X < 1'
        )
    return DOT(parameters, args.lr, args.momentum, kd.delta, args.weight_decay)


def update(opt, loss_ce, loss_kd, epoch):
    """A gradient for each loss."""
    opt.zero_grad(set_to_none=True)
    loss_kd.backward(retain_graph=True)
    opt.step_kd()
    opt.zero_grad(set_to_none=True)
    loss_ce.backward()
    opt.step()
