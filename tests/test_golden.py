"""Every loss against values and gradients computed in float64 with the authors' code: 1e-9 relative.

A vector is the npz beside its method's file in tests/methods, or that of its name in the folder which the
environment variable GOLDEN_DIR names: in_<argument>, hp_<hyperparameter>, param_<role>, loss,
grad_<argument>, gradparam_<role>, out_<name>, with suffixes for variants. golden() of the method's file says
which keys make which case. Sizes, hyperparameters and weights all come from the vector, so vectors of other
shapes work as well. A key that no case has compared fails the test.
"""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import methods

ELSEWHERE = os.environ.get('GOLDEN_DIR')
RTOL = 1e-9


class Vector:
    """An npz as float64 tensors; student inputs require grad; remembers which expectations were compared."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.rtol = {}
        self.largest = max(
            (float(np.abs(x).max()) for k, x in self.arrays.items() if k.startswith('grad') and x.size),
            default=0.0,
        )
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
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        atol = max(rtol * scale, 1e-14)
        if key.startswith('grad') and scale < 1e-11 * self.largest:  # 0 but for the rounding of both sides
            atol = max(atol, 1e-12 * self.largest)
        np.testing.assert_allclose(
            got.detach().numpy(), wanted.numpy(), rtol=rtol, atol=atol, err_msg=f'{self.name}: {key}'
        )
        self.open.discard(key)


# loss files: each has a vector, or says why not
FILES = [file for folder in ('kd_losses', 'ka_losses', 'dfkd_losses') for file in methods.files(folder)]


def vectors_of(file: str) -> dict:
    """{name of the vector: adapter} of a loss file; None where test_golden must say that it is missing."""
    if not methods.exists(file):
        return {Path(file).name: None}
    module = methods.of(file)
    if hasattr(module, 'without_vector'):
        return {}
    return {Path(file).name: getattr(module, 'golden', None), **getattr(module, 'more_vectors', {})}


VECTORS = {name: (file, adapter) for file in FILES for name, adapter in vectors_of(file).items()}


def path_of(name: str) -> Path:
    file, _ = VECTORS[name]
    return Path(ELSEWHERE or (methods.HERE / file).parent) / f'{name}.npz'


def check(vector: Vector) -> None:
    for case in VECTORS[vector.name][1](vector):
        case.check(vector)


@pytest.mark.parametrize('name', VECTORS)
def test_golden(name):
    file, adapter = VECTORS[name]
    methods.of(file)  # says so if it is missing
    assert adapter, f'tests/methods/{file}.py has no golden(z) that feeds the loss from its vector'
    path = path_of(name)
    assert path.is_file(), f'{file} is a loss but {path} is missing'
    vector = Vector(path)
    check(vector)
    assert not vector.open, f'{name}: these keys were never compared: {sorted(vector.open)}'


def test_vectors_without_a_row_are_listed():
    folders = [Path(ELSEWHERE)] if ELSEWHERE else [methods.HERE, methods.HERE / 'ka', methods.HERE / 'dfkd']
    found = [p.stem for folder in folders for p in folder.glob('*.npz')]
    spare = sorted(name for name in found if name not in [*VECTORS, 'scenes', 'attributes'])
    said = f'golden vectors without a loss: {", ".join(spare)}'
    assert ELSEWHERE or not spare, said
    if spare:  # of a folder that others made
        warnings.warn(said, stacklevel=1)


@pytest.mark.parametrize('name', VECTORS)
def test_the_comparison_can_fail(name):
    """The same case with every input changed by a hundred-thousandth must not pass."""
    vector = Vector(path_of(name))
    for key in [k for k, x in vector.arrays.items() if k.startswith('in_') and x.dtype.kind == 'f']:
        noise = np.random.default_rng(0).standard_normal(vector.arrays[key].shape)
        vector.arrays[key] = np.asarray(vector.arrays[key] * (1 + 1e-5 * noise))
    with pytest.raises(AssertionError):
        check(vector)


def test_every_file_in_the_folder_is_of_a_loss():
    """Names and kinds that nobody reads would be silent: a misspelt exception, a loss that was renamed."""
    here = {p.relative_to(methods.HERE).with_suffix('').as_posix() for p in methods.HERE.rglob('*.py')}
    assert {f for f in here if Path(f).name != '__init__'} == {*FILES, 'shared'}
    for file in FILES:
        module = methods.of(file)
        for table in (getattr(module, 'exceptions', {}), *getattr(module, 'rows', {}).values()):
            assert table.keys() <= methods.KINDS.keys(), f'{file}: no kind of exception is called so'
            assert all(table.values()), f'{file}: an exception needs a reason'
