"""Small vision transformers for 32 x 32 images: vit_D_L, D wide and L blocks deep, deit_D_L and vit_D_LxT.

A. Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929; deit_D_L has a second
token with a head of its own, H. Touvron et al., "Training data-efficient image transformers & distillation
through attention", ICML 2021, arXiv:2012.12877; vit_D_LxT has T times as many tokens, made of the patches
by a linear map along the sequence (ka_losses/ka_vit.py), vit_D_LxT_S for images of S pixels a side. Patches
are 4 x 4; heads are 64 wide, as in DeiT. Parameter names are timm's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ka_losses.ka_vit import TokenExpand

from .feats import Feats


class ViT(nn.Module):
    """Patches, a class token, pre-norm blocks of attention and MLP, a linear classifier on the class token.

    Args:
        dim: width, a multiple of 64, the width of a head.
        depth: blocks, at least 3.
        num_classes: K.
        distilled: with a distillation token and a head on it.
        patch: side of a patch, 4.
        image_size: side of the images for which positions are learned, 32; others interpolate them.
        times: how many times as many tokens as patches, 1; else images of another size are refused.

    Shape:
        x: (N, 3, H, W), H and W multiples of patch. `net(x)` returns (N, K), distilled the mean of both
        heads' logits. `net(x, True)` returns Feats: four maps (N, dim, H / patch, W / patch) of patch
        tokens, embedded, after one and two thirds of the blocks, and after the final layer norm. No
        activation follows them, so pres are the same maps. `tokens` are those after every block, `levels` the
        same without the final layer norm, and before them what the positions are added to; distilled, `extra`
        is [logits of the class head, logits of the distillation head]. With several tokens per patch, maps
        are times H / patch high.

    Raises:
        ValueError: dim is no multiple of 64; depth < 3; an image cannot be cut into patches.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_classes: int = 100,
        distilled: bool = False,
        patch: int = 4,
        image_size: int = 32,
        times: int = 1,
    ) -> None:
        super().__init__()
        if dim < 64 or dim % 64 or depth < 3:
            raise ValueError(f'vit: width must be a multiple of 64, depth at least 3, got {dim} and {depth}')
        self.patch, self.grid, self.prefix, self.times = patch, image_size // patch, 1 + distilled, times
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + times * self.grid**2, dim))
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(3, dim, patch, stride=patch)})
        self.expand = TokenExpand(self.grid**2, times) if times > 1 else None
        self.blocks = nn.ModuleList(_Block(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.head_dist = nn.Linear(dim, num_classes) if distilled else None
        for x in (self.cls_token, self.dist_token, self.pos_embed):
            if x is not None:
                nn.init.trunc_normal_(x, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        if self.expand is not None:  # every copy begins as the patches themselves
            with torch.no_grad():
                self.expand.linear.weight.add_(torch.eye(self.grid**2).repeat(times, 1))

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        if (h * self.patch, w * self.patch) != tuple(x.shape[2:]):
            raise ValueError(
                f'vit: height and width of the images must be multiples of {self.patch}, got {tuple(x.shape)}'
            )
        if self.times > 1 and (h, w) != (self.grid, self.grid):
            raise ValueError(
                f'vit: with {self.times} tokens per patch, images must have {self.grid * self.patch} pixels '
                f'a side, got {h * self.patch} and {w * self.patch}'
            )
        x = self.patch_embed['proj'](x).flatten(2).mT
        if self.expand is not None:
            x = self.expand(x)
        levels = [x]
        front = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.dist_token) if t is not None]
        x = torch.cat([t.to(x.dtype) for t in front] + [x], dim=1) + self.positions(h, w)
        embedded, tokens = x, []
        for block in self.blocks:
            x = block(x)
            tokens.append(x)
            levels.append(x[:, self.prefix :])
        tokens[-1] = x = self.norm(x)
        outs = [self.head(x[:, 0])] + ([self.head_dist(x[:, 1])] if self.head_dist is not None else [])
        out = outs[0] if len(outs) == 1 else (outs[0] + outs[1]) / 2
        if not feats:
            return out
        depth, tokens = len(self.blocks), [t[:, self.prefix :] for t in tokens]
        chosen = [embedded[:, self.prefix :], *(tokens[round(depth * k / 3) - 1] for k in (1, 2, 3))]
        fms = [t.mT.unflatten(2, (self.times * h, w)) for t in chosen]
        return Feats(out, x[:, 0], fms, list(fms), outs if len(outs) > 1 else None, tokens, levels)

    def positions(self, h: int, w: int) -> Tensor:
        """(1, tokens, dim) for a grid of h x w patches."""
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        front, patches = self.pos_embed[:, : self.prefix], self.pos_embed[:, self.prefix :]
        patches = patches.mT.unflatten(2, (self.grid, self.grid))
        patches = F.interpolate(patches, (h, w), mode='bicubic', align_corners=False)
        return torch.cat([front, patches.flatten(2).mT], dim=1)

    def after(self, k: int, fm: Tensor) -> Feats:
        raise ValueError(
            'a vision transformer cannot be run from the middle, which this method needs: a map lacks the '
            'class token'
        )

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        raise ValueError('a vision transformer has no batch norm, which this method needs')

    def feat_modules(self) -> list[nn.Module]:
        """Everything but the classifier."""
        more = [] if self.expand is None else [self.expand]
        return [self.patch_embed, *more, self.blocks, self.norm]

    def classifier_layer(self) -> nn.Linear:
        return self.head

    def further_heads(self) -> list[nn.Linear]:
        return [] if self.head_dist is None else [self.head_dist]


class _Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({'qkv': nn.Linear(dim, 3 * dim), 'proj': nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(dim, 4 * dim), 'fc2': nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn['qkv'](self.norm1(x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn['proj'](o)
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x))))
