"""Token amalgamation: a vision transformer whose sequence is as long as its teachers' sequences together.

No paper was found; an example of KamalEngine (2024) for two ViT-B/16 that know half of the classes each.

    loss = sum over levels of mean over all elements of (tok_s - the teachers' tokens, one after another)^2

Tap: level 0, the patch tokens after TokenExpand and before the position code; levels 1 ..., the output of
each block without the class token. Beside it: concat_kd on the logits.

Differences: KamalEngine's example trains with labels beside it and steps the blocks twice per iteration, once
in each of two optimisers; neither belongs to the loss. normalize='layer' is ours: without it the deep levels,
whose residual stream has grown, outweigh the others.
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
                    f'TokenAmalgamation: toks_t[{j}] must hold {len(toks_s)} levels, got {len(levels)}'
                )
        terms = {}
        for level, (tok_s, *each) in enumerate(zip(toks_s, *toks_t)):
            if any(tok_t.dim() != 3 or tok_t.shape[::2] != tok_s.shape[::2] for tok_t in each) or (
                sum(tok_t.shape[1] for tok_t in each) != tok_s.shape[1]
            ):
                shapes = ', '.join(str(tuple(tok_t.shape)) for tok_t in each)
                raise ValueError(
                    f"TokenAmalgamation: toks_s[{level}] must be (N, L, D) with the teachers' N and D, all "
                    f'their tokens ({shapes}), got {tuple(tok_s.shape)}'
                )
            tok_s, tok_t = _full(tok_s), torch.cat([_full(tok_t.detach()) for tok_t in each], dim=1)
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
        if x.dim() != 3 or x.shape[1] != self.linear.in_features:
            raise ValueError(
                f'TokenExpand: x must be (N, {self.linear.in_features}, D), got {tuple(x.shape)}'
            )
        return self.linear(x.transpose(1, 2)).transpose(1, 2)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
