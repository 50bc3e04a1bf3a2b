"""FT, factor transfer: an auto-encoder paraphrases the teacher's map, the student translates into it.

J. Kim, S. Park, N. Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS
2018, arXiv:1802.04977.

    paraphraser: fm_t -> factor_t (k times its channels) -> recon;    translator: fm_s -> factor_s
    first, alone:  mean over elements of (recon - fm_t)^2                        trains the paraphraser
    z(x) = x flattened per sample / its length
    loss = mean over n and elements of |z(factor_s) - z(factor_t)|               trains student and translator

Tap: the last stage's maps, after their ReLU; channels may differ, sizes must agree.

Differences: the authors' networks and loss. The paraphraser learns by squared error, as in
Knowledge-Distillation-Zoo and the paper; the authors' code uses the absolute one (recon_loss='l1'). That zoo
turns batch norm on for CIFAR-10 (use_bn=True). An all-zero factor is 0 with zero gradient. RepDistiller's FT
squares the factor and averages its channels, another loss.

Source: Jangho-Kim/Factor-Transfer-pytorch, Models/FeatureProjection.py and utils.py (FT).

Use:
    >>> import torch
    >>> from ft import FactorTransfer
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> FactorTransfer(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactorTransfer(nn.Module):
    """The whole method for a trainer: paraphraser, translator, and the loss between their factors.

    Args:
        s_channels, t_channels: channels of the two maps.
        k: factor channels as a share of the teacher's, > 0; 0.5.
        use_bn: batch norm in both; False.
        recon_loss: 'mse' or 'l1', what `pretrain_loss` computes.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). Returns a scalar. No gradient reaches fm_t
        or the paraphraser; that one learns by `pretrain_loss(fm_t)`, before, and is in eval mode here.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: recon_loss is not known; a map is not 4-D or has other channels than announced; batch or
            size differ.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        k: float = 0.5,
        use_bn: bool = False,
        recon_loss: str = 'mse',
    ) -> None:
        super().__init__()
        if recon_loss not in ('mse', 'l1'):
            raise ValueError(f'FactorTransfer: recon_loss must be "mse" or "l1", got {recon_loss!r}')
        self.s_channels, self.t_channels, self.recon_loss = s_channels, t_channels, recon_loss
        self.paraphraser = Paraphraser(t_channels, k, use_bn)
        self.translator = Translator(s_channels, t_channels, k, use_bn)
        self.factor_loss = FT()

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('FactorTransfer', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('FactorTransfer', 'fm_t', fm_t, len(fm_s), self.t_channels, *fm_s.shape[2:])
        self.paraphraser.eval()
        with _no_autocast(fm_s):
            with torch.no_grad():
                factor_t = _run(self.paraphraser.encoder, _full(fm_t, fm_s))
            return self.factor_loss(_run(self.translator, _full(fm_s)), factor_t)

    def pretrain_loss(self, fm_t: Tensor) -> Tensor:
        """The reconstruction error that trains the paraphraser, before anything else."""
        _expect('FactorTransfer', 'fm_t', fm_t, 'N', self.t_channels, 'H', 'W')
        self.paraphraser.train(self.training)
        with _no_autocast(fm_t):
            fm_t = _full(fm_t.detach(), next(self.paraphraser.parameters()))
            _, recon = _run(self.paraphraser, fm_t)
            return F.mse_loss(recon, fm_t) if self.recon_loss == 'mse' else F.l1_loss(recon, fm_t)


class Paraphraser(nn.Module):
    """Auto-encoder of the teacher's map: (N, t_channels, H, W) -> factor (N, m, H, W) and reconstruction,
    m = round(k t_channels)."""

    def __init__(self, t_channels: int, k: float = 0.5, use_bn: bool = False) -> None:
        super().__init__()
        m = _factor_channels('Paraphraser', t_channels, k)
        widths = [(t_channels, t_channels), (t_channels, m), (m, m)]
        self.encoder = _layers(nn.Conv2d, widths, use_bn)
        self.decoder = _layers(nn.ConvTranspose2d, [(b, a) for a, b in reversed(widths)], use_bn)

    def forward(self, fm_t: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.encoder(fm_t)
        return factor, self.decoder(factor)


class Translator(nn.Module):
    """From the student's map (N, s_channels, H, W) to a factor (N, m, H, W), m = round(k t_channels)."""

    def __init__(self, s_channels: int, t_channels: int, k: float = 0.5, use_bn: bool = False) -> None:
        super().__init__()
        m = _factor_channels('Translator', t_channels, k)
        self.encoder = _layers(nn.Conv2d, [(s_channels, s_channels), (s_channels, m), (m, m)], use_bn)

    def forward(self, fm_s: Tensor) -> Tensor:
        return self.encoder(fm_s)


class FT(nn.Module):
    """The loss alone: mean absolute difference of normalised factors, (N, m, H, W) each, equal shapes."""

    def forward(self, factor_s: Tensor, factor_t: Tensor) -> Tensor:
        _expect('FT', 'factor_s', factor_s, 'N', *'D' * (factor_s.dim() - 1 or 1))
        _expect('FT', 'factor_t', factor_t, *factor_s.shape)
        z_s, z_t = _unit(_full(factor_s).flatten(1)), _unit(_full(factor_t.detach(), factor_s).flatten(1))
        return F.l1_loss(z_s, z_t)


def _factor_channels(who: str, t_channels: int, k: float) -> int:
    m = round(t_channels * k)
    if m < 1:
        raise ValueError(f'{who}: k must leave at least one of {t_channels} channels, got {k}')
    return m


def _layers(conv: type, widths: list[tuple[int, int]], use_bn: bool) -> nn.Sequential:
    """3x3 convolutions that keep the size, each with its optional batch norm and a leaky ReLU."""
    layers = []
    for c_in, c_out in widths:
        layers.append(conv(c_in, c_out, 3, stride=1, padding=1, bias=not use_bn))
        layers += [nn.BatchNorm2d(c_out)] if use_bn else []
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def build(loss, probe, **options):
    """With batch norm, as Knowledge-Distillation-Zoo has it on CIFAR-10."""
    channels = probe.s.fms[-1].shape[1], probe.t.fms[-1].shape[1]
    return loss(*channels, **{'use_bn': True, **options})


def pretrain(kd, t, batch):
    return kd.pretrain_loss(t.fms[-1])
