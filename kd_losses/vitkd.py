"""ViTKD: a vision transformer mimics its teacher's shallow tokens and generates the deep ones.

Z. Yang, Z. Li, A. Zeng, Z. Li, C. Yuan, Y. Li, "ViTKD: Practical Guidelines for ViT Feature Knowledge
Distillation", 2022, arXiv:2209.02432.

    a_i = linear map of the student's tokens i to the teacher's width (identity if the widths agree)
    mimicking = alpha / N * sum over i = 0, 1 and all elements of (a_i - tokens_t[i])^2
    keep = int(L * (1 - mask_ratio)) random tokens of each image; m = 1 at the others, the masked ones
    x = a_2 where m = 0, mask_token where m = 1, every token at its place
    y = generation(x): 3x3 convolution, ReLU, 3x3 convolution over the grid of patches
    generation = beta / (mask_ratio * N) * sum over masked tokens and channels of (y - tokens_t[2])^2
    loss = mimicking + generation

Tap: patch tokens, without class or distillation token, after block 1, after block 2, and after the last block
and the final layer norm, of both networks, which may be of different depth. The linear maps, mask_token and
the convolutions learn with the student. The authors add NKD with T = 1, gamma = 1, for their best results.

Differences: the authors' code, for grids that are not square as well. The sums are divided by N only, hence
the tiny weights: with means over all elements alpha and beta would be L * D_t times as large.

Source: yzd-v/cls_KD, mmcls/models/dis_losses/vitkd.py (ViTKDLoss), branch 1.0.

Use:
    >>> import torch
    >>> from vitkd import ViTKD
    >>> tokens_s = [torch.randn(8, 16, 12, requires_grad=True) for _ in range(3)]
    >>> ViTKD(12, 24)(tokens_s, [torch.randn(8, 16, 24) for _ in range(3)]).backward()
    >>> tokens_s[0].grad.norm() > 0
    tensor(True)
"""

import math

import torch
from torch import Tensor, nn


class ViTKD(nn.Module):
    """Squared errors of two shallow layers, and of a deep one that is generated from part of its tokens.

    Args:
        s_dim, t_dim: widths of the tokens.
        alpha, beta: weights of mimicking and of generation; 3e-5 and 3e-6.
        mask_ratio: share of tokens that are masked, in (0, 1]; 0.5.

    Shape:
        tokens_s: list of three (N, L, s_dim), tokens_t: list of three (N, L, t_dim), patches row by row.
        noise: (N, L); the int(L * (1 - mask_ratio)) smallest of an image are kept; None: drawn from
        generator. grid: (h, w) with h * w = L; None: a square. Returns a scalar. No gradient reaches
        tokens_t. `terms` returns (mimicking, generation), `mask` (N, L), 1 where a token is masked.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: mask_ratio is not in (0, 1]; a list is not of three; a tensor has another shape; L is not
            h * w, or no square.
    """

    def __init__(
        self, s_dim: int, t_dim: int, alpha: float = 3e-5, beta: float = 3e-6, mask_ratio: float = 0.5
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio <= 1:
            raise ValueError(f'ViTKD: mask_ratio must be in (0, 1], got {mask_ratio}')
        self.s_dim, self.t_dim = s_dim, t_dim
        self.alpha, self.beta, self.mask_ratio = alpha, beta, mask_ratio
        if s_dim != t_dim:
            self.align = nn.ModuleList(nn.Linear(s_dim, t_dim) for _ in range(3))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, t_dim))
        self.generation = nn.Sequential(
            nn.Conv2d(t_dim, t_dim, 3, padding=1), nn.ReLU(), nn.Conv2d(t_dim, t_dim, 3, padding=1)
        )

    def forward(
        self,
        tokens_s: list[Tensor],
        tokens_t: list[Tensor],
        noise: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        mimicking, generation = self.terms(tokens_s, tokens_t, noise, grid, generator)
        return mimicking + generation

    def terms(
        self,
        tokens_s: list[Tensor],
        tokens_t: list[Tensor],
        noise: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        N, L = self.check(tokens_s, tokens_t)
        if grid is None:
            grid = math.isqrt(L), math.isqrt(L)
        if grid[0] * grid[1] != L:
            raise ValueError(
                f'ViTKD: grid must be (h, w) with h * w = {L} tokens, got {tuple(grid)}: say grid=(h, w), '
                f'and leave class and distillation token out'
            )
        first = tokens_s[0]
        if noise is None:
            noise = torch.rand(N, L, device=first.device, **_by(generator))
        _expect('ViTKD', 'noise', noise, N, L)
        with _no_autocast(first):
            a = [_full(x, first) for x in tokens_s]
            t = [_full(x.detach(), first) for x in tokens_t]
            if self.s_dim != self.t_dim:
                a = [_run(align, x) for align, x in zip(self.align, a)]
            mimicking = sum((x - y).square().sum() for x, y in zip(a[:2], t[:2]))
            # products, not a choice: what is not finite must show, masked or not
            m = self.mask(noise).to(a[2])[..., None]
            x = a[2] * (1 - m) + _full(self.mask_token, first) * m
            y = _run(self.generation, x.mT.unflatten(2, grid)).flatten(2).mT
            generation = ((y - t[2]) * m).square().sum()
        return self.alpha / N * mimicking, self.beta / (self.mask_ratio * N) * generation

    def mask(self, noise: Tensor) -> Tensor:
        """(N, L) -> (N, L), 1 at the tokens to generate."""
        # truncated as the authors have it, also where 1 - mask_ratio is not exact: 10 * (1 - 0.9) gives 0
        keep = int(noise.shape[1] * (1 - self.mask_ratio))
        rank = noise.argsort(dim=1, stable=True).argsort(dim=1)
        return (rank >= keep).to(noise)

    def check(self, tokens_s: list[Tensor], tokens_t: list[Tensor]) -> tuple[int, int]:
        """N and L."""
        for name, tokens in (('tokens_s', tokens_s), ('tokens_t', tokens_t)):
            if len(tokens) != 3:
                raise ValueError(
                    f'ViTKD: {name} must be three tensors (N, L, D), got {len(tokens)}: those after block 1, '
                    f'block 2 and the final layer norm'
                )
        _expect('ViTKD', 'tokens_s[0]', tokens_s[0], 'N', 'L', self.s_dim)
        N, L = tokens_s[0].shape[:2]
        for i in range(3):
            _expect('ViTKD', f'tokens_s[{i}]', tokens_s[i], N, L, self.s_dim)
            _expect('ViTKD', f'tokens_t[{i}]', tokens_t[i], N, L, self.t_dim)
        return N, L


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


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


def _run(module: nn.Module, x: Tensor, *more):
    """module(x, ...) in the precision of x, whatever half() or double() has made of the parameters."""
    if all(p.dtype == x.dtype for p in module.parameters()):
        return module(x, *more)
    state = {name: _full(p, x) for name, p in module.named_parameters()}
    state |= {name: _full(b, x) if b.is_floating_point() else b for name, b in module.named_buffers()}
    y = torch.func.functional_call(module, state, (x, *more))
    with torch.no_grad():
        for name, b in module.named_buffers():  # running statistics
            if b is not state[name]:  # a copy onto itself is a change, which backward would refuse
                b.copy_(state[name])
    return y


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def _chosen(tokens) -> list[Tensor]:
    """After the first two blocks, and the last ones."""
    if len(tokens) < 3:
        raise ValueError(
            'ViTKD: needs student and teacher to be vision transformers of three blocks or more: vit_192_6, '
            'deit_128_6, torchvision:vit_b_16, or a Tap with tokens=...'
        )
    return [tokens[i] for i in (0, 1, -1)]


def build(loss, probe, **options):
    return loss(*(_chosen(f.tokens)[0].shape[2] for f in (probe.s, probe.t)), **options)


def feed(kd, s, t, batch):
    grid = tuple(s.fms[-1].shape[2:])  # of the patches
    return kd(_chosen(s.tokens), _chosen(t.tokens), None, grid, generator=batch.generator)
