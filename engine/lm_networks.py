"""The networks of train_lm.py: how teachers and warm starts are trained and kept, students measured."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from engine.device import exact
from engine.errors import NonFinite, UserError, user_errors
from engine.lm_setting import PROMPT, TEACHER_LR, Setting, adamw, cross_entropy, set_rates, share_of_rate
from engine.meter import all_finite
from engine.processes import summed
from engine.record import keep
from engine.step_record import StepRecord
from models import lm
from models.checkpoint import named_weights, read_checkpoint

# ---------------------------------------------------------------------------------- teachers, and warm starts


def trained(
    net: nn.Module,
    batches: Callable,
    steps: int,
    device: torch.device,
    bar: Callable,
    rate: float = TEACHER_LR,
) -> nn.Module:
    """net after so many steps of cross-entropy; batches: step -> (x, target)."""
    net.to(device).train()
    opt = adamw([{'params': list(net.parameters()), 'base': rate}])
    for step in range(steps):
        x, target = batches(step)
        set_rates(opt, share_of_rate(step, steps))
        opt.zero_grad(set_to_none=True)
        loss = cross_entropy(net(x), target)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        bar(step, loss)
    return net.eval().requires_grad_(False)


def kept_or_trained(path: Path, what: str, log: Callable, make: Callable, symbols: Sequence) -> nn.Module:
    """The network of a file of an earlier training, or make(), which is written there with its symbols."""

    def weights() -> dict:
        net = make()
        if not all_finite(net):
            raise NonFinite(f'{what}: a weight is not finite after its training')
        return named_weights(net, symbols)

    log(f'{what}: {"trained, " if keep(path, weights) else ""}{path}')
    return loaded(path)


def loaded(path: str | Path, text=None) -> nn.Module:
    """The network of a file; of another text's symbols it is refused, where the file names its own."""
    with user_errors():
        state = read_checkpoint(path)
        try:
            net = lm.from_state(state)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None
    if text is not None:
        refuse_other_symbols(path, net.embed.num_embeddings, getattr(state, 'class_names', None), text)
    return net


def refuse_other_symbols(path: str | Path, K: int, names: Sequence[str] | None, text) -> None:
    """names: of the K symbols; None: a file from before they were kept."""
    wanted, differ = list(text.symbols), ''
    if K != len(wanted):
        differ = f'knows {K} symbols, {text.name} has {len(wanted)}'
    elif names and names != wanted:
        strange, lacking = (
            ', '.join([repr(x) for x in a if x not in b][:4]) for a, b in ((names, wanted), (wanted, names))
        )
        differ = f'has the symbols of {text.name} in another order'
        if strange:
            differ = f'knows other symbols than {text.name}: {strange} where that has {lacking}'
    if differ:
        raise UserError(
            f'{path}: {differ}; a teacher and its students need one text: leave --t_model out, and one is '
            'trained'
        )


# ---------------------------------------------------------------------------------------- figures and records


@torch.no_grad()
def measure(net: nn.Module, setting: Setting) -> tuple[dict[str, float], str]:
    """Figures of the held-out text, and what the student makes of its first prompt."""
    exam, first = setting.exam, setting.text.first
    sums = exact(torch.zeros(4, device=setting.device))
    for x, target, out_t in exam.parts:
        log_q = F.log_softmax(setting.look(net, x).out[:, first:].float(), dim=2)
        log_p = F.log_softmax(out_t[:, first:], dim=2)
        sums += torch.stack([
            -exact(log_q.gather(2, target[:, first:, None])).sum(),
            exact(log_q.argmax(dim=2) == log_p.argmax(dim=2)).sum(),
            exact(log_p.exp() * (log_p - log_q)).sum(),
            exact(log_q.exp() * (log_q - log_p)).sum(),
        ])  # fmt: skip
    loss, agreement, kl_ts, kl_st = (summed(sums) / exam.count).tolist()
    generator = torch.Generator(setting.device).manual_seed(0)
    whole = lm.sample(net, exam.prompts, PROMPT, generator)
    out_t = setting.look(setting.net_t, whole[:, :-1]).out[:, PROMPT - 1 :].float()
    gen_nll = cross_entropy(out_t, whole[:, PROMPT:]).item()
    figures = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0)), 'agreement': agreement}
    figures |= {'kl_ts': kl_ts, 'kl_st': kl_st, 'gen_nll': gen_nll}
    shown = [setting.text.show(part.tolist()) for part in whole[0].split(PROMPT)]
    return {f'val_{key}': value for key, value in figures.items()}, '|'.join(shown)


class TextRecord(StepRecord):
    """Its figure is a loss: less is better."""

    data, digits = 'held-out text', 3

    def __init__(self, symbols: Sequence[str], *words) -> None:
        super().__init__(*words)
        self.symbols = symbols

    def _weights(self) -> dict:
        return named_weights(self.parts['net'], self.symbols)

    @property
    def best(self) -> dict:
        return min(self.history, key=lambda row: row[self.key])
