"""Transferability from attribution maps: two models that look at the same pixels know related things.

J. Song, Y. Chen, X. Wang, C. Shen, M. Song, "Deep Model Transferability from Attribution Maps", NeurIPS 2019,
arXiv:1909.11902.

    f(x_n) = sum of all units of the representation of image n ('norm': its length)
    map = x * df/dx ('saliency': |df/dx|)
    similarity(a, b) = mean over n of the cosine of the maps, averaged over colours, of models a and b

Tap: everything up to, not including, the final classifier, in evaluation mode, so that an image's map does
not depend on the others. Each model gets the SAME probe images with its OWN normalisation. To rank sources
for a target, sort its row of the affinity matrix, largest first. No labels and no training are needed, but a
model of the target task.

Differences: the authors' code prints its ranking with the least related first. KamalEngine differentiates
the length of the representation and keeps the colours: output='norm', channel=None. The paper's third kind
of map, epsilon-LRP, is not here.

Source: zju-vipa/TransferbilityFromAttributionMaps, tools/deep_attribution.py, tools/affinity.py

Use:
    >>> import torch
    >>> from attribution import affinity_matrix
    >>> encoders = [torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 8, 3, stride=2)]
    >>> affinity_matrix(encoders, torch.randn(5, 3, 8, 8)).shape
    torch.Size([2, 2])
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attribution_map(
    encoder: Callable[[Tensor], Tensor], x: Tensor, method: str = 'grad_input', output: str = 'sum'
) -> Tensor:
    """How every pixel contributes to the representation.

    Args:
        encoder: images -> representations (N, ...), differentiable; a module must not have batch norms in
            training mode.
        x: (N, C, H, W) probe images, normalised for this model.
        method: 'grad_input' or 'saliency'.
        output: 'sum' or 'norm', which number of the representation is differentiated.

    Returns:
        (N, C, H, W), detached. 0 where the representation does not depend on the image.

    Raises:
        ValueError: unknown method or output; x is not (N, C, H, W) of floats; the encoder does not give N
            rows; a batch norm is in training mode.
    """
    if method not in ('grad_input', 'saliency') or output not in ('sum', 'norm'):
        wanted = "method must be 'grad_input' or 'saliency', output 'sum' or 'norm'"
        got = f'{method!r} and {output!r}: the first of each is the default'
        raise ValueError(f'attribution_map: {wanted}, got {got}')
    if not torch.is_tensor(x) or x.dim() != 4 or 0 in x.shape or not x.is_floating_point():
        got = f'{tuple(x.shape)} of {x.dtype}' if torch.is_tensor(x) else type(x).__name__
        remedy = 'normalise the images as for the model, x[None] for one image'
        raise ValueError(f'attribution_map: x must be (N, C, H, W) of floats, got {got}: {remedy}')
    modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in modules):
        got = 'training mode, which mixes the maps of the images: encoder.eval()'
        raise ValueError(f'attribution_map: encoder must have its batch norms in evaluation mode, got {got}')
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        f = encoder(x)
        if not torch.is_tensor(f) or f.dim() == 0 or len(f) != len(x):
            got = tuple(f.shape) if torch.is_tensor(f) else type(f).__name__
            remedy = 'lambda x: net(x, True).feat reads the embedding of our networks'
            raise ValueError(f'attribution_map: encoder must give ({len(x)}, ...), got {got}: {remedy}')
        f = f.reshape(len(x), -1)
        value = f.sum() if output == 'sum' else f.norm(dim=1).sum()
        grad = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    grad = torch.zeros_like(x) if grad is None else grad
    return (x.detach() * grad if method == 'grad_input' else grad.abs()).detach()


def attribution_similarity(map_a: Tensor, map_b: Tensor, channel: str | None = 'mean') -> float:
    """Mean over images of the cosine of two models' maps.

    Args:
        map_a, map_b: (N, C, H, W) of the same images; map_a is resized to map_b's height and width.
        channel: 'mean' averages the colours; 'abs_mean' their absolute values; None keeps them.

    Returns:
        A number in -1..1; a map of zeros counts 0. Computed in float64.

    Raises:
        ValueError: shapes or numbers of images differ; unknown channel; other colours with channel None.
    """
    _maps('attribution_similarity', 'map_b', map_b, channel)
    _maps('attribution_similarity', 'map_a', map_a, channel, map_b)
    return float(_cosines(map_a, map_b, channel).mean())


def affinity_matrix(
    encoders: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor | Sequence[Tensor],
    method: str = 'grad_input',
    output: str = 'sum',
    channel: str | None = 'mean',
) -> Tensor:
    """Similarity of every pair of models.

    Args:
        encoders: M models, see attribution_map.
        x: (N, C, H, W) probe images, or M such tensors, the same images as each model wants them normalised.
        method, output: see attribution_map.  channel: see attribution_similarity.

    Returns:
        (M, M) float64, symmetric, 1 on the diagonal.

    Raises:
        ValueError: see attribution_map and attribution_similarity; not as many x as encoders.
    """
    xs = [x] * len(encoders) if torch.is_tensor(x) else list(x)
    if len(xs) != len(encoders):
        remedy = 'one tensor for all models, or one for each'
        raise ValueError(f'affinity_matrix: x must have {len(encoders)} tensors, got {len(xs)}: {remedy}')
    return map_affinity([attribution_map(f, x, method, output) for f, x in zip(encoders, xs)], channel)


def map_affinity(maps: Sequence[Tensor], channel: str | None = 'mean') -> Tensor:
    """affinity_matrix of models whose attribution maps (N, C, H, W) are there; of unlike maps the earlier
    model's is resized."""
    for x in maps:
        _maps('map_affinity', 'maps', x, channel, maps[0])
    made = torch.eye(len(maps), dtype=torch.float64)
    vectors = [_vectors(x, channel) for x in maps]
    units = [v.flatten(1) / v.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-12) for v in vectors]
    for i, j in torch.triu_indices(len(maps), len(maps), offset=1).T.tolist():
        if vectors[i].shape == vectors[j].shape:
            cosine = torch.linalg.vecdot(units[i], units[j])
        else:
            cosine = _cosines(maps[i], maps[j], channel)
        made[i, j] = made[j, i] = float(cosine.mean())
    return made


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
