"""Networks that give a map of logits or depths: SegNet, LinkNet, DeepLabV3+.

V. Badrinarayanan, A. Kendall, R. Cipolla, "SegNet", TPAMI 2017, arXiv:1511.00561; A. Chaurasia, E.
Culurciello, "LinkNet", VCIP 2017, arXiv:1707.03718; L.-C. Chen et al., "Encoder-Decoder with Atrous Separable
Convolution", ECCV 2018, arXiv:1802.02611. Parameter names are KamalEngine's. `net(x)` gives (N, K, H, W);
`net(x, True)` also the list of maps inside.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class SegNet(nn.Module):
    """Encoder of convolutions and max pooling that remembers where the maxima were; a decoder that puts back.

    Args:
        num_classes: channels of the result, K.
        widths: channels of the five levels; VGG's by default.
        convolutions: per level; those of VGG16.

    Shape:
        x: (N, 3, H, W), H and W at least 32. Maps: five of the encoder, after pooling, four of the decoder.
    """

    def __init__(
        self,
        num_classes: int = 13,
        widths: tuple = (64, 128, 256, 512, 512),
        convolutions: tuple = (2, 2, 3, 3, 3),
    ) -> None:
        super().__init__()
        c_in = 3
        for i, (width, count) in enumerate(zip(widths, convolutions), 1):
            channels = [c_in, *[width] * count]
            setattr(self, f'down{i}', _Level(zip(channels, channels[1:])))
            c_in = width
        for i in range(len(widths), 0, -1):
            width, after = widths[i - 1], widths[max(i - 2, 0)]
            channels = [*[width] * convolutions[i - 1], after if i > 1 else num_classes]
            setattr(self, f'up{i}', _Level(zip(channels, channels[1:]), last=i == 1))
        self.levels = len(widths)

    def shape(self) -> tuple[tuple, tuple]:
        """(widths, convolutions), as the constructor takes them."""
        levels = [getattr(self, f'down{i}').layers for i in range(1, self.levels + 1)]
        return tuple(layers[-1][0].out_channels for layers in levels), tuple(map(len, levels))

    def forward(self, x: Tensor, feats: bool = False):
        places, maps = [], []
        for i in range(1, self.levels + 1):
            x = getattr(self, f'down{i}')(x)
            size = x.shape[2:]
            x, where = F.max_pool2d(x, 2, return_indices=True)
            places.append((where, size))
            maps.append(x)
        for i in range(self.levels, 0, -1):
            where, size = places[i - 1]
            x = getattr(self, f'up{i}')(F.max_unpool2d(x, where, 2, output_size=size))
            if i > 1:
                maps.append(x)
        return (x, maps) if feats else x


class _Level(nn.Module):
    """3x3 convolutions with batch norm and ReLU; those of the last level have no batch norm."""

    def __init__(self, pairs, last: bool = False) -> None:
        super().__init__()
        layers = []
        for a, b in pairs:
            parts = [] if last else [nn.BatchNorm2d(b)]
            layers.append(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), *parts, nn.ReLU()))
        if last:
            layers[-1] = layers[-1][:1]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LinkNet(nn.Module):
    """A ResNet-18 encoder; each decoder's result is added to the encoder's map of that size.

    Args:
        num_classes: channels of the result, K.

    Shape:
        x: (N, 3, H, W), multiples of 32. Maps: four of the encoder.

    Raises:
        ValueError: H or W is no multiple of 32.
    """

    def __init__(self, num_classes: int = 13) -> None:
        super().__init__()
        encoder = torchvision.models.resnet18(weights=None)
        for name in ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4'):
            setattr(self, name, getattr(encoder, name))
        widths = (64, 64, 128, 256, 512)
        for i in (4, 3, 2, 1):
            setattr(self, f'decoder{i}', _decoder(widths[i], widths[i - 1], 2 if i > 1 else 1))
        self.classifier = nn.Sequential(
            *(nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            nn.ConvTranspose2d(32, num_classes, 2, 2),
        )

    def forward(self, x: Tensor, feats: bool = False):
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise ValueError(f'LinkNet: x must have sides that 32 divides, got {tuple(x.shape)}')
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        d = maps[3]
        for i in (4, 3, 2):
            d = getattr(self, f'decoder{i}')(d) + maps[i - 2]
        out = self.classifier(self.decoder1(d))
        return (out, maps) if feats else out


def _decoder(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    mid = c_in // 4
    return nn.Sequential(
        *(nn.Conv2d(c_in, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU()),
        *(nn.ConvTranspose2d(mid, mid, 3, stride, 1, stride - 1), nn.BatchNorm2d(mid), nn.ReLU()),
        *(nn.Conv2d(mid, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()),
    )


class DeepLabV3Plus(nn.Module):
    """A ResNet-50 whose last stage keeps its resolution, pyramid pooling, and a decoder with the first stage.

    Args:
        num_classes: channels of the result, K.
        rates: dilations of the pyramid.

    Shape:
        x: (N, 3, H, W). Maps: of the first and the last stage.
    """

    def __init__(self, num_classes: int = 13, rates: tuple = (6, 12, 18)) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet50(
            weights=None, replace_stride_with_dilation=[False, False, True]
        )
        del self.backbone.fc
        self.classifier = _Head(num_classes, rates)

    def forward(self, x: Tensor, feats: bool = False):
        net, size = self.backbone, x.shape[2:]
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        high = net.layer4(net.layer3(net.layer2(low)))
        out = F.interpolate(self.classifier(low, high), size=size, mode='bilinear', align_corners=False)
        return (out, [low, high]) if feats else out


class _Head(nn.Module):
    def __init__(self, num_classes: int, rates: tuple) -> None:
        super().__init__()
        self.project = _unit(256, 48, 1)
        self.aspp = _Pyramid(rates)
        self.classifier = nn.Sequential(*_unit(304, 256, 3), nn.Conv2d(256, num_classes, 1))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        low = self.project(low)
        high = F.interpolate(self.aspp(high), size=low.shape[2:], mode='bilinear', align_corners=False)
        return self.classifier(torch.cat([low, high], dim=1))


class _Pyramid(nn.Module):
    def __init__(self, rates: tuple) -> None:
        super().__init__()
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_unit(2048, 256, 1))
        dilated = [_unit(2048, 256, 3, rate) for rate in rates]
        self.convs = nn.ModuleList([_unit(2048, 256, 1), *dilated, pooled])
        self.project = nn.Sequential(*_unit(1280, 256, 1), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        *maps, pooled = (conv(x) for conv in self.convs)
        pooled = F.interpolate(pooled, size=x.shape[2:], mode='bilinear', align_corners=False)
        return self.project(torch.cat([*maps, pooled], dim=1))


def _unit(c_in: int, c_out: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(c_in, c_out, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU())
