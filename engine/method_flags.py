"""What --kd_mode, --lambda_kd and --kd_args say of methods, checked before anything else happens."""

import argparse
import ast
import contextlib
import inspect
import re
from collections.abc import Iterable

from torch import nn

from engine.errors import UserError, user_errors
from engine.processes import processes


def key_values(items: Iterable[str], flag: str) -> dict:
    """['T=4', 'kernel=linear'] -> {'T': 4, 'kernel': 'linear'}: values are Python literals, else strings."""
    result = {}
    for item in items:
        key, equals, text = item.partition('=')
        if not (key and equals):
            raise UserError(f'{flag}: expected key=value, got {item!r}')
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[key] = text
    return result


def refuse_unknown(
    flag: str, names: Iterable[str], rows: dict, elsewhere: dict[str, str] | None = None
) -> None:
    """elsewhere: {a method of another script: what to do with it}"""
    for name in sorted(set(names) - rows.keys()):
        if name in (elsewhere or {}):
            raise UserError(f'{flag} {name}: {elsewhere[name]}')
        raise UserError(f'{flag}: no method is called {name!r}; there are {", ".join(rows)}')


def refuse_repeated(flag: str, words: list[str]) -> None:
    """Of students, and of the methods that one student joins with +."""
    if any(len(set(names)) < len(names) for names in (words, *(word.split('+') for word in words))):
        raise UserError(f'{flag} {" ".join(words)}: something is named twice')


def refuse_many_processes(names: Iterable[str], rows: dict) -> None:
    for name in sorted(names):
        if processes() > 1 and rows[name].limits.one_process:
            raise UserError(f'{name} runs in one process only: {rows[name].limits.one_process}')


def weights_and_options(
    args: argparse.Namespace, names: list[str], methods: dict, kind: str = 'kd'
) -> tuple[dict, dict]:
    """{name: weight} and {name: constructor arguments} from --lambda_kd and --kd_args (or another kind's)."""
    mode, heavy, flag = f'--{kind}_mode', f'--lambda_{kind}', f'--{kind}_args'
    chosen, wanted, given = (getattr(args, name[2:]) for name in (mode, heavy, flag))
    weights = {name: methods[name].weight for name in names}
    if not names and (wanted or given):
        raise UserError(f'{heavy if wanted else flag}: {mode} {" ".join(chosen)} trains nothing')
    if len(wanted) == 1 and '=' not in wanted[0]:
        if len(names) > 1:
            raise UserError(f'{heavy} {wanted[0]}: with several methods say METHOD=number')
        wanted = [f'{names[0]}={wanted[0]}']
    for name, weight in key_values(wanted, heavy).items():
        if name not in names:
            raise UserError(f'{heavy}: {name!r} is not among {mode} {" ".join(chosen)}')
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise UserError(f'{heavy}: the weight of {name} must be a number, got {weight!r}')
        weights[name] = float(weight)

    options = {name: {} for name in names}
    for key, value in key_values(given, flag).items():
        name, _, key = key.rpartition('.')
        if not name and len(names) > 1:
            raise UserError(f'{flag} {key}: with several methods say METHOD.{key}=VALUE')
        name = name or names[0]
        if name not in names:
            raise UserError(f'{flag}: {name!r} is not among {mode} {" ".join(chosen)}')
        check_option(name, methods[name], key, value, flag)
        options[name][key] = value
    return weights, options


def check_option(name: str, method, key: str, value, flag: str) -> None:
    """A key and its type against the constructor's signature, before anything else happens.

    What the row's build takes besides, with a default, counts, too: it goes elsewhere, into an optimiser.
    """
    signature = inspect.signature(method.loss)
    more = inspect.signature(method.build).parameters.items()
    more = [p for k, p in more if p.empty not in (p.default, p.annotation) and k not in signature.parameters]
    signature = signature.replace(parameters=[*signature.parameters.values(), *more])
    shown = f'the signature is {method.loss.__name__}{str(signature).replace(" -> None", "")}'
    if key not in signature.parameters:
        raise UserError(f'{flag}: {name} has no argument {key!r}; {shown}')
    kind = signature.parameters[key].annotation
    kind = object if kind is inspect.Parameter.empty else kind
    if kind == nn.Module | None:
        raise UserError(f'{flag}: {key} of {name} is a module, which is given in Python only')
    legal = True
    with contextlib.suppress(TypeError):  # a list of something: the constructor says more
        legal = isinstance(value, int | kind if isinstance(0.0, kind) else kind)  # 100 is a float, too
    if not legal or (isinstance(value, bool) and kind not in (bool, object)):
        raise UserError(f'{flag}: {key}={value!r} of {name} has the wrong type; {shown}')


@contextlib.contextmanager
def named(method: str):
    """A user's mistake says which method it is about, of several."""
    try:
        with user_errors():
            yield
    except UserError as error:
        if re.search(rf'\b{re.escape(method)}\b', str(error), re.IGNORECASE):
            raise
        raise UserError(f'{method}: {error}') from error


@contextlib.contextmanager
def built_from(flag: str, name: str):
    """Where a loss is built: an argument that the table fills, e.g. s_channels, is a user error, too.

    So is a part that a network of the user's own lacks. flag: where options stand, '' if none were given.
    """
    try:
        with named(name):
            yield
    except (TypeError, IndexError, AttributeError) as error:
        if isinstance(error, AttributeError) and not isinstance(error.obj, nn.Module):
            raise  # a mistake of who wrote the build
        raise UserError(f'{flag}: {name}: {error}' if flag else f'{name}: {error}') from None
