"""DEPARA, deep attribution graph: compare what models look at, and how they arrange the images.

J. Song, Y. Chen, J. Ye, X. Wang, C. Shen, F. Mao, M. Song, "DEPARA: Deep Attribution Graph for Deep Knowledge
Transferability", CVPR 2020, arXiv:2003.07496.

    nodes: V = mean over the probe images of the cosine of the models' attribution maps
    edges of a model: cosine(feat_i, feat_j) for all i < j; for tasks the mean of feat is subtracted first
    E = Spearman's rank correlation of the two models' edges
    score = V + lam * E

Higher is more related. The authors tune lam per probe set: 0.25 Taskonomy, 0.03 COCO, 0.27 Indoor, with
1000 probe images for tasks and 200 for layers. To choose a layer to transfer from, compare each layer of the
source with the target's last one, channel='abs_mean' for the nodes and center=False for the edges.

Differences: equal values get their mean rank, and edges that are all equal correlate 0 with anything; the
authors' code ranks equal values in the order of sorting. KamalEngine takes the edges from the attribution
maps and counts the ones of the diagonal among them, which makes E larger; this is the authors' own graph.

Source: zju-vipa/DEPARA, tools/spearman_edge.py, tools/layer_select.py

Use:
    >>> import torch
    >>> from depara import depara
    >>> maps, feat = torch.randn(5, 3, 8, 8), torch.randn(5, 16)
    >>> round(depara(maps, feat, maps, 2 * feat), 6)
    1.25
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def depara(maps_a: Tensor, feat_a: Tensor, maps_b: Tensor, feat_b: Tensor, lam: float = 0.25) -> float:
    """Similarity of the attribution graphs of two models.

    Args:
        maps_a, maps_b: (N, C, H, W) attribution maps of the same N >= 3 probe images.
        feat_a, feat_b: (N, ...) representations of these images.
        lam: weight of the edges.

    Raises:
        ValueError: numbers of images differ; fewer than 3; shapes as in node_similarity.
    """
    nodes = node_similarity(maps_a, maps_b)
    for name, feat in (('feat_a', feat_a), ('feat_b', feat_b)):
        if not torch.is_tensor(feat) or feat.dim() < 2 or len(feat) != len(maps_b):
            got = tuple(feat.shape) if torch.is_tensor(feat) else type(feat).__name__
            remedy = 'representations of the images that the maps are of'
            raise ValueError(f'depara: {name} must be ({len(maps_b)}, D), got {got}: {remedy}')
    return nodes + lam * spearman(edge_vector(feat_a), edge_vector(feat_b))


def node_similarity(maps_a: Tensor, maps_b: Tensor, channel: str | None = 'mean') -> float:
    """Mean over images of the cosine of two models' attribution maps, as attribution_similarity.

    Args:
        maps_a, maps_b: (N, C, H, W) of the same images; maps_a is resized to the size of maps_b.
        channel: 'mean' averages the colours; 'abs_mean' their absolute values; None keeps them.

    Raises:
        ValueError: shapes or numbers of images differ; unknown channel; other colours with channel None.
    """
    _maps('node_similarity', 'maps_b', maps_b, channel)
    _maps('node_similarity', 'maps_a', maps_a, channel, maps_b)
    return float(_cosines(maps_a, maps_b, channel).mean())


def edge_vector(feat: Tensor, center: bool = True) -> Tensor:
    """Cosines of the representations of all pairs of images.

    Args:
        feat: (N, ...) representations of N >= 3 images; what is behind N is flattened.
        center: subtract the mean over the images first.

    Returns:
        (N (N - 1) / 2,) float64, in the order (0, 1), (0, 2), ..., (1, 2), ...; a vector of zeros counts 0.

    Raises:
        ValueError: fewer than 3 images.
    """
    if not torch.is_tensor(feat) or feat.dim() < 2 or len(feat) < 3:
        got = tuple(feat.shape) if torch.is_tensor(feat) else type(feat).__name__
        remedy = 'fewer images have no pairs to rank'
        raise ValueError(f'edge_vector: feat must be (N, D) with N >= 3, got {got}: {remedy}')
    x = (feat.cpu() if feat.device.type == 'mps' else feat).detach().double().flatten(1)
    x = x - x.mean(dim=0) if center else x
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    i, j = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    return (x @ x.T)[i, j]


def spearman(u: Tensor, v: Tensor) -> float:
    """Rank correlation; without equal values 1 - 6 sum d^2 / (P (P^2 - 1)), d the differences of the ranks.

    Args:
        u, v: (P,), P >= 2.

    Returns:
        A number in -1..1; 0 where all values of one are equal, NaN where one is not finite.

    Raises:
        ValueError: u and v are not vectors of one length.
    """
    if not (torch.is_tensor(u) and torch.is_tensor(v)) or u.dim() != 1 or u.shape != v.shape or len(u) < 2:
        got = [tuple(x.shape) if torch.is_tensor(x) else type(x).__name__ for x in (u, v)]
        remedy = 'edges of the same images'
        raise ValueError(f'spearman: u and v must be (P,), P >= 2, got {got[0]} and {got[1]}: {remedy}')
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        return float('nan')
    a, b = (_ranks(x.detach()) - (len(x) - 1) / 2 for x in (u, v))
    length = a.norm() * b.norm()
    return float(a @ b / length) if length > 0 else 0.0


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0 in float64; equal values share the mean of theirs."""
    _, group, number = x.unique(sorted=True, return_inverse=True, return_counts=True)
    last = number.cumsum(0).double()
    return (last - (number + 1) / 2)[group]


def _cosines(map_a: Tensor, map_b: Tensor, channel: str | None) -> Tensor:
    """(N,): per image the cosine of two attribution maps; 0 where a map is 0."""
    a, b = (_vectors(x, channel) for x in (map_a, map_b))
    if a.shape[2:] != b.shape[2:]:
        a = F.interpolate(a, size=b.shape[2:], mode='bilinear', align_corners=False)
    a, b = a.flatten(1), b.flatten(1)
    return (a * b).sum(dim=1) / (a.norm(dim=1).clamp(min=1e-12) * b.norm(dim=1).clamp(min=1e-12))


def _vectors(x: Tensor, channel: str | None) -> Tensor:
    """(N, 1, H, W) or, with channel None, (N, C, H, W), in float64."""
    x = (x.cpu() if x.device.type == 'mps' else x).detach().double()
    if channel is None:
        return x
    return (x.abs() if channel == 'abs_mean' else x).mean(dim=1, keepdim=True)


def _maps(who: str, name: str, x: Tensor, channel: str | None, like: Tensor | None = None) -> None:
    """Refuse what is not a stack of attribution maps, of as many images as `like`."""
    if channel not in ('mean', 'abs_mean', None):
        wanted = "'mean', 'abs_mean' or None"
        raise ValueError(f"{who}: channel must be {wanted}, got {channel!r}: 'mean' is the default")
    if not torch.is_tensor(x) or x.dim() != 4 or 0 in x.shape:
        got = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f'{who}: {name} must be (N, C, H, W), got {got}: attribution_map returns such maps')
    if like is not None and len(x) != len(like):
        remedy = 'the maps of both models must be of the same probe images'
        raise ValueError(f'{who}: {name} must have {len(like)} images, got {len(x)}: {remedy}')
    if like is not None and channel is None and x.shape[1] != like.shape[1]:
        remedy = "channel='mean' compares maps of unlike channels"
        raise ValueError(f'{who}: {name} must have {like.shape[1]} channels, got {x.shape[1]}: {remedy}')
