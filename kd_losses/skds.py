"""SKDS, structured distillation: pixels, pairs of regions and the whole map of a dense prediction.

Y. Liu, K. Chen, C. Liu, Z. Qin, Z. Luo, J. Wang, "Structured Knowledge Distillation for Semantic
Segmentation", CVPR 2019; with C. Shu, C. Shen, arXiv:1903.04197.

    pixel = - 1 / (H * W) * sum over n, pixels and classes of softmax(out_t) * log softmax(out_s)
    nodes = maps pooled to m regions by their maximum, each divided by its length, a_ij = node_i.node_j
    pair = 1 / (m^2 * N) * sum over n, i, j of (a_t[i, j] - a_s[i, j])^2
    holistic: a discriminator D scores logit maps, the teacher's are real
        D learns mean D(s) - mean D(t) + 10 * mean over n of (||gradient of D at a mixture|| - 1)^2
        (kind 'hinge': mean relu(1 - D(t)) + mean relu(1 + D(s)));  the student learns - mean D(s)
    loss = cross-entropy + 10 * pixel + 1 * pair + 0.1 * (- mean D(s))

Tap: logits (N, K, H, W) before they are enlarged, and the map that the segmentation head reads.

Differences: the authors' code: maxima, lengths without gradient, the pixel term summed over the batch
(normalize=True: divergence, averaged). In the paper, from memory, unverified: averages and plain cosines;
pool='avg' has the averages.

Source: irfanICMLL/structure_knowledge_distillation, utils/criterion.py and utils/utils.py (similarity).

Use:
    >>> import torch
    >>> from skds import PairWise, PixelWise
    >>> out_s, out_t = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randn(2, 5, 8, 8)
    >>> fm_s, fm_t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8)
    >>> (10 * PixelWise()(out_s, out_t) + PairWise()(fm_s, fm_t)).backward()
    >>> out_s.grad.norm() * fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelWise(nn.Module):
    """Cross-entropy of the student's class probabilities under the teacher's at every pixel.

    Args:
        normalize: the divergence instead, averaged over images and pixels; False.

    Shape:
        out_s, out_t: (N, K, H, W), equal, K >= 2. Returns a scalar. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: shapes are wrong.
    """

    def __init__(self, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('PixelWise', 'out_s', out_s, 'N', 'K', 'H', 'W')
        _expect('PixelWise', 'out_t', out_t, *out_s.shape)
        log_p = F.log_softmax(_full(out_s), dim=1)
        log_q = F.log_softmax(_full(out_t.detach(), out_s), dim=1)
        q, pixels = log_q.exp(), out_s[0, 0].numel()
        if self.normalize:
            return torch.where(q == 0, 0.0, q * (log_q - log_p)).sum() / (len(out_s) * pixels)
        return -torch.where(q == 0, 0.0, q * log_p).sum() / pixels


class PairWise(nn.Module):
    """Squared error between the similarities of all pairs of regions.

    Args:
        scale: side of a region as a share of the map's, in (0, 1]; 0.5, so four regions.
        pool: 'max' or 'avg'.

    Shape:
        fm_s: (N, C_s, H, W), fm_t: (N, C_t, H, W). Returns a scalar. No gradient reaches fm_t.
        Computed in float64; the value is float32, or float64 as the student.

    Raises:
        ValueError: an argument is not legal; shapes differ; a region would have no pixel.
    """

    def __init__(self, scale: float = 0.5, pool: str = 'max') -> None:
        super().__init__()
        if not 0 < scale <= 1 or pool not in ('max', 'avg'):
            raise ValueError(
                f'PairWise: scale in (0, 1] and pool max or avg are needed, got {scale} and {pool!r}'
            )
        self.scale, self.pool = scale, pool

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('PairWise', 'fm_s', fm_s, 'N', 'C', 'H', 'W')
        _expect('PairWise', 'fm_t', fm_t, len(fm_s), 'C', *fm_s.shape[2:])
        side = tuple(int(length * self.scale) for length in fm_s.shape[2:])
        if 0 in side:
            raise ValueError(
                f'PairWise: fm_s must be of {1 / self.scale:g} pixels or more on each side, got '
                f'{tuple(fm_s.shape)}: take a larger map or a larger scale'
            )
        with _no_autocast(fm_s):
            s, t = (self._similarities(x, side) for x in (_full(fm_s), _full(fm_t.detach(), fm_s)))
            far = (t - s).square().mean(dim=(1, 2)).mean()
            return far.to(_full(fm_s[:0]).dtype).to(fm_s.device)

    def _similarities(self, fm: Tensor, side: tuple[int, int]) -> Tensor:
        """(N, m, m)."""
        pool = F.max_pool2d if self.pool == 'max' else F.avg_pool2d
        nodes = pool(fm, side, side, ceil_mode=True).flatten(2)
        nodes = _double(nodes)  # cosines near 1 differ in their last digits
        length = torch.linalg.vector_norm(nodes.detach(), dim=1, keepdim=True)  # no gradient: as the authors
        length = length.masked_fill(length <= 1e-12, torch.inf)  # a node of zeros stays, and has no gradient
        nodes = nodes / (length + 1e-8)
        return nodes.mT @ nodes


class Holistic(nn.Module):
    """What a discriminator of logit maps and the student learn from its scores; called, the student's part
    (g_loss is another name for that).

    Args:
        kind: 'wgan-gp' or 'hinge', for the discriminator.

    Shape:
        d_s, d_t: scores (N, ...) of the student's and the teacher's logit maps. Each method returns a scalar.
        `gradient_penalty(D, x_s, x_t)`: D from maps (N, K, H, W) to scores.

    Raises:
        ValueError: kind is another word; shapes differ.
    """

    def __init__(self, kind: str = 'wgan-gp') -> None:
        super().__init__()
        self.kind = self._known(kind)

    @staticmethod
    def _known(kind: str) -> str:
        if kind not in ('wgan-gp', 'hinge'):
            raise ValueError(f'Holistic: kind must be wgan-gp or hinge, got {kind!r}')
        return kind

    def forward(self, d_s: Tensor) -> Tensor:
        _expect('Holistic', 'd_s', d_s, 'N', *'D' * (d_s.dim() - 1))
        return -_full(d_s).mean()

    g_loss = forward

    def d_loss(self, d_s: Tensor, d_t: Tensor, kind: str | None = None) -> Tensor:
        """The discriminator's, without gradient penalty; kind: None, as the module's."""
        kind = self._known(kind or self.kind)
        _expect('Holistic', 'd_s', d_s, 'N', *'D' * (d_s.dim() - 1))
        _expect('Holistic', 'd_t', d_t, *d_s.shape)
        d_s, d_t = _full(d_s), _full(d_t)
        if kind == 'hinge':
            return (1 - d_t).relu().mean() + (1 + d_s).relu().mean()
        return d_s.mean() - d_t.mean()

    @staticmethod
    def gradient_penalty(D, x_s: Tensor, x_t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """mean over images of (||gradient of D|| - 1)^2 at random mixtures; the authors' weight is 10."""
        _expect('Holistic', 'x_s', x_s, 'N', *'D' * (x_s.dim() - 1))
        _expect('Holistic', 'x_t', x_t, *x_s.shape)
        x_s, x_t = _full(x_s.detach()), _full(x_t.detach(), x_s)
        a = torch.rand(len(x_s), *[1] * (x_s.dim() - 1), dtype=x_s.dtype, device=x_s.device, **_by(generator))
        x = (a * x_t + (1 - a) * x_s).requires_grad_()
        with _no_autocast(x):
            (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
        return (torch.linalg.vector_norm(grad.flatten(1), dim=1) - 1).square().mean()


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


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


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
