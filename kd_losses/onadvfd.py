"""OnAdvFD: peers distil their logits, and an adversary per peer makes their last maps alike in distribution.

I. Chung, S. Park, J. Kim, N. Kwak, "Feature-map-level Online Adversarial Knowledge Distillation", ICML 2020,
arXiv:2002.01775 (called AFD there).

    logits of net 1:   loss = CE(out_1) + T^2 mean over n of KL(softmax(out_2 / T) || softmax(out_1 / T))
    D_1, owned by net 1, calls the other's map real and net 1's fake (least squares, scores in (0, 1)):
        d_loss = mean of (1 - D_1(T_2(fm_2)))^2 + mean of D_1(T_1(fm_1))^2       trains D_1 and the T
        g_loss = mean of (1 - D_1(T_1(fm_1)))^2                                   trains net 1
    T_k: a layer to the common, largest number of channels, nothing for the network that has it
    more than two networks: each learns from the one before it, the first from the last

Tap: logits, labels and the last map before pooling of networks trained together. Two steps per batch: the
logits, then, from a fresh forward pass, the adversary (fm detached) and the networks against it, with
optimisers of their own (Adam, 2e-5). Contains its cross-entropy.

Differences: a reconstruction. No code of the authors was found, the equations are those of secondary sources;
the architecture of D and T, T = 3 and the rates are partly ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OnAdvFD(nn.Module):
    """Cross-entropy and soft targets from a peer; call again with 1 and 2 swapped for the other network.

    Args:
        T: temperature, > 0; 3.
        channels: list, channels of the networks' last maps, to own their `adversaries`; None: logits only.

    Shape:
        out_1, out_2: (N, K), equal; target: (N,) int64. Returns a scalar. No gradient reaches out_2.

    Raises:
        ValueError: T is not positive; shapes do not fit.
    """

    def __init__(self, T: float = 3.0, channels: list | None = None) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'OnAdvFD: T must be > 0, got {T}')
        self.T = T
        self.adversaries = None if channels is None else Adversaries(channels)

    def forward(self, out_1: Tensor, out_2: Tensor, target: Tensor) -> Tensor:
        if out_1.dim() != 2 or out_2.shape != out_1.shape:
            shapes = f'{tuple(out_1.shape)} and {tuple(out_2.shape)}'
            raise ValueError(f'OnAdvFD: out_1 and out_2 must be (N, K), equal, got {shapes}')
        if target.shape != out_1.shape[:1] or target.is_floating_point():
            raise ValueError(
                f'OnAdvFD: target must be ({len(out_1)},) of integers, got {tuple(target.shape)}'
            )
        out_1, out_2 = _full(out_1), _full(out_2.detach())
        log_p, log_q = F.log_softmax(out_1 / self.T, dim=1), F.log_softmax(out_2 / self.T, dim=1)
        q = log_q.exp()
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1).mean() * self.T**2
        return F.cross_entropy(out_1, target) + kl


class Discriminator(nn.Module):
    """Map (N, channels, H, W) -> scores (N, 1, h, w) in (0, 1), h and w half of H and W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 1, 3, padding=1),
        )

    def forward(self, fm: Tensor) -> Tensor:
        with torch.autocast(fm.device.type, enabled=False):
            return self.layers(_full(fm)).sigmoid()


class TransferLayer(nn.Sequential):
    """Map (N, in_channels, H, W) -> (N, out_channels, H, W): 3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, fm: Tensor) -> Tensor:
        with torch.autocast(fm.device.type, enabled=False):
            return super().forward(_full(fm))


class Adversaries(nn.Module):
    """One discriminator per network and the transfer layers.

    Args:
        channels: list, channels of the networks' last maps, in order.

    `d_loss(fms)` and `g_loss(fms)`: sums over the networks, for a list of maps, one per network.
    """

    def __init__(self, channels: list) -> None:
        super().__init__()
        wide = max(channels)
        self.transfer = nn.ModuleList(
            nn.Identity() if c == wide else TransferLayer(c, wide) for c in channels
        )
        self.discriminators = nn.ModuleList(Discriminator(wide) for _ in channels)

    def d_loss(self, fms: list[Tensor]) -> Tensor:
        """Trains this module; the maps are detached."""
        moved = [layer(fm.detach()) for layer, fm in zip(self.transfer, fms)]
        pairs = zip(self.discriminators, moved, [moved[-1], *moved[:-1]])
        return sum(d_loss(D(real), D(fake)) for D, fake, real in pairs)

    def g_loss(self, fms: list[Tensor]) -> Tensor:
        """Trains the networks."""
        trios = zip(self.discriminators, self.transfer, fms)
        return sum(g_loss(D(layer(fm))) for D, layer, fm in trios)


def d_loss(score_real: Tensor, score_fake: Tensor) -> Tensor:
    """mean (1 - score_real)^2 + mean score_fake^2, of score maps (N, 1, h, w)."""
    return (1 - _full(score_real)).square().mean() + _full(score_fake).square().mean()


def g_loss(score: Tensor) -> Tensor:
    """mean (1 - score)^2, of a score map (N, 1, h, w)."""
    return (1 - _full(score)).square().mean()


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Each network learns from the one before it."""
    return sum(kd(x.out, y.out, batch.target) for x, y in zip(s, [s[-1], *s[:-1]]))


def build(loss, probe, **options):
    return loss(**options, channels=[f.fms[-1].shape[1] for f in probe.s])


def optimisers(kd, peers):
    return {
        'adversary': torch.optim.Adam(kd.adversaries.parameters(), lr=2e-5, weight_decay=0.1),
        'networks': torch.optim.Adam(peers.parameters(), lr=2e-5, weight_decay=0.1),
    }


def second_update(kd, peers, batch, opts):
    """From a fresh forward pass, a step of the adversaries, then one of the networks."""
    fms = [f.fms[-1] for f in batch.peers(batch.img)]
    opts['adversary'].zero_grad(set_to_none=True)
    kd.adversaries.d_loss(fms).backward()
    opts['adversary'].step()
    opts['networks'].zero_grad(set_to_none=True)
    kd.adversaries.requires_grad_(False)
    kd.adversaries.g_loss(fms).backward()
    kd.adversaries.requires_grad_(True)
    opts['networks'].step()
