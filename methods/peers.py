"""The rows of train_dml.py: networks that learn from each other, without a teacher."""

from kd_losses import dcm, dml, kdcl, okddip, onadvfd, one

from . import shared
from .columns import Limits, Method, Needs, Own, When
from .schedules import gaussian

alone = Needs(teacher=False)
STEP = 'it has a training step of its own, which does not average over processes'

# fmt: off
PEERS = {
    'dcm':      Method(dcm.DCM,         1.0, dcm.feed, when=When(ce=0), needs=alone,
                       own=Own(peers=shared.with_heads)),
    'dml':      Method(dml.DML,         1.0, dml.feed, needs=alone, own=Own(peers=shared.separate)),
    'kdcl':     Method(kdcl.KDCL,       1.0, kdcl.feed, kdcl.build, When(ce=0),
                       Needs(teacher=False, views=('each',)),
                       Own(peers=shared.separate, each_epoch=kdcl.weigh)),
    'okddip':   Method(okddip.OKDDip,   1.0, okddip.feed, okddip.build,
                       When(ce=0, inner=gaussian(80, of=300)), alone, Own(peers=shared.separate)),
    'onadvfd':  Method(onadvfd.OnAdvFD, 1.0, onadvfd.feed, onadvfd.build, When(ce=0), alone,
                       Own(peers=shared.separate, optimisers=onadvfd.optimisers,
                           second_update=onadvfd.second_update), Limits(one_process=STEP)),
    'one':      Method(one.ONE,         1.0, one.feed, one.build,
                       When(ce=0, inner=gaussian(80, of=300)), alone,
                       Own(peers=one.peers, ensemble=one.ensemble)),
}
