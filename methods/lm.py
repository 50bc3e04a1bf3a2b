"""The rows of train_lm.py: a language model teaches a smaller one.

No row has cross-entropy beside it but those that need it. needs.views says what a feed asks of its batch
besides the text itself, see engine/lm.py and engine/lm_setting.py.
"""

from torch import nn

from kd_losses import abkd, akl, distillm, distillm2, dskd, fdistill, gkd, minillm, taid, uld

from .columns import Method, Needs, When
from .shared import logits_and_labels, plain


# fmt: off
def nothing(kd, s, t, batch):             return 0.0
def forward_kl(loss, probe, **options):   return loss(**{'beta': 0.0, **options})
def a_tenth(loss, probe, **options):      return loss(**{'beta': 0.1, **options})
def reverse(loss, probe, **options):      return loss(**{'reverse': True, **options})
def towards_mass(loss, probe, **options): return loss(**{'alpha': 0.2, 'beta': 0.7, **options})


alone, half = When(ce=0), When(ce=0.5)
#                    loss             weight  fed by               built by         only what differs
LM = {
    'abkd':       Method(abkd.ABKD,         1.0, logits_and_labels,   towards_mass,    alone),
    'akl':        Method(akl.AKL,           1.0, logits_and_labels,   plain,           alone),
    'ce':         Method(nn.Identity,       0.0, nothing,             needs=Needs(teacher=False)),
    'distillm':   Method(distillm.DistiLLM, 1.0, logits_and_labels,   plain,           alone),
    'distillm2':  Method(distillm2.DistiLLM2, 1.0, distillm2.feed,    plain,           alone,
                         Needs(views=('texts of teacher and student',))),
    'distillm_r': Method(distillm.DistiLLM, 1.0, logits_and_labels,   reverse,         alone,
                         says='DistiLLM with skew reverse KL'),
    'dskd':       Method(dskd.DSKD,         0.5, dskd.feed,           dskd.build,      half,
                         Needs(views=('hidden states',))),
    'dskd_cma':   Method(dskd.DSKDCMA,      0.5, dskd.feed_cma,       dskd.build_cma,  half,
                         Needs(views=('a second vocabulary',))),
    'fdistill':   Method(fdistill.FDistill, 1.0, fdistill.feed,       fdistill.build,  alone,
                         Needs(views=('texts of teacher and student',))),
    'fkl':        Method(gkd.GKD,           1.0, logits_and_labels,   forward_kl,      alone,
                         says='forward KL, from the teacher to the student'),
    'gkd':        Method(gkd.GKD,           1.0, logits_and_labels,   plain,           alone),
    'gkd_01':     Method(gkd.GKD,           1.0, logits_and_labels,   a_tenth,         alone,
                         says='GKD at beta 0.1'),
    'minillm':    Method(minillm.MiniLLM,   1.0, minillm.feed,        plain,           alone,
                         Needs(views=('texts of teacher and student',))),
    'rkl':        Method(minillm.ReverseKL, 1.0, logits_and_labels,   plain,           alone,
                         says='reverse KL on the given texts; nothing is sampled'),
    'taid':       Method(taid.TAID,         1.0, taid.feed,           taid.build,      alone),
    'tvd':        Method(fdistill.FDistill, 1.0, logits_and_labels,   plain,           alone,
                         says='total variation on the given texts'),
    'uld':        Method(uld.ULD,           0.5, uld.feed,            plain,           half,
                         Needs(views=('a second vocabulary',))),
}
