"""How fkd_labels.npz feeds kd_losses/fkd_labels.py."""

import torch

from kd_losses.fkd_labels import SoftCE, SoftKL, quantise, recover
from tests.methods.shared import Case

exceptions = {
    'masked_class': 'a class of probability 0 counts nothing',
}
alone = 'loss, inputs = m.SoftCE(), dict(out_s=S(n, K), out_t=T(n, K).softmax(dim=1))'
rows = {
    'fkd_labels_strong': {
        'coarse': 'another view',
        'layers': 'another view',
    },
}
NAMES = {
    'hard': 'hard',
    'smoothing': 'smoothing',
    'marginal_smoothing_k5': 'smooth5',
    'marginal_renorm_k5': 'renorm5',
    'marginal_smoothing_k10': 'smooth10',
}


def golden(z):
    temp_t, temp_s, T = z.hp('temp_t', 'temp_s', 'T').values()
    out_t = z.input('out_t').detach()
    K, probs = out_t.shape[1], (out_t / temp_t).softmax(dim=1)
    for name, kind in NAMES.items():
        index, value = quantise(probs, kind)
        stored = z.arrays[f'out_stored_{name}']
        parts = [x.double() for x in (index, value) if x is not None]
        parts = parts[0][:, 0] if kind == 'hard' else torch.stack(parts, dim=1)
        z.compare(f'out_stored_{name}', parts.reshape(stored.shape))
        label = recover(index, value, kind, K).double()
        z.compare(f'out_label_{name}', label)
        for suffix in (f'_{name}', *([''] if kind == 'smooth5' else [])):
            inputs = {'out_s': z.input('out_s')}
            yield Case(
                lambda out_s, label=label: SoftCE(temp_s)(out_s, label),
                inputs,
                f'loss{suffix}',
                {f'grad_out_s{suffix}': inputs['out_s']},
            )
        if kind != 'hard':  # the file's values are rounded, not their rest cut at 0
            halved = recover(index, value.half().double(), kind, K)
            wanted = torch.as_tensor(z.arrays[f'out_label_fp16_{name}'])
            torch.testing.assert_close(halved, wanted.clamp(min=0), rtol=1e-9, atol=1e-9)
            z.compare(f'out_label_fp16_{name}', torch.where(wanted < 0, wanted, halved))
    rounded = out_t.half().double()
    z.compare('out_logits_fp16', rounded)
    inputs = {'out_s': z.input('out_s')}
    yield Case(lambda out_s: SoftKL(T)(out_s, rounded), inputs, 'loss_kl', {'grad_out_s_kl': inputs['out_s']})
    box, height, width = z.input('box').double(), *z.hp('height', 'width').values()
    sides = torch.tensor([height, width, height, width], dtype=torch.float64)
    z.compare('out_coords', (box / sides).float().double())  # the authors' store; ours replays from the seed
