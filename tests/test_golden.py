"""Every loss against values and gradients computed in float64 with the authors' code: 1e-9 relative.

The vectors are read from the folder in the environment variable GOLDEN_DIR (default tests/golden), one npz
per method: in_<argument>, hp_<hyperparameter>, param_<role>, loss, grad_<argument>, gradparam_<role>,
out_<name>, with suffixes for variants. ADAPTERS says, per method, which keys make which case. Sizes,
hyperparameters and weights all come from the file, so vectors of other shapes work as well. A key that no
case has compared fails the test.
"""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from methods import METHODS
from tests.adapters import ADAPTERS as KD_ADAPTERS
from tests.ka_adapters import KA_ADAPTERS

GOLDEN = Path(os.environ.get('GOLDEN_DIR') or Path(__file__).parent / 'golden')
RTOL = 1e-9
ADAPTERS = KD_ADAPTERS | KA_ADAPTERS


class Vector:
    """An npz as float64 tensors; student inputs require grad; remembers which expectations were compared."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.rtol = {}
        self.open = {k for k in self.arrays if k.startswith(('loss', 'grad', 'out_'))}

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def input(self, key: str) -> torch.Tensor:
        value = torch.from_numpy(self.arrays[f'in_{key}'])
        return value.double().requires_grad_() if value.is_floating_point() else value.long()

    def hp(self, *keys: str) -> dict:
        return {key: self.arrays[f'hp_{key}'].item() for key in keys}

    def param(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[f'param_{key}']).double()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.arrays[key].shape

    def loosen(self, prefix: str, rtol: float) -> None:
        """Keys with this prefix are compared to rtol, where the method's page says why."""
        self.rtol[prefix] = rtol

    def compare(self, key: str, got: torch.Tensor) -> None:
        wanted = torch.from_numpy(np.asarray(self.arrays[key])).double()
        assert got.dtype == torch.float64, f'{self.name}: {key} came back as {got.dtype}'
        # an entry may be tiny beside its neighbours by cancellation: compare with the array's scale
        rtol = next((r for prefix, r in self.rtol.items() if key.startswith(prefix)), RTOL)
        scale = max(float(wanted.abs().max()), 1e-3)
        np.testing.assert_allclose(
            got.detach().numpy(), wanted.numpy(), rtol=rtol, atol=rtol * scale, err_msg=f'{self.name}: {key}'
        )
        self.open.discard(key)


# files without a vector, with the reason and what is tested instead
WITHOUT = {'mhgd': 'TensorFlow 1 only; test_properties.py has a slow second form of it'}
# several rows may share a file; dot.py is an optimiser
FILES = sorted({m.loss.__module__.split('.')[-1] for m in METHODS.values()} - WITHOUT.keys() | {'dot'})
KA_FILES = sorted(p.stem for p in (Path(__file__).parent.parent / 'ka_losses').glob('[!_]*.py'))
FILES += [*KA_FILES, 'cfl_fc']  # two vectors for cfl.py


@pytest.mark.parametrize('name', FILES)
def test_golden(name):
    path = GOLDEN / f'{name}.npz'
    assert path.is_file(), f'{name} is a loss but {path} is missing'
    assert name in ADAPTERS, f'{name} is a loss but has no adapter in tests/adapters.py or ka_adapters.py'
    vector = Vector(path)
    for case in ADAPTERS[name](vector):
        case.check(vector)
    assert not vector.open, f'{name}: these keys were never compared: {sorted(vector.open)}'


def test_vectors_without_a_row_are_listed():
    spare = sorted(p.stem for p in GOLDEN.glob('*.npz') if p.stem not in [*FILES, 'scenes'])
    if spare:
        warnings.warn(f'golden vectors without a row in METHODS: {", ".join(spare)}', stacklevel=1)


@pytest.mark.parametrize('name', FILES)
def test_the_comparison_can_fail(name):
    """The same case with every input changed by a hundred-thousandth must not pass."""
    vector = Vector(GOLDEN / f'{name}.npz')
    for key in [k for k, x in vector.arrays.items() if k.startswith('in_') and x.dtype.kind == 'f']:
        noise = np.random.default_rng(0).standard_normal(vector.arrays[key].shape)
        vector.arrays[key] = vector.arrays[key] * (1 + 1e-5 * noise)
    with pytest.raises(AssertionError):
        for case in ADAPTERS[name](vector):
            case.check(vector)
