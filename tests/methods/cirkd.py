"""How cirkd.npz feeds kd_losses/cirkd.py, and how it is called on random tensors."""

import torch

from kd_losses.cirkd import CIRKD
from tests.methods.shared import case, parameters

LABELS = """
inputs = {'fm_s': S(n, 4, 3, 2), 'fm_t': T(n, 5, 3, 2), 'target': torch.arange(n * 24) % 4 % 3}
inputs['target'] = inputs['target'].reshape(n, 6, 4)
inputs['target'][:, 0, 2:] = -1
inputs['target'][:, 2, 2:] = -100
"""
# in evaluation, where the queues stay as they are
cases = {
    'cirkd': f"""
loss = m.CIRKD(4, 5, K, pixel_memory=7, region_memory=5).eval()
{LABELS}""",
    'cirkd_pooled': f"""
loss = m.CIRKD(4, 5, K, T_kd=2.0, pixel_memory=7, region_memory=5, pooled=True).eval()
{LABELS}""",
}
exceptions = {
    'no_func_grad': 'it works in checkpoints',
    'layers': 'the head',
    'any_size': {'target': 'labels are brought to the size of the map'},
}


def golden(z):
    hp = z.hp('T', 'T_kd', 'num_classes', 'ignore')
    hp['update'] = z.hp('freq')['freq']
    s, t = z.shape('in_fm_s')[1], z.shape('in_fm_t')[1]
    hp |= {f'{name}_memory': z.shape(f'param_{name}_queue')[1] for name in ('pixel', 'region')}
    loss, pooled = CIRKD(s, t, **hp), CIRKD(s, t, pooled=True, **hp)
    for module, suffix in ((loss, '_batch'), (pooled, '_batch_pooled')):
        yield case(z, module, 'fm_s', 'fm_t', suffix=suffix, call=module.batch_loss)
    roles = {
        'conv1_w': 'head.0.weight',
        'bn_w': 'head.1.weight',
        'bn_b': 'head.1.bias',
        'conv2_w': 'head.3.weight',
    }
    more = parameters(z, loss, roles)

    def fill():
        for name in ('pixel', 'region'):
            loss.get_buffer(f'{name}_queue').copy_(z.param(f'{name}_queue'))
            loss.get_buffer(f'{name}_ptr').zero_()

    fill()
    index = [z.input(f'{name}_index') for name in ('pixel', 'region')]
    given = z.input('target'), *index

    def memory(fm_s, fm_t):
        pixel, region = loss.memory_losses(fm_s, fm_t, *given)
        z.compare('loss_pixel', pixel)
        z.compare('loss_region', region)
        return 0.1 * pixel + 0.1 * region

    yield case(z, loss, 'fm_s', 'fm_t', suffix='_memory', call=memory, more=more)
    z.compare(
        'loss', loss.batch_loss(z.input('fm_s'), z.input('fm_t')) + memory(z.input('fm_s'), z.input('fm_t'))
    )
    fill()
    for _ in range(2):
        loss.enqueue(z.input('fm_t'), z.input('enqueue_target'), torch.Generator().manual_seed(0))
    z.compare('out_region_queue', loss.region_queue)
    z.compare('out_region_ptr', loss.region_ptr.double())
    z.compare('out_pixel_ptr', loss.pixel_ptr.double())
    z.compare('out_pixel_queue_sum', loss.pixel_queue.sum(dim=1))
