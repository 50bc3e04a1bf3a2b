"""How taid.npz feeds kd_losses/taid.py."""

import torch

from kd_losses.taid import TAID

cases = {
    'taid': """
loss = m.TAID().eval()
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
}
CONSTANT = 'the interpolation is a constant by definition'
exceptions = {
    'no_labels': 'every image counts, a label masks a position of a text only',
    'no_gradcheck': CONSTANT,
    'gradient_not_of_value': CONSTANT,
}


def golden(z):
    """Consecutive calls of one module; nothing is left for a Case to check."""
    hp, steps = z.hp('t_start', 't_end', 'alpha', 'beta'), z.hp('num_steps')['num_steps']
    out_s, out_t, target = (z.input(name) for name in ('out_s', 'out_t', 'target'))
    for adaptive in (True, False):
        loss, seen = TAID(**hp, adaptive=adaptive), []
        out_s.grad = None
        for i in range(len(out_s)):
            used = loss.t.clone()
            value = loss(out_s[i], out_t[i], target[i], progress=i / steps)
            value.backward()  # after the update of t
            seen.append(torch.stack([value.detach(), used, loss.t, loss.momentum]))
        losses, used, after, momentum = torch.stack(seen).T
        if not adaptive:
            z.compare('out_t_after_linear', after)
            continue
        z.compare('loss', losses[0])
        z.compare('loss_steps', losses)
        z.compare('out_t_used', used)
        z.compare('out_t_after', after)
        z.compare('out_momentum', momentum)
        z.compare('grad_out_s', out_s.grad)
        assert out_t.grad is None
    return []
