"""For every amalgamation loss, and every loss without a row in a training script, how it is built and called
on random tensors, as text: it also runs in an interpreter that has nothing but the loss's file
(test_standalone.py).

The texts are `cases` of the files in tests/methods. m is the loss's module, S(*shape) a student's tensor,
T(*shape) a teacher's, n the batch size. They set `loss` and `inputs`.
"""

from tests import methods

FILES = [*methods.files('ka_losses'), *(f for f in methods.files('kd_losses') if methods.exists(f))]
MODULES = {file: methods.of(file) for file in FILES if hasattr(methods.of(file), 'cases')}
CASES = {case: text for module in MODULES.values() for case, text in module.cases.items()}


def file_of(case: str) -> str:
    """The loss file that a case is of, as tests/methods calls it: ka/afk, lsp."""
    return next(file for file, module in MODULES.items() if case in module.cases)


def package_of(case: str) -> str:
    """Where a case's loss is imported from: ka_losses.afk, kd_losses.lsp."""
    *ka, name = file_of(case).split('/')
    return f'{"ka" if ka else "kd"}_losses.{name}'
