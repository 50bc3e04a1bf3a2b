"""How bss.npz feeds kd_losses/bss.py."""

import torch

from kd_losses.bss import BSS, BSSAttacker, sample_attack_class, select_base_samples
from tests.methods.shared import case, tiny_net

exceptions = {
    'not_compiled': 'the attack differentiates inside the forward pass',
    'coarse': 'the attack',
    'unlabelled_counts': 'draws the attacked classes for all slots',
    'layers': 'the networks',
    'no_meta': 'draws on the generator of the batch',
    'labels_in_feed': 'the attack reads the labels, not forward',
}


def golden(z):
    sample = z.hp('attack_size')['attack_size']
    out_s, out_t = tiny_net(z, 's', z.input('img'))[1], tiny_net(z, 't', z.input('img'))[1]
    z.compare('out_logits_s', out_s)
    z.compare('out_logits_t', out_t)
    target = z.input('target')
    index = select_base_samples(out_s, out_t, target, sample)
    assert index.tolist() == z.arrays['out_attack_idx'].tolist()
    classes = sample_attack_class(out_t, index, z.input('rand_u').detach())
    assert classes.tolist() == z.arrays['out_attack_class'].tolist()
    z.open -= {'out_attack_idx', 'out_attack_class'}
    for score, key in (('logit', 'out_attacked_img'), ('prob', 'out_attacked_img_prob')):
        attacker = BSSAttacker(**z.hp('step_alpha', 'num_steps', 'eps'), score=score)
        img = z.input('img').detach()[index]
        z.compare(key, attacker.attack(lambda x: tiny_net(z, 't', x)[1], img, target[index], classes))
    names = ('attacked_out_s', 'attacked_out_t')
    loss = BSS(**z.hp('T'))
    yield case(z, loss, *names)

    def cross_entropy(attacked_out_s, attacked_out_t):  # the authors' form: KL plus the teacher's entropy
        q = (attacked_out_t / loss.T).softmax(dim=1)
        return loss(attacked_out_s, attacked_out_t) - (q * q.log()).sum(dim=1).mean()

    yield case(z, loss, *names, suffix='_ce', call=cross_entropy)


def arrange(s, t):
    """Some images must be right, or there is nothing to attack."""
    with torch.no_grad():
        for f in (s, t):
            n, K = f.out.shape
            f.out[: n - 1] += 20 * torch.eye(K)[torch.arange(n - 1) % K].to(f.out)
