"""Networks that know their images normalised otherwise than the data at hand is."""

import torch
from torch import Tensor, nn


def trained_on(
    net: nn.Module, statistics: tuple, data: tuple, device: torch.device | str = 'cpu'
) -> nn.Module:
    """Let `net` bring its images to the mean and deviation it was trained with, before anything else.

    Copies of the network do so, too; its state dict stays as it is. With equal statistics nothing changes.

    Args:
        net: the network; it is changed and returned.
        statistics: (mean, std) per channel, of pixels in 0..1, of the images that it was trained on.
        data: (mean, std) of the images that it gets.
        device: where it is.

    Raises:
        ValueError: a standard deviation is not positive.
    """
    mean, std, data_mean, data_std = (
        torch.tensor(x, dtype=torch.float32, device=device)[:, None, None] for x in (*statistics, *data)
    )
    if not (std > 0).all() or not (data_std > 0).all():
        raise ValueError(f'standard deviations must be > 0, got {statistics[1]} and {data[1]}')
    if torch.equal(mean, data_mean) and torch.equal(std, data_std):
        return net
    net.register_buffer('input_scale', data_std / std, persistent=False)
    net.register_buffer('input_shift', (data_mean - mean) / std, persistent=False)
    net.register_forward_pre_hook(_renormalise)
    return net


def _renormalise(net: nn.Module, args: tuple) -> tuple[Tensor, ...]:
    return args[0] * net.input_scale + net.input_shift, *args[1:]
