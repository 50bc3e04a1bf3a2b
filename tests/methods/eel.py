"""How eel.npz feeds kd_losses/eel.py."""

from kd_losses.eel import EEL
from tests.methods.shared import case

exceptions = {
    'layers': 'the map to the wider space',
    'open_labels': 'it knows no number of classes',
}


def golden(z):
    widths = z.shape('in_feat_s')[1], z.shape('in_feat_t')[1]
    yield case(z, EEL(*widths, **z.hp('angle')), 'feat_s', 'feat_t', 'target')
