"""Sums of an epoch, and the guard against a loss that is not finite."""

import torch
from torch import Tensor, nn

from engine.device import exact
from engine.errors import UserError
from engine.processes import processes, summed


class Meter:
    """Sums of one epoch, kept on the device: reading them is what waits, so it is done rarely.

    Also the guard against a non-finite loss, asked before backward. It looks at once, except on CUDA, where
    that would drain the queue at every step: there a fused optimiser is told to skip the update, and the
    step is remembered and shows at the next reading; one that is not fused cannot be told. `failure` then is
    a sentence that names run and step.

    at: how messages say where, before the number.
    Everything is changed in place, also by reset, so that a recorded step finds it where it was.
    """

    def __init__(self, name: str, epoch: int, device: torch.device, at: str = 'at epoch') -> None:
        self.name, self.failure, self.at = name, '', at
        self.sums = {}
        self.zero = torch.zeros((), device=device)
        self.steps = torch.zeros_like(self.zero, dtype=torch.int64)
        self.bad_step = torch.full_like(self.steps, -1)
        self.epoch = epoch

    def reset(self, epoch: int) -> None:
        """Begin another epoch."""
        self.epoch, self.failure = epoch, ''
        for value in (*self.sums.values(), self.steps):
            value.zero_()
        self.bad_step.fill_(-1)

    def guard(self, loss: Tensor, opt: torch.optim.Optimizer, *teachers: Tensor) -> bool:
        """Whether to go on with this step. teachers: what they say; -inf, a masked class, is legal."""
        value = loss.detach()
        if value.dim():
            got = tuple(value.shape)
            raise UserError(f'{self.name}: the loss must be one number, got {got}: leave reduction=none out')
        finite = torch.isfinite(value)
        for said in teachers:  # a loss may not look at all of it
            finite = finite & (said.detach() < torch.inf).all()
        here = finite
        if processes() > 1:  # all go on, or none
            finite = summed((~finite).float()) == 0
        if loss.device.type != 'cuda' or not opt.param_groups[0].get('fused'):
            if not finite:
                bad_teacher = any(not (said < torch.inf).all() for said in teachers)
                reason = 'in another process' if here else str(loss.item())
                reason = 'the teacher gives non-finite logits' if bad_teacher else reason
                self._fail(int(self.steps), reason)
            return bool(finite)
        opt.found_inf = (~finite).float()
        self.bad_step.copy_(torch.where((self.bad_step < 0) & ~finite, self.steps, self.bad_step))
        return True

    def _fail(self, step: int, reason: str) -> None:
        where = f'{self.at} {self.epoch + 1}, step {step + 1}'
        self.failure = f'{self.name}: the loss is not finite {where} ({reason})'

    def add(self, out: Tensor | None, target: Tensor, **losses: Tensor | float) -> None:
        """out: logits for the training accuracy; None in phases without a student."""
        n = len(target)
        # a plain number is filled in on the device: copying it there would wait
        values = {
            key: (loss.detach() if isinstance(loss, Tensor) else torch.full_like(self.zero, loss)) * n
            for key, loss in losses.items()
        }
        if out is not None:
            values['hits'] = (out.detach().argmax(dim=1) == target).sum()
        for key, value in {**values, 'n': torch.full_like(self.steps, n)}.items():
            self.sums.setdefault(key, torch.zeros_like(value)).add_(value)
        self.steps += 1

    def read(self, net: nn.Module | None = None) -> dict[str, float]:
        """Means over the epoch so far, top-1 in percent; empty after a failure.

        With `net`, at the end of an epoch, its weights are looked at too: a finite loss may have had a
        gradient that was not, and such weights must not reach the disk.
        """
        # a reading for the progress bar is one process's alone, and so no time to stop
        together = net is not None or processes() == 1
        if together and not self.failure and (bad := int(self.bad_step)) >= 0:
            self._fail(bad, 'found at the next reading')
        if not self.failure and net is not None and not all_finite(net):
            where = f'after {self.at.split()[-1]} {self.epoch + 1}, step {int(self.steps)}'
            self.failure = f'{self.name}: a weight is not finite {where}'
        if self.failure:
            return {}
        if not self.sums:
            return {}
        total = torch.stack([exact(value) for value in self.sums.values()])
        if net is not None:
            total = summed(total)
        sums = dict(zip(self.sums, total.tolist()))
        if not sums['n']:
            return {}
        means = {key: value / sums['n'] for key, value in sums.items() if key not in ('n', 'hits')}
        return means | ({'train_top1': 100 * sums['hits'] / sums['n']} if 'hits' in sums else {})


def all_finite(net: nn.Module) -> bool:
    """Whether all weights are: one reading from the device."""
    largest = nn.utils.get_total_norm(list(net.parameters()), norm_type=float('inf'))
    return bool(torch.isfinite(largest))
