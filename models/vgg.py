"""VGG with batch norm for CIFAR: vgg8, vgg11, vgg13, vgg16, vgg19, as RepDistiller defines them.

K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
arXiv:1409.1556, with one linear layer on the pooled last map.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five blocks of convolutions, pooled after the first three, global average, linear classifier.

    Args:
        depth: 8, 11, 13, 16 or 19.
        num_classes: number of classes.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, classes); `net(x, True)` returns Feats with five maps, each
        before its pooling. Images 64 to 71 pixels high are pooled after the fourth block too.
    """

    def __init__(self, depth: int, num_classes: int = 100) -> None:
        super().__init__()
        c_in = 3
        for i, (width, count) in enumerate(zip(_WIDTHS, _CONVOLUTIONS[depth])):
            setattr(self, f'block{i}', _block(c_in, width, count))
            c_in = width
        self.classifier = nn.Linear(c_in, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        pre = self.block0(x)
        fm = F.relu(pre)
        f = self.after(0, fm)
        return Feats(f.out, f.feat, [fm, *f.fms], [pre, *f.pres]) if feats else f.out

    def after(self, k: int, fm: Tensor) -> Feats:
        """The rest of the network from fms[k]: its later maps, embedding and logits."""
        fms, pres = [], []
        # RepDistiller pools images of 64 pixels once more, before block 4: so are all whose map there, which
        # every earlier map tells, is 8 high too
        pooled_after = 4 if fm.shape[2] >> max(3 - k, 0) == 8 else 3
        for i, block in enumerate(self.feat_modules()[k + 1 :], k):
            pre = block(F.max_pool2d(fm, 2) if i < pooled_after else fm)
            fm = F.relu(pre)
            pres.append(pre)
            fms.append(fm)
        feat = fm.mean(dim=(2, 3))
        return Feats(self.classifier(feat), feat, fms, pres)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each block but the first, aligned with fms[1:]."""
        return [block[-1] for block in self.feat_modules()[1:]]

    def feat_modules(self) -> list[nn.Module]:
        return [self.block0, self.block1, self.block2, self.block3, self.block4]

    def classifier_layer(self) -> nn.Linear:
        return self.classifier


def _block(c_in: int, width: int, count: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU, repeated, without the last ReLU: the network applies and keeps it."""
    layers = []
    for _ in range(count):
        layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        c_in = width
    return nn.Sequential(*layers[:-1])
