"""How srrl.npz feeds kd_losses/srrl.py."""

from kd_losses.srrl import SRRL
from tests.methods.shared import case, parameters

exceptions = {
    'one_logit': 'squared errors of logits',
    'layers': "the teacher's classifier",
}


def golden(z):
    loss = SRRL(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **z.hp('sr_weight'))
    roles = {
        'conv_weight': 'connector.0.weight',
        'bn_weight': 'connector.1.weight',
        'bn_bias': 'connector.1.bias',
    }
    classifier = z.input('cls_weight'), z.input('cls_bias')
    names = ('fm_s', 'fm_t', 'out_t')
    yield case(
        z, loss, *names, more=parameters(z, loss, roles), call=lambda **x: loss(**x, classifier=classifier)
    )
    for i, term in enumerate(('fm', 'sr')):
        yield case(
            z,
            loss,
            *names,
            suffix=f'_{term}',
            call=lambda i=i, **x: loss.terms(**x, classifier=classifier)[i],
        )
    assert all(x.grad is None for x in classifier), 'the classifier must not be trained'
