"""DiffKD, knowledge diffusion: denoise the student's features by a diffusion model of the teacher's.

T. Huang, Y. Zhang, M. Zheng, S. You, F. Wang, C. Qian, C. Xu, "Knowledge Diffusion for Distillation",
NeurIPS 2023, arXiv:2305.15712.

    beta = train_steps numbers from 1e-4 to 0.02, ab = cumulative product of 1 - beta
    x = trans(fm_s), gamma = noise_adapter(x) in (0, 1), one per image
    x becomes gamma * x + (1 - gamma) * noise
    for t = (steps - 1) * r, .., r, 0, with r = train_steps // (2 * steps):        (the lower half of a DDIM)
        e = model(x, t), x0 = (x - sqrt(1 - ab_t) * e) / sqrt(ab_t)
        x becomes sqrt(ab_(t - r)) * x0 + sqrt(1 - ab_(t - r)) * e                              (x0 at t = 0)
    refined = proj(x), target = fm_t
    ddim = mean of (model(sqrt(ab_t) * target + sqrt(1 - ab_t) * noise, t) - noise)^2 at a random t per image
    loss = mean of (refined - target)^2 + ddim
           + tau^2 * mean over n of KL(softmax(target / tau) || softmax(refined / tau)) + ddim of logits

Taps: the last stage's maps and, with n_classes, the logits as maps of 1 x 1. With ae_channels a linear
autoencoder of the teacher's map is trained beside (mean of (decoder(h) - fm_t)^2 is added) and target = h.
Gradients go through all steps into the student, trans, noise_adapter and model; target is a constant.

Differences: the authors' code, which mixes noise linearly where the paper speaks of square roots (from
memory, unverified). Their batch norms keep running statistics that nothing uses; here there are none, so eval
mode changes nothing. Maps of different sizes are pooled to the smaller one. Their hook loses the batch axis
of a batch of one.

Source: hunto/image_classification_sota, lib/models/losses/diffkd/diffkd.py and diffkd_modules.py.

Use:
    >>> import torch
    >>> from diffkd import DiffKD
    >>> fm_s, fm_t = torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 32, 4, 4)
    >>> DiffKD(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMES = 1280  # rows of the embedding of time


class DiffKD(nn.Module):
    """Distance of denoised student features to the teacher's, and the diffusion model's own loss.

    Args:
        s_channels, t_channels: channels of the two maps.
        n_classes: with it, logits are denoised as well; None: maps only.
        steps: evaluations of the noise predictor per image; 5.
        train_steps: length of the noise schedule, 2 * steps to 1280; 1000.
        ae_channels: width of the autoencoder (ImageNet: 1024), at least 8; None: none, and t_channels >= 8.
        tau: temperature of the logits' divergence, > 0; 1.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t); out_s, out_t: (N, n_classes), with
        n_classes only, N >= 2 then. generator: where to draw from. Returns a scalar. No gradient reaches
        fm_t, out_t. `terms` returns {'feature': ..., 'ddim': ..., and 'rec', 'logit', 'logit_ddim' where they
        are}. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; a map or logits of a wrong shape; logits without n_classes, or
            the other way round; one sample with n_classes.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        n_classes: int | None = None,
        steps: int = 5,
        train_steps: int = 1000,
        ae_channels: int | None = None,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f'DiffKD: tau must be > 0, got {tau}')
        if n_classes is not None and n_classes < 2:
            raise ValueError(
                f'DiffKD: n_classes must be at least 2, got {n_classes}: '
                'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
            )
        self.n_classes, self.tau = n_classes, tau
        self.feature = Denoiser(s_channels, t_channels, 3, steps, train_steps, ae_channels)
        if n_classes is not None:
            self.logit = Denoiser(n_classes, n_classes, 1, steps, train_steps)

    def forward(
        self,
        fm_s: Tensor,
        fm_t: Tensor,
        out_s: Tensor | None = None,
        out_t: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return sum(self.terms(fm_s, fm_t, out_s, out_t, generator).values())

    def terms(self, fm_s, fm_t, out_s=None, out_t=None, generator=None) -> dict[str, Tensor]:
        _expect('DiffKD', 'fm_s', fm_s, 'N', self.feature.s_channels, 'H', 'W')
        _expect('DiffKD', 'fm_t', fm_t, len(fm_s), self.feature.t_channels, 'H', 'W')
        for name, out in (('out_s', out_s), ('out_t', out_t)):
            if (out is None) != (self.n_classes is None):
                wanted = 'absent' if self.n_classes is None else f'({len(fm_s)}, {self.n_classes})'
                got = None if out is None else tuple(out.shape)
                raise ValueError(f'DiffKD: {name} must be {wanted}, got {got}: n_classes says if it is used')
            if out is not None:
                _expect('DiffKD', name, out, 'N', 'K')
                _expect('DiffKD', name, out, len(fm_s), self.n_classes)
        terms = self.of_maps(self.feature(fm_s, fm_t, generator))
        if self.n_classes is not None:
            terms |= self.of_logits(self.logit(*(x[:, :, None, None] for x in (out_s, out_t)), generator))
        return terms

    def of_maps(self, denoised: tuple) -> dict[str, Tensor]:
        """Terms of what the Denoiser of the maps gave."""
        refined, target, ddim, rec = denoised
        terms = {'feature': F.mse_loss(refined, target), 'ddim': ddim}
        return terms if rec is None else {**terms, 'rec': rec}

    def of_logits(self, denoised: tuple) -> dict[str, Tensor]:
        """Terms of what the Denoiser of the logits gave."""
        refined, target, ddim, _ = denoised
        log_p, log_q = (F.log_softmax(x.flatten(1) / self.tau, dim=1) for x in (refined, target))
        kl = (log_q.exp() * (log_q - log_p)).sum(dim=1).mean()
        return {'logit': kl * self.tau**2, 'logit_ddim': ddim}


class Denoiser(nn.Module):
    """(fm_s (N, s_channels, H, W), fm_t (N, t_channels, H, W)) -> (refined, target, ddim, rec or None).

    kernel_size: 3 for maps, 1 for logits as maps of 1 x 1; the rest as in DiffKD. noise_s, noise_t, shaped as
    the target, and t (N,) in 0..train_steps - 1: instead of drawn ones; drawn in this order.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        kernel_size: int = 3,
        steps: int = 5,
        train_steps: int = 1000,
        ae_channels: int | None = None,
    ) -> None:
        super().__init__()
        c = ae_channels or t_channels
        if kernel_size not in (1, 3):
            raise ValueError(f'Denoiser: kernel_size must be 1 or 3, got {kernel_size}')
        if kernel_size == 3 and c < 8:
            raise ValueError(f'Denoiser: t_channels, or ae_channels, must be at least 8 for maps, got {c}')
        if steps < 1 or not 2 * steps <= train_steps <= TIMES:
            raise ValueError(
                f'Denoiser: steps >= 1 and train_steps in 2 * steps..{TIMES} are needed, '
                f'got {steps} and {train_steps}'
            )
        self.s_channels, self.t_channels, self.channels = s_channels, t_channels, c
        self.kernel_size, self.train_steps = kernel_size, train_steps
        self.trans = nn.Conv2d(s_channels, c, 1)
        self.ae = None
        if ae_channels:
            encoder, decoder = nn.Conv2d(t_channels, c, 1), nn.Conv2d(c, t_channels, 1)
            self.ae = nn.ModuleDict(
                {'encoder': nn.Sequential(encoder, _norm(c)), 'decoder': nn.Sequential(decoder)}
            )
        self.model, self.noise_adapter = _Predictor(c, kernel_size), _Adapter(c, kernel_size)
        self.proj = nn.Sequential(nn.Conv2d(c, c, 1), _norm(c))
        ab = (1 - torch.linspace(1e-4, 0.02, train_steps, dtype=torch.float64)).cumprod(dim=0)
        self.register_buffer('ab', ab, persistent=False)
        stride, values = train_steps // (2 * steps), ab.tolist()
        # what the sampler needs of each step: t, ab there and at the next step, 1 at the end
        self.schedule = [
            (t, values[t], values[t - stride] if t >= stride else 1.0)
            for t in range((steps - 1) * stride, -1, -stride)
        ]

    def forward(
        self,
        fm_s: Tensor,
        fm_t: Tensor,
        generator: torch.Generator | None = None,
        noise_s: Tensor | None = None,
        noise_t: Tensor | None = None,
        t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        _expect('Denoiser', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('Denoiser', 'fm_t', fm_t, len(fm_s), self.t_channels, 'H', 'W')
        with _no_autocast(fm_s):
            fm_s, fm_t = _same_size(_full(fm_s), _full(fm_t.detach(), fm_s))
            if fm_s[:, 0].numel() < 2:
                raise ValueError(
                    f'Denoiser: fm_s must have two values per channel for its batch norms, '
                    f'got {tuple(fm_s.shape)}: two samples or more (drop_last=True)'
                )
            x, target, rec = _run(self.trans, fm_s), fm_t, None
            if self.ae is not None:
                code = _run(self.ae['encoder'], fm_t)
                rec, target = F.mse_loss(_run(self.ae['decoder'], code), fm_t), code.detach()
            noise_s = self._noise('noise_s', noise_s, x, generator)
            noise_t = self._noise('noise_t', noise_t, x, generator)
            if t is None:
                t = torch.randint(self.train_steps, (len(x),), device=x.device, **_by(generator))
            _expect('Denoiser', 't', t, len(x))
            gamma = _run(self.noise_adapter, x)[:, None, None, None]
            refined = _run(self.proj, self._sampled(gamma * x + (1 - gamma) * noise_s))
            ab = self.ab[t].to(x.dtype)[:, None, None, None]
            noised = ab.sqrt() * target + (1 - ab).sqrt() * noise_t
            return refined, target, F.mse_loss(_run(self.model, noised, t), noise_t), rec

    def _sampled(self, x: Tensor) -> Tensor:
        for t, ab, following in self.schedule:
            e = _run(self.model, x, torch.full((1,), t, device=x.device))
            x0 = (x - (1 - ab) ** 0.5 * e) / ab**0.5
            x = following**0.5 * x0 + (1 - following) ** 0.5 * e
        return x

    def _noise(self, name: str, noise: Tensor | None, like: Tensor, generator) -> Tensor:
        if noise is None:
            return torch.randn(like.shape, dtype=like.dtype, device=like.device, **_by(generator))
        _expect('Denoiser', name, noise, *like.shape)
        return _full(noise.detach(), like)

    def _apply(self, fn, *args, **kwargs):
        """half() and float() leave the schedule in float64."""
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


class _Predictor(nn.Module):
    """The noise e in x (N, c, H, W) at time t, (N,) or (1,)."""

    def __init__(self, c: int, kernel_size: int) -> None:
        super().__init__()
        self.time_embedding = nn.Embedding(TIMES, c)
        if kernel_size == 3:
            layers = [_Bottleneck(c, 4), _Bottleneck(c, 4), nn.Conv2d(c, c, 1), _norm(c)]
        else:
            layers = [*_narrow(c, 4 * c), *_narrow(c, 4 * c)[:-1]]  # no norm at the end
        self.pred = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.pred(x + self.time_embedding(t)[:, :, None, None])


class _Adapter(nn.Module):
    """How much of x (N, c, H, W) is signal: (N,) in (0, 1)."""

    def __init__(self, c: int, kernel_size: int) -> None:
        super().__init__()
        self.feat = nn.Sequential(*([_Bottleneck(c, 8)] if kernel_size == 3 else _narrow(c, 2 * c)))
        self.pred = nn.Linear(c, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pred(self.feat(x).mean(dim=(2, 3))).softmax(dim=1)[:, 0]


class _Bottleneck(nn.Module):
    def __init__(self, c: int, r: int) -> None:
        super().__init__()
        mid = c // r
        self.block = nn.Sequential(
            *(nn.Conv2d(c, mid, 1), _norm(mid), nn.ReLU()),
            *(nn.Conv2d(mid, mid, 3, padding=1), _norm(mid), nn.ReLU()),
            *(nn.Conv2d(mid, c, 1), _norm(c)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _narrow(c: int, mid: int) -> list[nn.Module]:
    return [nn.Conv2d(c, mid, 1), _norm(mid), nn.ReLU(), nn.Conv2d(mid, c, 1), _norm(c)]


def _norm(c: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(c, track_running_stats=False)


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller of their heights and of their widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))


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


def feed(kd, s, t, batch):
    outs = () if kd.n_classes is None else (s.out, t.out)
    return kd(s.fms[-1], t.fms[-1], *outs, generator=batch.generator)


def build(loss, probe, **options):
    """With its logits, unless n_classes=None says otherwise."""
    channels = (f.fms[-1].shape[1] for f in (probe.s, probe.t))
    return loss(*channels, **{'n_classes': probe.num_classes, **options})
