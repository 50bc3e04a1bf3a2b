"""Mistakes of people who add a method, a network or a row of their own."""

import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine import listing
from engine.build import check_terms
from engine.errors import UserError
from engine.evaluate import features_of, refuse_misfit
from engine.method_flags import built_from, check_option
from engine.student import Run, Student, Term
from kd_losses.st import SoftTarget
from methods.columns import Method, Own, When
from methods.kd import KD
from methods.schedules import linear
from methods.shared import logits
from report.page.facts import kind_of, said_by_source


@pytest.mark.parametrize('given', ['float', 'detached', 'vector', 'tuple', None])
def test_a_loss_that_teaches_nothing_is_refused_before_training(given):
    x = torch.ones(3, requires_grad=True)
    terms = {'float': 2.0, 'detached': x.sum().detach(), 'vector': x * 2, 'tuple': (x.sum(), {}), None: None}
    check_terms({'ce': x.sum()})
    with pytest.raises(UserError, match='mine: the loss must be one number with a gradient'):
        check_terms({'ce': x.sum(), 'mine': terms[given]})


def test_a_ramp_begins_with_the_training_and_not_in_the_phase_before():
    """Epochs before the training are counted down from 0: a ramp made the weight negative there."""
    row = Method(
        SoftTarget, 2.0, logits, when=When(alone=60, ramp=linear(20, of=240), inner=linear(20, of=240))
    )
    term = Term('mine', row, 2.0, {})
    term.loss, term.ramp = SoftTarget(), row.when.ramp
    step = Student(nn.Linear(2, 2), [term], None)
    assert step.weights('init', -2, 6) == {'mine': 2.0}
    assert step.inner(-2, 6) == step.inner(0, 6)
    plain = Term('mine', replace(row, when=replace(row.when, alone=0)), 2.0, {})
    plain.loss, plain.ramp = SoftTarget(), row.when.ramp
    assert Student(nn.Linear(2, 2), [plain], None).weights('train', 0, 240)['mine'] == pytest.approx(0.1)


def test_a_schedule_that_never_begins_is_told_apart_from_a_flag():
    """Of one epoch bss sees none, and cd_edt no label; what the user switches off is no news."""

    def resting(names, epochs, ce=None):
        terms = [Term(name, KD[name], 1.0, {}, ramp=KD[name].when.ramp) for name in names]
        return Run.resting(
            types.SimpleNamespace(terms=terms, epochs=epochs, step=types.SimpleNamespace(ce=ce))
        )

    assert resting(['bss', 'st'], 1) == ['bss'] and resting(['cd_edt'], 1) == ['ce']
    assert resting(['bss', 'sad', 'cd_edt'], 200) == [] == resting(['cd_edt'], 1, ce=0.0)


def test_half_a_pretraining_is_refused():
    with pytest.raises(
        ValueError, match='SoftTarget: When.pretrain=epochs. and Own.pretrain=function. go together'
    ):
        Method(SoftTarget, 1.0, logits, when=When(pretrain=60))
    with pytest.raises(ValueError, match='go together'):
        Method(SoftTarget, 1.0, logits, own=Own(pretrain=lambda kd, t, batch: 0))


def test_a_file_without_docstring_is_named():
    module = types.ModuleType('mine', '"""A title alone."""')
    module.__file__ = 'kd_losses/mine.py'
    with pytest.raises(ValueError, match='kd_losses/mine.py: the docstring must begin with a title'):
        listing.opening(module)


def test_a_network_that_lacks_a_part_is_a_line_and_a_slip_of_the_build_a_traceback():
    with pytest.raises(UserError, match="^simkd: 'Linear' object has no attribute 'classifier_layer'"):
        with built_from('', 'simkd'):
            nn.Linear(2, 2).classifier_layer()
    with pytest.raises(UserError, match='^--kd_args: mine: list index'):
        with built_from('--kd_args', 'mine'):
            [][9]
    with pytest.raises(AttributeError), built_from('', 'mine'):
        getattr(types.SimpleNamespace(), 'fms')  # noqa: B009  as a build would read it


class Outputs(nn.Module):
    """A network whose forward passes give what a test says."""

    def __init__(self, plain, more=None):
        super().__init__()
        self.plain, self.more = plain, more

    def forward(self, img, *is_feat):
        if is_feat and self.more is None:
            raise TypeError('forward() takes 2 positional arguments but 3 were given')
        return self.more if is_feat else self.plain


def test_networks_with_the_conventions_of_other_projects_are_lines_that_say_the_way():
    img, logits = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)
    data = types.SimpleNamespace(test_batches=lambda n: iter([(img, None, None)]))
    with pytest.raises(
        UserError, match=r'^mine: net\(img\) must give logits, got a tuple; docs/extending.md'
    ):
        refuse_misfit('mine', Outputs((logits, {})), data)
    with pytest.raises(UserError, match='^mine: .* but 3 were given; docs/extending.md'):
        features_of('mine', Outputs(logits), img)
    with pytest.raises(UserError, match=r'^mine: net\(img, True\) must give Feats, got a tuple; docs'):
        features_of('mine', Outputs(logits, ([], logits)), img)


def test_an_argument_without_annotation_takes_a_value():
    class Mine(nn.Module):
        def __init__(self, s_dim, margin=0.1):
            super().__init__()

    row = Method(Mine, 1.0, logits)
    check_option('mine', row, 'margin', 0.3, '--kd_args')
    check_option('mine', row, 'margin', True, '--kd_args')
    with pytest.raises(UserError, match="no argument 'edge'"):
        check_option('mine', row, 'edge', 0.3, '--kd_args')


def test_a_weight_says_the_arguments_that_it_was_made_for():
    assert listing.unlike_defaults(KD['ofd']) == "reduction='mean'"
    assert listing.unlike_defaults(KD['st']) == ''


def test_a_file_without_source_claims_no_verification():
    doc = types.SimpleNamespace(source=[])
    assert said_by_source(doc).startswith('nothing yet') and kind_of('', doc) == 'formula'
