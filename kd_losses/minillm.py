"""MiniLLM: reverse KL by policy gradient on sampled answers, with its single-step part in closed form.

Y. Gu, L. Dong, F. Wei, M. Huang, "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024,
arXiv:2306.08543.

    rollout, once per sample, y_t from mix * p + (1 - mix) * q:  lq, lp = log q(y_t), log p(y_t) at that time
        reward_t = clip((lp - lq) / reward_scale), weight_t = 1 / (1 - mix + mix * exp(lp - lq))
    R_t = sum over t' >= t of gamma^(t'-t) reward_t' / number of tokens from t on;  A = R, standardised
    r = exp(log q(y_t) now - lq) * weight_t
    pg = mean over tokens of max(-A r, -A clamp(r, 1 - clip, 1 + clip))
    reg = mean over tokens of KL(q, p)                                                     (ReverseKL)
    loss = pg + reg
    lm_term = (1 - kd_ratio) * cross-entropy - kd_ratio * sum of p log q, on plain text, added with weight 1

Tap: logits of student and teacher at the positions that predict the answer's tokens. Start from a
fine-tuned student; a round samples, then passes over the samples several times. ReverseKL alone is the
plain loss.

Differences: the authors' code with the population variance, which is what their trainer runs: mean and
variance are of all processes where torch.distributed is initialised. Exponents are clamped at 20. In
ReverseKL and lm_term positions of target -100 reach neither value nor gradient; a class of -inf counts
nothing. Memory: a chunk of positions at a time is in float32, in backward again.

Source: microsoft/LMOps, minillm/minillm/losses.py (Loss), minillm/minillm/reward.py,
minillm/minillm/sampler.py.

Use:
    >>> import torch
    >>> from minillm import MiniLLM, rollout
    >>> out_s, out_t = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 5, 9)
    >>> y = torch.ones(2, 5).long()
    >>> sampled = rollout(out_s, out_t, tokens=y, mask=torch.ones(2, 5))
    >>> MiniLLM()(out_s, out_t, y, torch.ones(2, 5), *sampled).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**19  # logits in float32 at a time; on a GPU eight times as many, for fewer launches


class MiniLLM(nn.Module):
    """Clipped policy gradient of reverse KL on sampled answers, and its single-step term.

    Args:
        gamma: discount of later rewards, 0.95.
        clip: how far the ratio to the sampling student counts, 0.2.
        single_step: add reverse KL at every token.

    Shape:
        out_s, out_t: (N, L, K) logits at the positions that predict the tokens, the prompt's last one first;
        tokens: (N, L) the answers; mask: (N, L) 1 up to the first end of sequence, itself included, then 0
        (what tokens say there is not read). logp_old, reward, weight: (N, L), of `rollout`.
        Returns a scalar; `terms` (pg, reg); `advantage` (R, A), (N, L) each. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: clip is not positive; shapes that differ; K < 2; a token that is no class.
    """

    def __init__(self, gamma: float = 0.95, clip: float = 0.2, single_step: bool = True) -> None:
        super().__init__()
        if not clip > 0:
            raise ValueError(f'MiniLLM: clip must be > 0, got {clip}')
        self.gamma, self.clip, self.single_step = gamma, clip, single_step

    def forward(
        self,
        out_s: Tensor,
        out_t: Tensor,
        tokens: Tensor,
        mask: Tensor,
        logp_old: Tensor,
        reward: Tensor,
        weight: Tensor,
    ) -> Tensor:
        pg, reg = self.terms(out_s, out_t, tokens, mask, logp_old, reward, weight)
        return pg + reg

    def terms(self, out_s, out_t, tokens, mask, logp_old, reward, weight) -> tuple[Tensor, Tensor]:
        rows, rows_t, index, counts = _answers('MiniLLM', out_s, out_t, tokens, mask)
        for name, x in (('logp_old', logp_old), ('reward', reward), ('weight', weight)):
            _expect('MiniLLM', name, x, *tokens.shape)
        logp = _by_position(_log_probability, rows, index, counts)
        old, weight, advantage = (
            _full(x.detach(), out_s).flatten() for x in (logp_old, weight, self.advantage(reward, mask)[1])
        )
        ratio = ((logp - old) * counts).clamp(max=20).exp() * weight
        ratio = ratio + 0 * (old + weight)  # what a limit or an exponential would hide is not finite
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        pg = _mean(torch.maximum(-advantage * ratio, -advantage * clipped), counts)
        if not self.single_step:
            return pg, torch.zeros_like(pg)
        return pg, _mean(_by_position(_reverse_kl, rows, rows_t, counts), counts)

    @torch.no_grad()
    def advantage(self, reward: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        _expect('MiniLLM', 'reward', reward, 'N', 'L')
        _expect('MiniLLM', 'mask', mask, *reward.shape)
        reward, mask = _full(reward), mask != 0
        summed, total = [], torch.zeros_like(reward[:, 0])
        for column in reward.unbind(dim=1)[::-1]:
            total = column + self.gamma * total
            summed.append(total)
        left = mask.flip(1).cumsum(dim=1).flip(1)
        R = torch.stack(summed[::-1], dim=1) / torch.where(mask, left, 1)
        mean = _mean_of_all(R)
        return R, (R - mean) / (_mean_of_all((R - mean).square()) + 1e-8).sqrt()


def _mean_of_all(x: Tensor) -> Tensor:
    """Of all processes, as the authors normalise."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x.mean()
    both = torch.stack([x.sum(), torch.full_like(x.sum(), x.numel())])
    torch.distributed.all_reduce(both)
    return both[0] / both[1]


class ReverseKL(nn.Module):
    """KL from the student to the teacher: the single-step term, and a loss of its own.

    Args:
        temperature: of both softmaxes, > 0; 1. The loss is not multiplied by its square.

    Shape:
        out_s, out_t: (N, L, K) or (N, K) logits of the same tokens and classes, K >= 2.
        target: (N, L) or (N,) integers, aligned with the logits (those at i predict target[i]); positions of
        -100 are left out, ids of 0 and up count, also unknown ones; None: every position counts.
        Returns a scalar. No gradient reaches out_t. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: temperature is not positive; shapes that differ; K < 2; an id below 0.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f'ReverseKL: temperature must be > 0, got {temperature}')
        self.temperature = temperature

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor | None = None) -> Tensor:
        rows, rows_t, counts = _tokens('ReverseKL', out_s, out_t, target)

        def divergence(out_s, out_t, counts):
            return _reverse_kl(out_s, out_t, counts, self.temperature)

        return _mean(_by_position(divergence, rows, rows_t, counts), counts)


@torch.no_grad()
def rollout(
    out_old: Tensor,
    out_t: Tensor,
    tokens: Tensor,
    mask: Tensor,
    mix: float | None = 0.2,
    reward_scale: float = 0.5,
    reward_clip: float = 100.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp_old, reward, weight of sampled answers, (N, L) each; once per sample, before the student moves.

    out_old: the student's logits at that time; mix: the teacher's share of the sampling, 0 or None without
    it. reward_scale divides the reward, which then ends at +-reward_clip.
    """
    rows, rows_t, index, counts = _answers('rollout', out_old, out_t, tokens, mask)
    logp_old, logp_t = (
        torch.where(counts, _by_position(_log_probability, _as(x, rows), index, counts), 0.0)
        for x in (rows, rows_t)
    )
    reward = ((logp_t - logp_old) / reward_scale).clamp(-reward_clip, reward_clip)
    weight = torch.ones_like(reward)
    if mix:
        weight = torch.where(counts, 1 / (1 - mix + mix * (logp_t - logp_old).exp()), 1.0)
    return tuple(x.reshape(tokens.shape) for x in (logp_old, reward, weight))


def lm_term(out_s: Tensor, out_t: Tensor, target: Tensor, kd_ratio: float = 0.5) -> Tensor:
    """Cross-entropy with the data and with the teacher, on plain text."""
    rows, rows_t, counts = _tokens('lm_term', out_s, out_t, target)
    index, _ = _labels('lm_term', target.flatten(), *rows.shape)

    def each(out_s, out_t, index, counts):
        log_q, log_p = _log_pair(out_s, out_t, counts)
        soft = -(log_p.exp() * log_q).sum(dim=1)
        return (1 - kd_ratio) * -_log_probability(out_s, index, counts) + kd_ratio * soft

    return _mean(_by_position(each, rows, rows_t, index, counts), counts)


def _answers(who: str, out_s: Tensor, out_t: Tensor, tokens: Tensor, mask: Tensor) -> tuple:
    """Rows of both, the token of each (0 where none counts), and which count."""
    _tensors(who, out_s=out_s)
    if out_s.dim() != 3:
        raise ValueError(
            f'{who}: out_s must be (N, L, K), got {tuple(out_s.shape)}: unsqueeze or flatten axes'
        )
    rows, rows_t, _ = _tokens(who, out_s, out_t)
    _expect(who, 'tokens', tokens, *out_s.shape[:2])
    _expect(who, 'mask', mask, *out_s.shape[:2])
    counts = mask.flatten() != 0
    index, _ = _labels(who, torch.where(counts, tokens.flatten(), -100), *rows.shape, 'tokens')
    return rows, rows_t, index, counts


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x.double() if like.dtype == torch.float64 else x


def _log_probability(out: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    return F.log_softmax(_filled(_full(out), counts), dim=1).gather(1, index[:, None]).squeeze(1)


def _reverse_kl(out_s: Tensor, out_t: Tensor, counts: Tensor | None, T: float = 1.0) -> Tensor:
    log_q, log_p = _log_pair(out_s, out_t, counts, T)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)


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


def _log_pair(out_s: Tensor, out_t: Tensor, counts: Tensor | None, T: float = 1.0) -> tuple[Tensor, Tensor]:
    """log q and log p; both 0 at a class that either network forbids with -inf, which so counts nothing."""
    s, t = (_filled(_full(x, out_s), counts) for x in (out_s, out_t))
    log_q, log_p = (F.log_softmax(x if T == 1 else x / T, dim=1) for x in (s, t))
    gone = (log_q == -torch.inf) | (log_p == -torch.inf)
    return log_q.masked_fill(gone, 0.0), log_p.masked_fill(gone, 0.0)


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


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


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
    """A part of this round's answers, and the plain batch that it stands beside."""
    r = batch.rollouts(rollout)
    first = r.x.shape[1] - r.tokens.shape[1]  # the prompt's last position predicts the first token
    out_s, out_t = (out[:, first:] for out in (batch.student(r.x).out, r.t.out))
    loss = kd(out_s, out_t, r.tokens, torch.ones_like(r.tokens), r.logp_old, r.reward, r.weight)
    return loss + lm_term(s.out, t.out, batch.target)
