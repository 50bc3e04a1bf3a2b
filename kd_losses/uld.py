"""ULD, universal logit distillation: compare sorted probabilities, so vocabularies may differ.

N. Boizard, K. El Haddad, C. Hudelot, P. Colombo, "Towards Cross-Tokenizer Distillation: the Universal Logit
Distillation Loss for LLMs", TMLR 2025 (venue unverified), arXiv:2402.12030.

    per text: S = rows of out_s where target counts, R = of out_t where target_t does, l = min(|S|, |R|)
    q_j, p_j = softmax(S_j / T_s), softmax(R_j / T_t), each sorted, the shorter padded with zeros
    u = 1/l * sum over j < l and k of |q_j(k) - p_j(k)|
    loss = mean over texts of u

Tap: the logits of both networks on the same texts, each in its own tokens. Authors: weight 1.5 beside
cross-entropy, which it needs, since only the shape of a sorted distribution is compared.

Differences: the authors' loss with targets that are aligned; their code finds the first logit from labels
that are not. Its logits are overwritten by probabilities. A text without a pair of positions is NaN there,
0 here. Memory: a chunk of positions at a time is in float32, in backward again.

Source: Nicolas-BZRD/llm-recipes, models/distillation_model.py (DistillationLoss).

Use:
    >>> import torch
    >>> from uld import ULD
    >>> out_s, out_t = torch.randn(2, 7, 9, requires_grad=True), torch.randn(2, 5, 13)
    >>> target, target_t = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    >>> ULD()(out_s, out_t, target, target_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**19  # logits in float32 at a time; on a GPU eight times as many, for fewer launches


class ULD(nn.Module):
    """Distance of sorted next-token probabilities of two networks with their own vocabularies.

    Args:
        T_s, T_t: temperatures of student and teacher, > 0; 1.
        skip_eos_s, skip_eos_t: leave out the last position that counts, which predicts the end of the
            text; True and False as in the authors' script.

    Shape:
        out_s: (N, L, K_s), out_t: (N, M, K_t) logits of the same N texts; target: (N, L), target_t: (N, M)
        integers, aligned (logits at i predict target[i]); positions of -100 are left out, ids of 0
        and up count, also unknown ones. Those that count are one block of each text (the answer; unchecked).
        Returns a scalar; `per_sample` (N,). No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a temperature is not positive; a wrong shape; K_s or K_t < 2; an id below 0.
    """

    def __init__(
        self, T_s: float = 1.0, T_t: float = 1.0, skip_eos_s: bool = True, skip_eos_t: bool = False
    ) -> None:
        super().__init__()
        if not (T_s > 0 and T_t > 0):
            raise ValueError(f'ULD: T_s and T_t must be > 0, got {T_s} and {T_t}')
        self.T_s, self.T_t, self.skip_eos_s, self.skip_eos_t = T_s, T_t, bool(skip_eos_s), bool(skip_eos_t)

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor, target_t: Tensor) -> Tensor:
        return self.per_sample(out_s, out_t, target, target_t).mean()

    def per_sample(self, out_s: Tensor, out_t: Tensor, target: Tensor, target_t: Tensor) -> Tensor:
        rows_s, counts_s = _of_texts('ULD', 'out_s', out_s, 'target', target)
        rows_t, counts_t = _of_texts('ULD', 'out_t', out_t, 'target_t', target_t)
        _expect('ULD', 'out_t', out_t.detach(), len(out_s), 'M', 'K')
        rows_t = rows_t.detach()
        lengths = [
            (counts.sum(dim=1) - int(skip)).clamp(min=0)
            for counts, skip in ((counts_s, self.skip_eos_s), (counts_t, self.skip_eos_t))
        ]
        length = torch.minimum(*lengths)
        # the j-th position of a student's answer has the j-th of the teacher's as its partner
        rank = counts_s.cumsum(dim=1) - 1
        paired = counts_s & (rank < length[:, None])
        places = (~counts_t).to(torch.uint8).argsort(dim=1, stable=True)  # those that count come first
        place = places.gather(1, rank.clamp(0, places.shape[1] - 1))
        partner = place + torch.arange(len(out_t), device=place.device)[:, None] * out_t.shape[1]

        def distance(out_s, partner, paired):
            q = (_filled(_full(out_s), paired) / self.T_s).softmax(dim=1)
            p = (_filled(_full(rows_t[partner], out_s), paired) / self.T_t).softmax(dim=1)
            q, p = (x.sort(dim=1, descending=True).values for x in (q, p))
            k = max(q.shape[1], p.shape[1])
            return (F.pad(q, (0, k - q.shape[1])) - F.pad(p, (0, k - p.shape[1]))).abs().sum(dim=1)

        each = _by_position(distance, rows_s, partner.flatten(), paired.flatten()).reshape(paired.shape)
        return torch.where(paired, each, 0.0).sum(dim=1) / length.clamp(min=1)


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


def _of_texts(who: str, name: str, out: Tensor, labels: str, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, L, K) logits as rows, and which positions count."""
    _tensors(who, **{name: out})
    if out.dim() != 3:
        raise ValueError(
            f'{who}: {name} must be (N, L, K), got {tuple(out.shape)}: unsqueeze or flatten axes'
        )
    rows = out.flatten(0, 1)
    _expect(who, name, rows, 'N', 'K')
    if target.shape != out.shape[:2] or target.is_floating_point():
        raise ValueError(
            f'{who}: {labels} must be {tuple(out.shape[:2])} of integers, got {tuple(target.shape)} of '
            f'{target.dtype}: one per position, aligned: logits at i predict target[i]'
        )
    _no_mask(who, labels, target)
    target = target.long()  # -100 is 156 in eight bits
    counts = target != -100
    if target.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)():
        wrong = torch.where(counts, target, 0).amin().view(1).tolist()[0]
        if wrong < 0:
            raise ValueError(
                f'{who}: {labels} must be ids from 0 up, or -100 to leave a position out, got {wrong}: set '
                'the mark of your padding to -100'
            )
    return rows, counts


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """The same texts in the teacher's own tokens."""
    other = batch.second()
    return kd(s.out, other.t.out, batch.target, other.target)
