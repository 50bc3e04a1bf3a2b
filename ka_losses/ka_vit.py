"""Token amalgamation: a vision transformer whose sequence is as long as its teachers' sequences together.

No paper was found; an example of KamalEngine (2024) for two ViT-B/16 that know half of the classes each.

    loss = sum over levels of mean over all elements of (tok_s - the teachers' tokens, one after another)^2

Tap: level 0, the patch tokens after TokenExpand and before the position code; levels 1 ..., the output of
each block without the class token. Beside it: concat_kd on the logits.

Differences: KamalEngine's example trains with labels beside it and steps the blocks twice per iteration, once
in each of two optimisers; neither belongs to the loss. normalize='layer' is ours: without it the deep levels,
whose residual stream has grown, outweigh the others.

Source: zju-vipa/KamalEngine, examples/KA_VIT_classification/vit_model.py and utils.py
(train_one_epoch_of_KA).

Use:
    >>> import torch
    >>> from ka_vit import TokenAmalgamation
    >>> toks_s = [torch.randn(2, 8, 16, requires_grad=True)]
    >>> toks_t = [[torch.randn(2, 4, 16)], [torch.randn(2, 4, 16)]]  # two teachers, one level
    >>> TokenAmalgamation()(toks_s, toks_t).backward()
    >>> toks_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenAmalgamation(nn.Module):
    """Squared distance of the student's tokens to the teachers', level by level.

    Args:
        normalize: 'none', or 'layer': each token to mean 0 and variance 1 first, on both sides.

    Shape:
        toks_s: list over levels of (N, L_1 + ... + L_m, D); toks_t: list over teachers of lists over levels
        of (N, L_i, D). Returns a scalar, with return_terms=True also {'level0': ..., ...}. No gradient
        reaches toks_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: unknown normalize; numbers of levels or shapes that do not meet.
    """

    def __init__(self, normalize: str = 'none') -> None:
        super().__init__()
        if normalize not in ('none', 'layer'):
            raise ValueError(f"TokenAmalgamation: normalize must be 'none' or 'layer', got {normalize!r}")
        self.normalize = normalize

    def forward(self, toks_s: list[Tensor], toks_t: list[list[Tensor]], return_terms: bool = False):
        for j, levels in enumerate(toks_t):
            if len(levels) != len(toks_s):
                raise ValueError(
                    f'TokenAmalgamation: toks_t[{j}] must hold {len(toks_s)} levels, '
                    f'got {len(levels)}: tap both alike'
                )
        terms = {}
        for level, (tok_s, *each) in enumerate(zip(toks_s, *toks_t)):
            _expect('TokenAmalgamation', f'toks_s[{level}]', tok_s, 'N', 'L', 'D')
            if any(tok_t.dim() != 3 or tok_t.shape[::2] != tok_s.shape[::2] for tok_t in each) or (
                sum(tok_t.shape[1] for tok_t in each) != tok_s.shape[1]
            ):
                shapes = ', '.join(str(tuple(tok_t.shape)) for tok_t in each)
                raise ValueError(
                    f"TokenAmalgamation: toks_s[{level}] must be (N, L, D) with the teachers' N and D, all "
                    f'their tokens ({shapes}), got {tuple(tok_s.shape)}: see TokenExpand'
                )
            tok_s, tok_t = _full(tok_s), torch.cat([_full(tok_t.detach(), tok_s) for tok_t in each], dim=1)
            if self.normalize == 'layer':
                tok_s, tok_t = (F.layer_norm(tok, tok.shape[-1:]) for tok in (tok_s, tok_t))
            terms[f'level{level}'] = F.mse_loss(tok_s, tok_t)
        loss = sum(terms.values())
        return (loss, terms) if return_terms else loss


class TokenExpand(nn.Module):
    """A linear map along the sequence: as many tokens as all teachers together.

    Args:
        n_tokens: L of the student's patch embedding.
        n_teachers: how many times as long the result is.

    Shape:
        x: (N, L, D) -> (N, n_teachers L, D).

    Raises:
        ValueError: x has another length.
    """

    def __init__(self, n_tokens: int, n_teachers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_tokens, n_tokens * n_teachers)

    def forward(self, x: Tensor) -> Tensor:
        _expect('TokenExpand', 'x', x, 'N', self.linear.in_features, 'D')
        return self.linear(x.transpose(1, 2)).transpose(1, 2)


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


def sizes(levels) -> tuple[int, int, int]:
    """Blocks, tokens, numbers of each; zeros if it is no transformer."""
    return (len(levels) - 1, *levels[0].shape[1:]) if len(levels) else (0, 0, 0)


def feed(ka, s, all_t, batch):
    depth, length, width = zip(*(sizes(f.levels) for f in (s, *all_t)))
    if not depth[0] or len({*depth}) > 1 or len({*width}) > 1 or length[0] != sum(length[1:]):
        raise ValueError(
            'ka_vit: compares tokens, so teachers must be vision transformers, e.g. vit_64_3, and the '
            f'student one of {len(all_t)} times as many tokens, e.g. vit_64_3x{len(all_t)}, as deep and as '
            f'wide as the teachers; got {depth[0]} blocks, {length[0]} tokens of {width[0]} numbers, of the '
            f'teachers {list(depth[1:])}, {list(length[1:])} of {list(width[1:])}'
        )
    return ka(s.levels, [t.levels for t in all_t], return_terms=True)
