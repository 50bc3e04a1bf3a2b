"""FedKA (FedSA), federated selective aggregation: private teachers each teach a copy of the student at home.

D. Xie, R. Yu, G. Fang, J. Song, Z. Feng, X. Wang, L. Sun, M. Song, "Federated Selective Aggregation for
Knowledge Amalgamation", Chip 2023, arXiv:2207.13309.

    loss = mean over all elements of (translator(fm_s) - fm_t)^2
    translator: three times 1x1 convolution, batch norm, leaky ReLU 0.1;  C_s -> C_s -> k C_t -> k C_t

    selection: with a = saliency of student and teacher i on probe image p, flattened,
               tr_i = 1 / mean over p of (0.5 + 0.5 cosine), q = 2 - tr, prob = softmax of q scaled to 0..1
    round:     drawn clients (with replacement, after prob) train a copy of the student each on their own
               unlabelled images; the server averages: w = sum over i of a_i w_i

Tap: the last map of student and teacher, equal height and width. Logits are not used: the student's task may
be another one, and its classifier is fitted on a small labelled probe set.

Differences: KamalEngine quantises Grad-CAM to 8 bit and divides by its range (NaN for a flat map, which here
is all zero); cosine with a zero map is NaN there, here the similarity is 0.5; equal tr give 0/0 there, here
equal probabilities. Its trainer names a class that does not exist and does not run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FedKA(nn.Module):
    """Squared error between the translated student map and a teacher map.

    Args:
        s_channels, t_channels: of the maps.
        k: the translator gives int(k t_channels) channels, and fm_t must have as many; 1.

    Shape:
        fm_s: (N, s_channels, H, W); fm_t: (N, int(k t_channels), H, W). Returns a scalar, with
        return_terms=True also {'feat': the same}. No gradient reaches fm_t.

    Raises:
        ValueError: other channels, batch or size.
    """

    def __init__(self, s_channels: int, t_channels: int, k: float = 1.0) -> None:
        super().__init__()
        self.translator = Translator(s_channels, t_channels, k)

    def forward(self, fm_s: Tensor, fm_t: Tensor, return_terms: bool = False):
        wanted = (len(fm_s), self.translator.channels, *fm_s.shape[2:])
        if fm_s.dim() != 4 or fm_s.shape[1] != self.translator.encoder[0].in_channels:
            channels = self.translator.encoder[0].in_channels
            raise ValueError(f'FedKA: fm_s must be (N, {channels}, H, W), got {tuple(fm_s.shape)}')
        if fm_t.shape != wanted:
            raise ValueError(f'FedKA: fm_t must be {wanted}, got {tuple(fm_t.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            loss = F.mse_loss(self.translator(_full(fm_s)), _full(fm_t.detach()))
        return (loss, {'feat': loss}) if return_terms else loss


class Translator(nn.Module):
    """From the student's map to the teacher's channels; arguments as FedKA.

    Shape:
        fm: (N, s_channels, H, W) -> (N, int(k t_channels), H, W).
    """

    def __init__(self, s_channels: int, t_channels: int, k: float = 1.0) -> None:
        super().__init__()
        self.channels = int(k * t_channels)
        widths = [s_channels, s_channels, self.channels, self.channels]
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.1)]
        self.encoder = nn.Sequential(*layers)

    def forward(self, fm: Tensor) -> Tensor:
        return self.encoder(fm)


def transferability(sal_s: Tensor, sals_t: Tensor) -> Tensor:
    """How unlike student and teachers look at the probe images, >= 1; smaller is more alike.

    sal_s: (P, M), flattened saliency of the student on P probe images; sals_t: (clients, P, M). Returns
    (clients,).
    """
    return 1 / (0.5 + 0.5 * F.cosine_similarity(_full(sal_s)[None], _full(sals_t), dim=2)).mean(dim=1)


def selection_prob(tr: Tensor) -> Tensor:
    """Probability of each client to be drawn, (clients,)."""
    q = 2 - tr
    spread = q.max() - q.min()
    return torch.softmax((q - q.min()) / torch.where(spread > 0, spread, 1.0), dim=0)


def fed_average(state_dicts: list[dict], weights: list | Tensor) -> dict:
    """Sum of weights[i] * state_dicts[i]; whole numbers (batch norm's counters) are taken from the first."""
    return {
        key: sum(float(a) * state[key] for a, state in zip(weights, state_dicts))
        if value.is_floating_point()
        else value.clone()
        for key, value in state_dicts[0].items()
    }


def saliency(fm: Tensor, out: Tensor) -> Tensor:
    """Grad-CAM of the predicted class, scaled to 0..1 per image and flattened: (N, H W); flat maps give 0.

    fm: (N, C, H, W), with a graph to out: (N, K).
    """
    grad = torch.autograd.grad(out.max(dim=1).values.sum(), fm)[0]
    cam = F.relu((grad.mean(dim=(2, 3), keepdim=True) * fm).sum(dim=1)).flatten(1).detach()
    low, high = cam.min(dim=1, keepdim=True).values, cam.max(dim=1, keepdim=True).values
    return torch.where(high > low, (cam - low) / (high - low).clamp(min=1e-12), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
