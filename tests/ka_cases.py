"""For every amalgamation loss, how it is built and called on random tensors, as text: it also runs in an
interpreter that has nothing but the loss's file (test_standalone.py).

The texts are `cases` of the files in tests/methods/ka. m is the loss's module, S(*shape) a student's tensor,
T(*shape) a teacher's, n the batch size. They set `loss` and `inputs`.
"""

from tests import methods

MODULES = {file.removeprefix('ka/'): methods.of(file) for file in methods.files('ka_losses')}
CASES = {case: text for module in MODULES.values() for case, text in module.cases.items()}


def file_of(case: str) -> str:
    """The loss file that a case is of."""
    return next(file for file, module in MODULES.items() if case in module.cases)
