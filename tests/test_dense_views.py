"""One view of image and labels: equal to the golden vector, to geometry, and to itself after a kill."""

import json

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F

import engine.record
from dataset import annotated
from dataset.dense_views import Depth, Normals, Seg, chosen_views, dense_views, seen_through
from dataset.scenes import load_scenes, scene
from tests.conftest import ROOT

ROOMS = ('--data_name', 'scenes:24', '--size', '32', '--batch_size', '8', '--lr', '2e-3')


@pytest.fixture(scope='module')
def z():
    with np.load(ROOT / 'tests/golden/sync_transforms.npz') as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def test_labels_are_the_golden_ones(z):
    normal, depth, seg = Normals(z['in_normal']), Depth(z['in_depth']), Seg(z['in_seg'])
    crop, size = [int(z[f'hp_{key}']) for key in ('top', 'left', 'height', 'width')], z['in_size'].tolist()
    angle, plane = float(z['hp_angle']), (Normals(z['in_plane_normal']), Depth(z['in_plane_depth']))
    made = {
        'normal_hflip': F.horizontal_flip(normal),
        'normal_vflip': F.vertical_flip(normal),
        'normal_both': F.vertical_flip(F.horizontal_flip(normal)),
        'normal_rot90': F.rotate(normal, 90),
        'normal_rot180': F.rotate(normal, 180),
        'depth_rot90': F.rotate(depth, 90),
        'normal_rot': F.rotate(normal, angle, fill=0),
        'depth_rot': F.rotate(depth, angle, fill=0),
        'seg_rot': F.rotate(seg, angle, fill=-1),
        'normal_zoom': F.resized_crop(normal, *crop, size),
        'depth_zoom': F.resized_crop(depth, *crop, size),
        'seg_zoom': F.resized_crop(seg, *crop, size),
        'plane_normal_crop': F.resized_crop(plane[0], *crop, crop[2:]),
        'plane_depth_crop': F.resized_crop(plane[1], *crop, crop[2:]),
    }
    assert {f'out_{key}' for key in made} == {key for key in z if key.startswith('out_')}
    for key, x in made.items():
        torch.testing.assert_close(x.as_subclass(torch.Tensor), z[f'out_{key}'], rtol=1e-9, atol=1e-12)
    assert isinstance(made['normal_rot'], Normals) and isinstance(made['seg_zoom'], Seg)
    clockwise = F.affine(normal, -angle, [0, 0], 1.0, [0, 0], fill=0)
    torch.testing.assert_close(clockwise, made['normal_rot'], rtol=1e-9, atol=1e-12)
    half = F.resized_crop(Normals(z['in_normal'].half()), *crop, size)
    assert half.dtype == torch.float16 and (half - z['out_normal_zoom']).abs().max() < 2e-3


@pytest.mark.parametrize('h, w', [(6, 6), (4, 8)])
def test_a_plane_stays_a_plane(h, w):
    """n . P = d, seen by a pinhole camera, cut out: the depth is what the new normal says."""
    H = W = 12
    focal, distance = 10.0, -2.0
    normal = torch.nn.functional.normalize(torch.tensor([0.3, 0.5, -0.8], dtype=torch.float64), dim=0)
    a = (torch.arange(W) + 0.5 - W / 2).double()[None, :] / focal
    b = -(torch.arange(H) + 0.5 - H / 2).double()[:, None] / focal
    depth = distance / (normal[0] * a + normal[1] * b + normal[2])
    top, left = 3, 2
    m = F.resized_crop(Normals(normal[:, None, None].expand(3, H, W)), top, left, h, w, [h, w])
    d = F.resized_crop(Depth(depth[None]), top, left, h, w, [h, w])
    sx, sy, rows, columns = W / w, H / h, slice(top, top + h), slice(left, left + w)
    ray = m[0] * a[:, columns] * sx + m[1] * b[rows] * sy + m[2]
    new_distance = d[0] * ray
    assert (new_distance - new_distance[0, 0]).abs().max() < 1e-12
    assert (m.square().sum(dim=0) - 1).abs().max() < 1e-12


def test_a_mirrored_room_has_the_normals_of_its_depth():
    """Normals are those of the surface that the depth describes, before and after: in a room seen here."""
    _, _, depth, normal = (torch.from_numpy(x) for x in scene(3, size=32))
    for turn in (lambda x: x, F.horizontal_flip, F.vertical_flip, lambda x: F.rotate(x, 90)):
        n, z = turn(Normals(normal)), turn(Depth(depth))[0]
        across = torch.gradient(z, dim=1)[0]  # further to the right: the surface faces left
        tilted = (across.abs() > 0.02) & (across.abs() < 0.3) & (n[0].abs() > 0.3)
        agree = (torch.sign(n[0]) == torch.sign(across))[tilted]
        assert tilted.sum() > 20 and agree.double().mean() > 0.9


def test_what_is_refused(z):
    normal, depth = Normals(z['in_normal']), Depth(z['in_depth'])
    for call, said in (
        (lambda: F.affine(normal, 0, [0, 0], 1.0, [3.0, 0.0]), 'sheared'),
        (lambda: F.resized_crop(depth, 0, 0, 0, 3, [4, 4]), 'empty'),
        (lambda: F.perspective(normal, [[0, 0]] * 4, [[0, 0]] * 4), 'bent'),
        (lambda: dense_views(8, zoom=(0.5, 1.5)), 'zoom'),
        (lambda: dense_views(8, rotate=-1), 'rotate must be'),
        (lambda: chosen_views({'pad': 1.5}, 8), 'whole number'),
        (lambda: chosen_views({'rotate': 'much'}, 8), 'number'),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_a_batch_is_a_function_of_seed_and_epoch():
    train, _ = load_scenes(12, 32, torch.device('cpu'), True)
    plain = [img for img, *_ in train.train_batches(4, 1, 0)]
    train.view, _ = chosen_views({'pad': 3}, 32)
    before = torch.get_rng_state()
    first, again, later = (list(train.train_batches(4, 1, epoch)) for epoch in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for (a, labels, _, _), (b, others, _, _), (c, *_), d in zip(first, again, later, plain):
        assert torch.equal(a, b) and all(torch.equal(labels[key], others[key]) for key in labels)
        assert not torch.equal(a, c) and not torch.equal(a, d) and a.abs().max() <= 0.5
        gone = labels['seg'] < 0
        assert torch.equal(gone, labels['depth'][:, 0] == 0), 'what came in from outside is unknown to all'
        length = labels['normal'].norm(dim=1)
        assert torch.equal(gone, length == 0) and (length[~gone] - 1).abs().max() < 1e-5
    one = {int(i): img for img, _, index, _ in train.train_batches(3, 1, 0) for i, img in zip(index, img)}
    for img, _, index, _ in first:
        assert all(torch.equal(one[int(i)], x) for i, x in zip(index, img)), 'whatever batch it is in'
    train.view = dense_views(32)  # mirrored or not: nothing else
    img, labels = seen_through(
        train.view, [1], train.images[:1], **{k: v[:1] for k, v in train.labels.items()}
    )
    assert any(torch.equal(img, train.images[:1].flip(dims)) for dims in ([], [-1]))


def test_segmentation_pictures(tmp_path):
    data, *_ = annotated.load('segmentation', 'scenes:6', tmp_path, 32)
    view, _ = chosen_views({}, 32)
    plain, seen, again = (
        annotated.Steps(data, None, 4, 1, None, v)[3]['labelled'] for v in (None, view, view)
    )
    assert torch.equal(seen[0][2], again[0][2]) and torch.equal(seen[1][2], again[1][2])
    assert not torch.equal(seen[0][2], plain[0][2]) and seen[1][2].dtype == torch.int64
    assert {tuple(x.shape) for x in seen[1]} == {(32, 32)}


def test_rooms_augmented_drawn_and_resumed(script, tmp_path, monkeypatch):
    """A kill changes nothing, pictures change nothing, and the view does change the weights."""
    words = ('--ka_mode', 'scratch', *ROOMS, '--epochs', 2, '--epochs_ft', 0, '--augment', 'rotate=10')
    done = script('train_ka', *words, '--draw', '--tensorboard', '--note', 'whole')
    assert done.code == 0, done.err
    result = json.loads((tmp_path / 'whole/scratch/results.json').read_text())
    assert result['augment'] == {'zoom': 0.5, 'rotate': 10, 'jitter': 0.2, 'pad': 0}
    folder = tmp_path / 'whole/scratch/draw'
    assert {p.name for p in folder.iterdir()} == {
        *(f'epoch_000{k}.{kind}' for k in (1, 2) for kind in ('png', 'npz')), 'curves.png', 'evolution.png'
    }  # fmt: skip
    with np.load(folder / 'epoch_0002.npz') as file:
        assert file['image'].shape == (4, 3, 32, 32) and 'depth_truth' in file.files
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / 'whole')).Reload()
    assert events.Tags()['images'] == ['scratch/draw'] and len(events.Images('scratch/draw')) == 2

    class Killed(BaseException):
        pass

    def dies(path, content, real=engine.record.write_atomic, wrote=[]):  # noqa: B006
        wrote.append(path.name)
        if wrote.count('last.pt') == 2:
            raise Killed
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(engine.record, 'write_atomic', dies)
        with pytest.raises(Killed):
            script('train_ka', *words, '--note', 'cut')
    done = script('train_ka', *words[:-1], '--note', 'cut', '--resume', 'auto')
    assert done.code == 2 and 'augment was' in done.err
    done = script('train_ka', *words[:-2], '--note', 'cut', '--resume', 'auto')
    assert done.code == 2 and 'augment was' in done.err
    assert script('train_ka', *words, '--note', 'cut', '--resume', 'auto').code == 0
    a, b = (torch.load(tmp_path / note / 'scratch/student.pt') for note in ('whole', 'cut'))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_segmentation_trained_with_it(script, tmp_path):
    words = ('--kd_mode', 'alone', '--data_name', 'scenes:6', '--size', 32, '--steps', 1, '--batch_size', 2)
    assert script('train_dense', *words, '--augment', 'pad=2', '--note', 'seg').code == 0
    result = json.loads((tmp_path / 'seg/alone/results.json').read_text())
    assert result['augment'] == result['recipe']['augment']
    assert result['augment'] == {'zoom': 0.5, 'rotate': 5.0, 'jitter': 0.2, 'pad': 2}
    done = script('train_dense', *words, '--note', 'seg', '--resume', 'auto')
    assert done.code == 2 and 'augment was' in done.err, 'other pictures'


@pytest.mark.parametrize(
    'words, said',
    [
        (
            ('train_ka', '--ka_mode', 'scratch', *ROOMS, '--augment', 'zom=1'),
            "no 'zom'; there are zoom, rotate",
        ),
        (('train_ka', '--ka_mode', 'scratch', *ROOMS, '--augment', 'zoom'), "expected key=value, got 'zoom'"),
        (('train_ka', '--ka_mode', 'concat', '--augment'), '--augment: not for --data_name shapes'),
        (('train_dense', '--task', 'detection', '--kd_mode', 'alone', '--augment'), 'only mirrored'),
    ],
)
def test_mistakes(script, words, said):
    done = script(*words)
    assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err
