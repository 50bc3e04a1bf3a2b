"""What rows of methods/ka.py share: feeds, builds, and the parameters that an update moves.

feed(ka, s, all_t, batch) -> (loss, its terms without weights, for the log). s: what the student says, Feats
(out, feat, fms, pres) or outputs per task; all_t: a list of the same, one per teacher, cut to the classes in
use.

build(loss, probe, **options) -> the loss's module.
"""


def with_labels(ka, s, all_t, batch):
    """The reference: what the setting's labels say, no teacher."""
    loss = batch.supervised(s, batch.target)
    return loss, {'labels': loss}


def no_module(loss, probe, **options):
    return loss()


def everything(net, ka) -> dict:
    """{update: (parameters of the student, parameters of the loss)}, each update with its own optimiser."""
    return {'all': (list(net.parameters()), list(ka.parameters()))}
