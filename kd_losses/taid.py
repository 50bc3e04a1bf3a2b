"""TAID, temporally adaptive interpolated distillation: the target moves from the student to the teacher.

M. Shing, K. Misaki, H. Bao, S. Yokoi, T. Akiba, "TAID: Temporally Adaptive Interpolated Distillation for
Efficient Knowledge Transfer in Language Models", ICLR 2025, arXiv:2501.16937.

    r = softmax((1 - t) * out_s + t * out_t), a constant
    loss = mean over positions of - sum over k of r * log softmax(out_s)        (without r's entropy: never 0)
    in training, after each call:  c = (loss_before - loss) / loss_before
        momentum <- beta * momentum + (1 - beta) * c;   delta = alpha * sigmoid(momentum) * (1 - t)
        t <- min(t_end, max(t_start + (t_end - t_start) * progress, t + delta))

Tap: the logits, and progress = steps done / all steps. One loss per student; t, momentum and the loss
before are buffers (float64), so a checkpoint has them.

The relative change c is tiny: t grows by about alpha / 2 * (1 - t) a step, which leads the straight line
only in runs of more than 2 / alpha = 4,000 steps; for a shorter one take alpha about 8 / steps.

Differences: the authors' module, which also moves t in validation; here only in training mode and with
gradients, not after a loss that is not finite or of no position, and under torchrun with the mean loss of all
processes. Positions of target -100 reach neither value nor gradient, whatever stands in their logits; a class
of -inf in either network counts nothing. Memory: a chunk of positions at a time is in float32, in backward
again.

Source: SakanaAI/TAID, src/distil_losses/taid.py (TAID), src/distil_losses/fkl.py.

Use:
    >>> import torch
    >>> from taid import TAID
    >>> out_s, out_t = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 5, 9)
    >>> target = torch.tensor([[-100, -100, 1, 1, 1], [-100, 1, 1, 1, -100]])
    >>> TAID()(out_s, out_t, target).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**19  # logits in float32 at a time; on a GPU eight times as many, for fewer launches


class TAID(nn.Module):
    """Cross-entropy with an interpolation of both networks that moves to the teacher.

    Args:
        t_start: the teacher's share at the start, 0 to 1; 0.4 (authors: 0.2 for unlike networks).
        t_end: at the end, 1.
        alpha: how fast it moves beyond the straight line, 5e-4.
        beta: momentum, 0.99.
        adaptive: False: the straight line alone.

    Shape:
        out_s, out_t: (N, L, K) or (N, K) logits of the same tokens and classes, K >= 2.
        target: (N, L) or (N,) integers, aligned with the logits (those at i predict target[i]); positions of
        -100 are left out, ids of 0 and up count, also unknown ones; None: every position counts.
        Returns a scalar. No gradient reaches out_t. Computed in float32, or in float64 as the student.
        progress: steps done / all steps, 0 at the first one.

    Raises:
        ValueError: 0 <= t_start <= t_end <= 1 does not hold; shapes that differ; K < 2; an id below 0;
            progress, if a number, is not in [0, 1].
    """

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= t_start <= t_end <= 1:
            raise ValueError(
                f'TAID: t_start and t_end must be 0 <= t_start <= t_end <= 1, got {t_start}, {t_end}'
            )
        self.t_start, self.t_end, self.alpha, self.beta, self.adaptive = t_start, t_end, alpha, beta, adaptive
        for name, value in (('t', t_start), ('prev_loss', float('inf')), ('momentum', 0.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def forward(
        self, out_s: Tensor, out_t: Tensor, target: Tensor | None = None, progress: Tensor | float = 0.0
    ) -> Tensor:
        if not isinstance(progress, Tensor) and not 0 <= progress <= 1:
            raise ValueError(f'TAID: progress must be in [0, 1], got {progress}: steps done / all steps')
        rows, rows_t, counts = _tokens('TAID', out_s, out_t, target)
        t = self.t.clone()  # backward may come after the update

        def cross_entropy(out_s, out_t, counts):
            s, r = _filled(_full(out_s), counts), _filled(_full(out_t, out_s), counts)
            with torch.no_grad():  # 0 times an infinite logit would be NaN
                alone = s + torch.where(r == -torch.inf, 0.0, 0 * r)  # a teacher's NaN shows at t = 0, too
                r = torch.where(t == 0, alone, torch.where(t == 1, r, (1 - t) * s + t * r)).softmax(dim=1)
            log_q = F.log_softmax(s, dim=1)
            return -(r * log_q.masked_fill(log_q == -torch.inf, 0.0)).sum(dim=1)

        loss = _mean(_by_position(cross_entropy, rows, rows_t, counts), counts)
        if self.training and torch.is_grad_enabled():
            self._move(loss.detach(), counts, progress)
        return loss

    @torch.no_grad()
    def _move(self, loss: Tensor, counts: Tensor | None, progress: Tensor | float) -> None:
        x = loss.to(self.t.dtype)
        has = torch.ones_like(x) if counts is None else counts.any().to(x)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            both = torch.stack([x * has, has])  # a process without a position has no loss to say
            torch.distributed.all_reduce(both)
            x, has = both[0] / both[1].clamp(min=1), both[1]
        first = self.prev_loss == torch.inf
        change = torch.where(first, 0.0, (self.prev_loss - x) / (self.prev_loss + 1e-15))
        momentum = torch.where(first, self.momentum, self.beta * self.momentum + (1 - self.beta) * change)
        line = self.t_start + (self.t_end - self.t_start) * progress
        # a number is filled in on the device: copying it there would wait
        t = line.to(self.t) if isinstance(line, Tensor) else torch.full_like(self.t, line)
        if self.adaptive:
            t = torch.maximum(t, self.t + self.alpha * momentum.sigmoid() * (1 - self.t))
        t = torch.where(first, self.t, t.clamp(max=self.t_end))
        good = torch.isfinite(x) & (has > 0)
        for name, new in (('t', t), ('prev_loss', x), ('momentum', momentum)):
            buffer = getattr(self, name)
            buffer.copy_(torch.where(good, new, buffer))

    def _apply(self, fn, *args, **kwargs):
        """half() and to(dtype) leave the state alone: 0.4 in float32 is another number."""
        kept, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, *args, **kwargs)
        finally:  # a move that fails leaves them here
            self._buffers = kept
        self._buffers = {name: _moved_by(x, fn) for name, x in kept.items()}
        return self


def _moved_by(x: Tensor, fn) -> Tensor:
    """x where fn sends it, still in float64; in float32 where the device has none (Apple's)."""
    place = fn(torch.zeros((), device=x.device)).device
    x = x.float() if place.type == 'mps' else x
    moved = fn(x)
    moved = moved if moved.dtype == x.dtype else x.to(place)
    return moved if place.type == 'mps' else moved.double()


def _tensors(who: str, **given: Tensor) -> None:
    """Refuse what is none, as the object is that a network of transformers returns."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(
                f'{who}: {name} must be a tensor, got {type(x).__name__}: of what a network returns give '
                'out.logits as logits, out.hidden_states[-1] as hidden states'
            )


def _no_mask(who: str, name: str, target: Tensor) -> None:
    if target.dtype == torch.bool:  # its padding would count as id 0
        raise ValueError(
            f'{who}: {name} must be integers, got torch.bool: a mask is no target, give '
            'input_ids.masked_fill(mask == 0, -100)'
        )


def _tokens(
    who: str, out_s: Tensor, out_t: Tensor, target: Tensor | None = None, of: str = ''
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both logits as (positions, K), the teacher's detached, and which positions count; None: all."""
    _tensors(who, **{f'out_s{of}': out_s, f'out_t{of}': out_t})
    rows = out_s.flatten(0, 1) if out_s.dim() == 3 else out_s
    _expect(who, f'out_s{of}', rows, 'N', 'K')
    shape = tuple(out_s.shape)
    if out_t.shape != out_s.shape:
        raise ValueError(
            f'{who}: out_t{of} must be {shape}, got {tuple(out_t.shape)}: the same tokens and classes; a '
            'padded vocabulary is cut, out[..., :K], other tokenizers need ULD or DSKDCMA'
        )
    if target is not None and (target.shape != shape[:-1] or target.is_floating_point()):
        raise ValueError(
            f'{who}: target{of} must be {shape[:-1]} of integers, got {tuple(target.shape)} of '
            f'{target.dtype}: one per position, aligned: logits at i predict target[i]'
        )
    if target is None:
        return rows, out_t.detach().reshape(rows.shape), None
    _no_mask(who, f'target{of}', target)
    flat = target.reshape(-1).long()  # -100 is 156 in eight bits
    counts = flat != -100
    if flat.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)():
        wrong = torch.where(counts, flat, 0).amin().view(1).tolist()[0]
        if wrong < 0:
            raise ValueError(
                f'{who}: target{of} must be ids from 0 up, or -100 to leave a position out, got {wrong}: set '
                'the mark of your padding to -100'
            )
    return rows, out_t.detach().reshape(rows.shape), counts


def _filled(x: Tensor, counts: Tensor | None) -> Tensor:
    """Positions that do not count become 0 before anything is computed: not even a NaN gets through."""
    return x if counts is None else torch.where(counts[:, None], x, 0.0)


def _by_position(rows, *inputs: Tensor | None) -> Tensor:
    """rows(*inputs), a value or more per position, with some CHUNK logits in float32 at a time."""
    n, k = inputs[0].shape
    size = max(CHUNK * (1 if inputs[0].device.type == 'cpu' else 8) // k, 1)
    return rows(*inputs) if n <= size else _InChunks.apply(rows, size, *inputs)


def _part(inputs: list, i: int, size: int) -> list:
    return [x if x is None else x[i : i + size] for x in inputs]


class _InChunks(torch.autograd.Function):
    """rows(*inputs) over chunks of positions. Backward computes each chunk again, with its gradient: nothing
    as large as the logits is kept but the gradient itself, in the precision of the logits."""

    @staticmethod
    def forward(ctx, rows, size, *inputs):
        ctx.rows, ctx.size, learns = rows, size, ctx.needs_input_grad[2:]
        ctx.save_for_backward(*(x for x, learn in zip(inputs, learns) if learn))
        # a teacher's tensor may be of torch.inference_mode, which cannot be saved
        ctx.rest = [None if learn else x for x, learn in zip(inputs, learns)]
        values = None
        for i in range(0, len(inputs[0]), size):  # small values kept between large ones scatter memory
            part = rows(*_part(inputs, i, size))
            values = part.new_empty(len(inputs[0]), *part.shape[1:]) if values is None else values
            values[i : i + size] = part
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        saved, learns = iter(ctx.saved_tensors), ctx.needs_input_grad[2:]
        inputs = [next(saved) if learn else x for x, learn in zip(ctx.rest, learns)]
        grads = [torch.empty_like(x) if learn else None for x, learn in zip(inputs, learns)]
        for i in range(0, len(inputs[0]), ctx.size):
            part = _part(inputs, i, ctx.size)
            with torch.enable_grad():
                part = [x.detach().requires_grad_() if learn else x for x, learn in zip(part, learns)]
                values = ctx.rows(*part)
            leaves = [x for x, learn in zip(part, learns) if learn]
            made = iter(
                torch.autograd.grad(values, leaves, grad_out[i : i + ctx.size], materialize_grads=True)
            )
            for grad in grads:
                if grad is not None:
                    grad[i : i + ctx.size] = next(made)
        return None, None, *grads


def _expect(who: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """Refuse another shape and say what to do. A letter is an axis of any length but 0, for K (classes) 1."""
    got = tuple(x.shape)
    right = [n > int(w == 'K') if isinstance(w, str) else n == w for n, w in zip(got, wanted)]
    if len(got) == len(wanted) and all(right) and 0 not in got:
        return
    if 0 in got:
        remedy = 'leave an empty batch out'
    elif len(got) == 2 and len(wanted) == 1:
        remedy = 'a number per row: x.flatten() of (N, 1) or (N, L), x.argmax(1) of one-hot labels'
    elif len(got) > len(wanted) and len(wanted) < 3:
        remedy = (
            'classes last, then flatten: x.movedim(1, -1).flatten(0, 2) for (N, K, H, W), x.flatten(0, 1) '
        )
        remedy += 'for (N, L, V), target.flatten()'
    elif len(wanted) == 4 and len(got) in (3, 5):
        remedy = 'x[..., None] makes a map of (N, C, L), x.flatten(3) one of (N, C, D, H, W)'
    elif len(got) != len(wanted):
        remedy = 'unsqueeze or flatten axes'
    elif not right[0]:
        remedy = 'all arguments need the samples of one batch (drop_last=True if the last one is smaller)'
    elif got[1] == 1 and 'K' in wanted:
        remedy = 'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
    elif not right[1]:
        remedy = 'give channels, widths or classes as the loss was built for, or as the other side has them'
    else:
        remedy = 'bring maps to one size, F.adaptive_avg_pool2d'
    shape = ', '.join(map(str, wanted)) + ',' * (len(wanted) == 1)
    raise ValueError(f'{who}: {name} must be ({shape}), got {got}: {remedy}')


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.out, t.out, batch.target, progress=batch.progress)


def feed_images(kd, s, t, batch):
    """Of images every one counts, also those without a label; the line moves once an epoch."""
    return kd(s.out, t.out, progress=batch.epoch / batch.epochs)


def build(loss, probe, **options):
    """The authors' ratio of alpha to the length, 16,000 steps there (from memory, unverified)."""
    return loss(**{'alpha': 8 / probe.steps, **options})


def build_images(loss, probe, **options):
    """The same ratio."""
    return loss(**{'alpha': 8 / (probe.epochs * probe.train_set.steps(probe.batch_size)), **options})
