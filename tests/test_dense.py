"""train_dense.py and what it is made of: pictures, average precision, taps, rows, steps, resume, mistakes."""

import csv
import json
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train_dense
from dataset import annotated, scenes
from dataset import average_precision as ap
from dataset.dense_views import dense_views
from engine import dense as parts
from engine import dense_build, dense_setting
from engine.dense_setting import picked
from engine.dense_tasks import TASKS, Setting
from engine.device import autocast
from methods.dense import DENSE
from models.checkpoint import named_weights
from models.dense import Detected, build, enlarged, normalised, segment
from report import dense as report_dense
from tests.conftest import ROOT

SEG = [name for name, row in DENSE.items() if row.task == 'segmentation']
DET = [name for name, row in DENSE.items() if row.task == 'detection']
QUICK = ('--data_name', 'scenes:24', '--size', 32, '--labelled', 6, '--batch_size', 4, '--t_steps', 2)
USUAL = ('--t_steps', 350)  # behind QUICK, where no teacher is trained


@pytest.fixture
def run(script):
    def call(*words):
        done = script('train_dense', *QUICK, *words)
        assert done.code == 0, done.err
        return done.out

    return call


def results(folder) -> dict:
    return json.loads((folder / 'results.json').read_text())


def weights(folder) -> dict:
    return torch.load(folder / 'student.pt', weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items())


def rooms(task, img_root, n=4, size=32):
    return annotated.Rooms(task, 0, n, size, img_root)


# --------------------------------------------------------------------------------------------------- pictures


def test_rooms_are_the_scenes(img_root):
    seg, det = (rooms(task, img_root, 6, 64) for task in annotated.TASKS)
    again = annotated.Rooms('detection', 0, 6, 64, img_root)  # from the file
    dropped = 0
    for i in range(6):
        image, label = seg[i]
        exact, classes, _, _ = scenes.scene(i, size=64)
        assert image.shape == (3, 64, 64) and label.dtype == torch.int64
        assert (image - torch.from_numpy(exact)).abs().max() <= 0.5 / 255 + 1e-6
        assert np.array_equal(label.numpy(), classes)
        kinds, boxes = scenes.objects(i, size=64)
        low, high = (boxes[:, :2] - boxes[:, 2:] / 2) * 64, (boxes[:, :2] + boxes[:, 2:] / 2) * 64
        big = (boxes[:, 2:] * 64).min(axis=1) >= 3.9
        dropped += (~big).sum()
        target = det[i][1]
        np.testing.assert_allclose(target['boxes'], np.concatenate([low, high], axis=1)[big], atol=1e-3)
        assert target['labels'].tolist() == (kinds[big] + 1).tolist() and not target['crowd'].any()
        assert all(torch.equal(x, y) for x, y in zip(target.values(), again[i][1].values()))
        for box, name in zip(target['boxes'].int().tolist(), target['labels']):
            inside = label[box[1] : box[3], box[0] : box[2]]
            assert (inside == name + 2).any(), 'class 3 of the pixels is label 1 of the boxes'
    assert (
        det.class_names == ('background', 'box', 'sphere', 'cylinder') and seg.class_names == scenes.CLASSES
    )


def write_voc(root):
    base = root / 'VOCdevkit' / 'VOC2012'
    for folder in (
        'JPEGImages',
        'Annotations',
        'SegmentationClass',
        'ImageSets/Main',
        'ImageSets/Segmentation',
    ):
        (base / folder).mkdir(parents=True)
    for name, split in (('2007_000001', 'train'), ('2007_000002', 'val')):
        Image.new('RGB', (50, 40), (255, 0, 0)).save(base / 'JPEGImages' / f'{name}.jpg')
        seg = np.zeros((40, 50), np.uint8)
        seg[5:9, 3:8], seg[9, 3:8] = 8, 255
        mask = Image.fromarray(seg, 'P')
        mask.putpalette(list(range(256)) * 3)
        mask.save(base / 'SegmentationClass' / f'{name}.png')
        root_of = ET.Element('annotation')
        for what, box, difficult in (('cat', (4, 6, 8, 9), '0'), ('tvmonitor', (1, 1, 50, 40), '1')):
            thing = ET.SubElement(root_of, 'object')
            ET.SubElement(thing, 'name').text, ET.SubElement(thing, 'difficult').text = what, difficult
            corner = ET.SubElement(thing, 'bndbox')
            for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box):
                ET.SubElement(corner, key).text = str(value)
        ET.ElementTree(root_of).write(base / 'Annotations' / f'{name}.xml')
        for kind in ('Main', 'Segmentation'):
            (base / 'ImageSets' / kind / f'{split}.txt').write_text(f'{name}\n')


def test_labelled_files_are_drawn_by_chance():
    """The same for every --seed; rooms, and all files, keep their order."""
    order = picked(100, 20, rooms=False)
    assert sorted(order) == list(range(100)) and order == picked(100, 30, rooms=False)
    assert max(order[:20]) > 60 and order != list(range(100))
    assert picked(100, 20, rooms=True) == picked(100, 100, rooms=False) == list(range(100))


def test_voc(tmp_path):
    write_voc(tmp_path)
    train, none, test = annotated.load('segmentation', 'voc', tmp_path, 32)
    assert none is None and len(train) == len(test) == 1 and train.class_names[8] == 'cat'
    image, label = train[0]
    assert image.shape == (3, 40, 50) and image[0].mean() > 0.95 and label.shape == (40, 50)
    assert (label[5:9, 3:8] == 8).all() and (label[9, 3:8] == -1).all() and (label[:5] == 0).all()
    (image, target), *_ = annotated.load('detection', 'voc', tmp_path, 32)[2]
    assert target['boxes'].tolist() == [[3, 5, 8, 9], [0, 0, 50, 40]], 'whole pixels of the picture'
    assert target['labels'].tolist() == [8, 20] and target['difficult'].tolist() == [False, True]
    assert not target['crowd'].any()
    learnt = annotated.augmented(image, target, torch.Generator().manual_seed(0), None)[1]
    assert learnt['labels'].tolist() == [8], 'what is difficult is not learnt'
    steps = annotated.Steps(train, None, 1, 3, crop=32)
    assert [tuple(x[0].shape) for x in steps[5]['labelled']] == [(3, 32, 32), (32, 32)]
    assert torch.equal(steps[5]['labelled'][0][0], steps[5]['labelled'][0][0])
    assert not all(torch.equal(steps[5]['labelled'][1][0], steps[k]['labelled'][1][0]) for k in range(4))


def write_coco(root):
    for split, things in (
        ('train2017', [(9, 7, [5, 6, 10, 20], 0), (9, 90, [0, 0, 40, 30], 1)]),
        ('val2017', [(3, 7, [0, 0, 5, 5], 0), (3, 7, [1, 1, 0, 9], 0)]),
    ):
        (root / 'coco' / split).mkdir(parents=True)
        (root / 'coco' / 'annotations').mkdir(exist_ok=True)
        names = {9: '9.jpg', 3: '3.png'}
        for name in names.values():
            Image.new('L' if name == '3.png' else 'RGB', (40, 30)).save(root / 'coco' / split / name)
        content = {
            'images': [{'id': i, 'file_name': n, 'width': 40, 'height': 30} for i, n in names.items()],
            'categories': [{'id': 90, 'name': 'toothbrush'}, {'id': 7, 'name': 'train'}],
            'annotations': [
                {'id': k, 'image_id': i, 'category_id': c, 'bbox': b, 'area': b[2] * b[3], 'iscrowd': crowd}
                for k, (i, c, b, crowd) in enumerate(things)
            ],
        }
        (root / 'coco' / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def test_coco(tmp_path):
    write_coco(tmp_path)
    train, none, test = annotated.load('detection', 'coco', tmp_path, 32)
    assert none is None and train.class_names == ('background', 'train', 'toothbrush')
    image, target = train[0]  # in the order of ids: 3 is first, and has no box
    assert image.shape == (3, 30, 40) and target['boxes'].shape == (0, 4) and target['labels'].shape == (0,)
    _, target = train[1]
    assert target['boxes'].tolist() == [[5, 6, 15, 26], [0, 0, 40, 30]]
    assert target['labels'].tolist() == [1, 2] and target['crowd'].tolist() == [False, True]
    assert test[0][1]['boxes'].tolist() == [[0, 0, 5, 5]], 'a box without area is none'
    g = torch.Generator().manual_seed(0)
    seen = [annotated.augmented(*train[1], g, None)[1] for _ in range(8)]
    assert {tuple(x['boxes'].flatten().tolist()) for x in seen} == {(5, 6, 15, 26), (25, 6, 35, 26)}
    if ap.library() != 'numpy':  # torchvision's reader needs pycocotools
        from torchvision.datasets import CocoDetection

        base = tmp_path / 'coco'
        (_, things) = CocoDetection(base / 'train2017', base / 'annotations' / 'instances_train2017.json')[1]
        assert [thing['bbox'] for thing in things] == [[5, 6, 10, 20], [0, 0, 40, 30]]


@pytest.mark.parametrize(
    'change,said',
    [
        ({'category_id': 0}, 'annotation 1: category_id 0 is in no category'),
        ({'image_id': 12345}, 'annotation 1: image_id 12345 is of no image'),
        ({'bbox': []}, r'annotation 1: bbox must be \[x, y, width, height\], got \[\]'),
        ({'bbox': [1, 2, None, 3]}, 'annotation 1: bbox must be'),
        ('bbox', "has no 'bbox'"),
        ('images', 'has no images'),
    ],
)
def test_a_wrong_entry_of_coco_is_named(tmp_path, change, said):
    write_coco(tmp_path)
    path = tmp_path / 'coco' / 'annotations' / 'instances_train2017.json'
    content = json.loads(path.read_text())
    if isinstance(change, dict):
        content['annotations'][1] |= change
    elif change in content:
        content[change] = []
    else:
        del content['annotations'][1][change]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf'instances_train2017.json: is not of the format.*{said}'):
        annotated.load('detection', 'coco', tmp_path, 32)


def test_a_class_that_voc_does_not_have(tmp_path):
    write_voc(tmp_path)
    path = tmp_path / 'VOCdevkit' / 'VOC2012' / 'Annotations' / '2007_000001.xml'
    path.write_text(path.read_text().replace('cat', 'wombat'))
    data = annotated.load('detection', 'voc', tmp_path, 32)[0]
    with pytest.raises(ValueError, match="01.xml: .*'wombat' is none of VOC's 20 classes.*--data_name coco"):
        data[0]


def test_pictures_of_a_step(img_root):
    data, more = rooms('segmentation', img_root, 8), rooms('segmentation', img_root, 8)
    steps = annotated.Steps(data, more, 4, seed=1)
    a, b, c = steps[7], steps[7], annotated.Steps(data, None, 4, seed=1)[7]
    assert all(torch.equal(x, y) for x, y in zip(a['labelled'][0], b['labelled'][0]))
    assert all(torch.equal(x, y) for x, y in zip(a['labelled'][0], c['labelled'][0]))
    assert a['unlabelled'][1] is None and 'unlabelled' not in c
    assert not torch.equal(a['labelled'][0][0], a['unlabelled'][0][0])
    for image, label in zip(*a['labelled']):  # mirrored together
        plain = [(image, label), (image.flip(2), label.flip(1))]
        assert any(
            torch.equal(x, data[i][0]) and torch.equal(y, data[i][1]) for x, y in plain for i in range(8)
        )


@pytest.mark.parametrize('task,crop,zoom', [
    ('segmentation', 40, None), ('segmentation', 40, (0.5, 1)), ('segmentation', None, None),
    ('detection', None, None),
])  # fmt: skip
def test_processes_share_the_pictures_of_a_step(img_root, task, crop, zoom):
    """Together they see what one would with a larger batch; all have equally many."""
    few, many = (rooms(task, img_root, n) for n in (7, 8))
    view = zoom and dense_views(crop, zoom, rotate=5)
    whole = annotated.Steps(few, many, 6, 1, crop, view)[5]
    shares = [annotated.Steps(few, many, 2, 1, crop, view, (rank, 3))[5] for rank in range(3)]
    for name, (images, targets) in whole.items():
        assert all(map(torch.equal, images, sum((share[name][0] for share in shares), []))), name
        parts_of = [share[name][1] for share in shares]
        if name == 'unlabelled':
            assert targets is None and parts_of == [None] * 3
        elif task == 'detection':
            assert all(map(same, targets, sum(parts_of, [])))
        else:
            assert all(map(torch.equal, targets, sum(parts_of, [])))
    shares = [annotated.Steps(few, many, 4, 1, crop, view, (rank, 3))[5] for rank in range(3)]
    assert [len(share['labelled'][0]) for share in shares] == [2, 2, 2], 'seven pictures for three'


# ------------------------------------------------------------------------------------------------- precision


def boxes(*corners):
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def truth(corners, labels, **flags):
    made = {'boxes': boxes(*corners), 'labels': torch.tensor(labels, dtype=torch.int64)}
    return made | {name: torch.tensor(given) for name, given in flags.items()}


def found(corners, labels, scores):
    return truth(corners, labels) | {'scores': torch.tensor(scores)}


def by_both(one, other) -> dict:
    arrays = [[{k: v.numpy() for k, v in x.items()} for x in side] for side in (one, other)]
    table = ap.by_numpy(*arrays)
    if ap.library() != 'numpy':
        np.testing.assert_allclose(ap.by_pycocotools(*arrays), table, atol=1e-12)
    read = ap.average_precision(one, other)
    assert read['ap'] == pytest.approx(100 * table.mean() if table.size else 0)
    return read


def test_average_precision_by_hand():
    square, other = (0, 0, 10, 10), (20, 20, 30, 30)
    all_of_it = by_both([truth([square, other], [1, 2])], [found([square, other], [1, 2], [0.9, 0.1])])
    assert all_of_it == pytest.approx({'ap': 100, 'ap50': 100, 'ap75': 100})
    # overlap 0.8: found at 0.50 .. 0.80, seven of ten thresholds
    shifted = by_both([truth([square], [1])], [found([(0, 0, 8, 10)], [1], [0.3])])
    assert shifted == pytest.approx({'ap': 70, 'ap50': 100, 'ap75': 100})
    # a wrong one first: precision 1/2 at all recalls; another box is never found: recall ends at 1/2
    half = by_both([truth([square], [1])], [found([other, square], [1, 1], [0.9, 0.8])])
    assert half['ap'] == pytest.approx(50)
    missed = by_both([truth([square, other], [1, 1])], [found([square], [1], [0.9])])
    assert missed['ap'] == pytest.approx(100 * 51 / 101)
    twice = by_both([truth([square], [1])], [found([square, square], [1, 1], [0.9, 0.8])])
    assert twice['ap'] == pytest.approx(100), 'a second one comes after all recalls'
    assert by_both([truth([], [])], [found([square], [1], [0.5])])['ap'] == 0
    assert by_both([truth([square], [1])], [found([], [], [])])['ap'] == 0
    crowd = by_both([truth([square, other], [1, 1], crowd=[False, True])],
                    [found([other, square], [1, 1], [0.9, 0.8])])  # fmt: skip
    assert crowd['ap'] == pytest.approx(100), 'what lies on a crowd counts nothing'


def test_difficult_objects_excuse_what_finds_them_only():
    square, other, inside = (0, 0, 10, 10), (20, 20, 30, 30), (20, 20, 24, 24)
    one = [truth([square, other], [1, 1], difficult=[False, True])]
    assert by_both(one, [found([other, square], [1, 1], [0.9, 0.8])])['ap'] == pytest.approx(100)
    assert by_both(one, [found([inside, square], [1, 1], [0.9, 0.8])])['ap'] == pytest.approx(50)
    assert by_both([truth([other], [1], difficult=[True])], [found([other], [1], [0.9])])['ap'] == 0


def test_labels_of_a_crop_lie_where_its_picture_does():
    """An edge at many sizes: on the average as many pixels are labelled as the bright part is wide."""
    image, target = torch.zeros(3, 60, 60), torch.zeros(60, 60, dtype=torch.int64)
    image[:, :, 23:], target[:, 23:] = 1, 1
    off = []
    for seed in range(60):
        x, y = annotated._cut(image, target, torch.Generator().manual_seed(seed), 120)
        off.append(x[0, 0].sum() - (y[0] == 1).sum())
    assert abs(torch.stack(off).mean()) < 0.2


def test_average_precision_on_random_pictures():
    g = torch.Generator().manual_seed(0)

    def some(n):
        corner = torch.randint(0, 12, (n, 2), generator=g) * 4.0
        return torch.cat([corner, corner + torch.randint(1, 8, (n, 2), generator=g) * 4.0], dim=1)

    one, other = [], []
    for _ in range(30):
        n, m = torch.randint(0, 6, (2,), generator=g).tolist()
        box, labels = some(n), torch.randint(1, 4, (n,), generator=g)
        one.append({'boxes': box, 'labels': labels, 'crowd': torch.rand(n, generator=g) < 0.2,
                    'difficult': torch.rand(n, generator=g) < 0.2})  # fmt: skip
        near = torch.cat([some(m), box + torch.randint(0, 3, box.shape, generator=g)])
        kinds = torch.cat([torch.randint(1, 4, (m,), generator=g), labels])
        other.append({'boxes': near, 'labels': kinds, 'scores': torch.rand(len(near), generator=g)})
    assert 5 < by_both(one, other)['ap50'] < 95


# ------------------------------------------------------------------------------------------------------ taps


def batch_of(task, net, data, n=2):
    setting = SimpleNamespace(device=torch.device('cpu'), amp=lambda: torch.autocast('cpu', enabled=False))
    made = TASKS[task](setting, net)
    images, targets = zip(*(data[i] for i in range(n)))
    return made, made.given(list(images), list(targets)), list(images), list(targets)


@pytest.mark.parametrize('name', ['lraspp:resnet10', 'fcn:mobilenet_v3_small@0.5', 'deeplabv3:resnet10'])
def test_a_segmenter_is_torchvisions(name, img_root):
    torch.manual_seed(0)
    net = build('segmentation', name, 6).eval()
    task, given, *_ = batch_of('segmentation', net, rooms('segmentation', img_root))
    with torch.no_grad():
        seen = task.look(net, given)
        torch.testing.assert_close(net(normalised(given.x))['out'], enlarged(seen.out, (32, 32)))
        last = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 6][-1]
        if name.startswith('lraspp'):
            assert seen.feat.shape[1] == 64 and last.in_channels == 64
        else:
            torch.testing.assert_close(last(seen.feat), seen.out)
    assert all(not key.startswith('wrapped') for key in net.state_dict())
    assert len(seen.fms) >= (2 if 'lraspp' in name else 1)


DETECTORS = ['fasterrcnn:resnet10', 'retinanet:mobilenet_v3_small@0.5', 'fcos:resnet10']


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_is_torchvisions(name, img_root):
    """Loss and detections of the network itself, written out."""
    torch.manual_seed(0)
    net = build('detection', name, 4, 32)
    task, given, images, targets = batch_of('detection', net, rooms('detection', img_root))
    given.x.tensors = given.x.tensors.contiguous()  # equal to the last digit, or boxes of equal scores swap
    torch.manual_seed(1)
    own = sum(net(images, targets).values())
    grads = torch.autograd.grad(own, list(net.parameters()), allow_unused=True)
    assert sum(g is not None for g in grads) > 20
    torch.manual_seed(1)
    net.transform(images)  # draws a number, too
    seen = task.look(net, given)
    torch.testing.assert_close(seen.loss(), own)
    # with its own maps in their place, still
    torch.manual_seed(1)
    net.transform(images)
    torch.testing.assert_close(seen.replaced(seen.fms).loss(), own)
    sizes = [tuple(fm.shape[1:]) for fm in seen.fms]
    assert sizes == [(sizes[0][0], 32 // s, 32 // s) for s in (4, 8, 16)]
    anchors = seen.anchors_of_levels()
    assert [tuple(a.shape[:2]) for a in anchors] == [size[1:] for size in sizes]
    middle = (anchors[0][1, 2, 0, :2] + anchors[0][1, 2, 0, 2:]) / 2
    assert middle.tolist() in ([8, 4], [10, 6]), 'row 1, column 2, of stride 4'


def test_the_rest_of_a_head(img_root):
    """From its own towers, RetinaNet's last layers predict what the head predicts."""
    torch.manual_seed(0)
    net = build('detection', DETECTORS[1], 4, 32).eval()
    task, given, *_ = batch_of('detection', net, rooms('detection', img_root))
    with torch.no_grad():
        seen = task.look(net, given)
        head = seen.head
        for made, key in zip(seen.finished(seen.towers), ('cls_logits', 'bbox_regression')):
            torch.testing.assert_close(made, head[key].flatten(0, 1))
    weight, positives = seen.matched()
    assert len(weight) == 2 * len(seen.anchors[0]) and positives >= 1 and set(weight.tolist()) <= {0, 1}


def test_the_boxes_of_the_second_stage(img_root):
    """The teacher's second stage on the student's boxes is its own where the two are one network."""
    torch.manual_seed(0)
    net = build('detection', DETECTORS[0], 4, 32).eval()
    task, given, *_ = batch_of('detection', net, rooms('detection', img_root))
    seen = task.look(net, given)
    rois = seen.rois
    assert rois.out.shape == (len(rois.target), 4) and rois.target.max() >= 1 and (rois.target == 0).any()
    torch.testing.assert_close(seen.classified(rois.boxes)[0], rois.out)
    assert not net.rpn.training


def test_torchvisions_own_names():
    """Their levels, on no device: nothing is computed."""
    with torch.device('meta'):
        net = build('segmentation', 'deeplabv3_resnet50', 21)
        assert [layer for layer, _ in net.taps['fms']] == [
            *(f'backbone.layer{i}' for i in (1, 2, 3, 4)), 'classifier.3', 'classifier',
        ]  # fmt: skip
        net = build('segmentation', 'lraspp_mobilenet_v3_large', 21)
        assert net.taps['fms'][:3] == [('backbone.4', 'out'), ('backbone.16', 'out'),
                                       ('classifier.high_classifier', 'in')]  # fmt: skip
        for name, levels in (('fasterrcnn_resnet18_fpn', 4), ('fasterrcnn_mobilenet_v2_fpn', 4),
                             ('retinanet_resnet50_fpn', 5), ('fcos_resnet18_fpn', 5)):  # fmt: skip
            net = build('detection', name, 91)
            assert len(net.backbone.taps['fms']) == levels, name
            assert all(
                module.momentum == 0.1 for module in net.modules() if isinstance(module, nn.BatchNorm2d)
            )


def test_nothing_is_to_be_learnt_from_oneself(img_root):
    """Where no layer of the loss stands between: the loss of a network and itself is 0."""
    zero = {'segmentation': ('cwd', 'cwd_feat', 'dsd', 'ifvd', 'maskd_seg', 'skds_pair', 'st'),
            'detection': ('cwd_fpn', 'pkd', 'dkd')}  # fmt: skip
    for task_name, names in zero.items():
        torch.manual_seed(0)
        net = build(task_name, train_dense.NETWORKS[task_name][1], 6, 32).eval()
        task, given, *_ = batch_of(task_name, net, rooms(task_name, img_root))
        with torch.no_grad():
            seen = task.look(net, given)
            probe = SimpleNamespace(s=seen, t=seen, num_classes=6, pictures=6)
            for name in names:
                row = DENSE[name]
                kd = row.build(row.loss, probe)
                batch = SimpleNamespace(target=given.target)
                assert abs(row.feed(kd, seen, seen, batch)) < 1e-5, name


MEANS = {'cwd', 'cwd_feat', 'cwd_fpn', 'dsd', 'fgd', 'freekd', 'ifvd', 'maskd', 'maskd_seg', 'reviewkd',
         'skds_pair', 'st'}  # fmt: skip


def test_which_losses_are_means_over_pictures(img_root):
    """Those that several processes change by rounding only; docs/dense.md names them."""
    found = set()
    torch.manual_seed(0)
    for task, teacher, student in (
        ('segmentation', 'lraspp:resnet18', 'lraspp:resnet10'),
        ('detection', DETECTORS[0], DETECTORS[0]),
        ('detection', DETECTORS[1], DETECTORS[1]),
    ):
        net_t, net = (build(task, name, 6, 32).eval() for name in (teacher, student))
        setting = Setting(None, 6, torch.device('cpu'), autocast(torch.device('cpu'), 'off'), 1, 1, None, 4)
        setting.task, setting.net_t, data = TASKS[task](setting, net), net_t, rooms(task, img_root)
        for name, row in DENSE.items():
            if row.task != task or row.heads and type(net).__name__.lower() not in row.heads:
                continue
            values, kd = [], None
            for chosen in (range(4), (0, 1), (2, 3)):
                images, targets = zip(*(data[i] for i in chosen))
                seen = parts.StepPictures(setting, 0, {'labelled': (list(images), list(targets))})
                seen.seed()
                with torch.no_grad():
                    s, t = setting.task.look(net, seen.given('labelled')), seen.teacher('labelled')
                    kd = kd or row.build(row.loss, parts.Probe(s, t, 6, 4)).eval()
                    values.append(float(row.feed(kd, s, t, parts.Batch(seen, 'labelled'))))
            whole, halves = values[0], sum(values[1:]) / 2
            found |= {name} if whole == pytest.approx(halves, rel=1e-5) else set()
    text = (ROOT / 'docs' / 'dense.md').read_text().partition('means over pictures')[2].partition('Others')[0]
    assert found == MEANS == set(re.findall('`(.*?)`', text))


# ------------------------------------------------------------------------------------------------------ steps


def columns(folder) -> dict:
    with open(folder / 'metrics.csv') as file:
        return list(csv.DictReader(file))[-1]


def reported(script, folder, out):
    done = script('report.dense', folder, '--out', out)
    assert done.code == 0, done.err
    (picture,) = out.glob('panels-*.png')
    assert picture.stat().st_size > 5000
    return (out / 'table.md').read_text()


def test_every_row_trains(run, script, tmp_path):
    """Of segmentation: a step changes the student, and not as labels alone do."""
    out = run('--kd_mode', 'alone', *SEG, 'cwd+ifvd', '--steps', 2, '--note', 'a')
    assert 'teacher lraspp:resnet18' in out and '6 labelled and 24 other pictures' in out
    alone = weights(tmp_path / 'a' / 'alone')
    for name in (*SEG, 'cwd+ifvd'):
        made, row = results(tmp_path / 'a' / name), columns(tmp_path / 'a' / name)
        assert not same(weights(tmp_path / 'a' / name), alone), name
        assert all(float(row[part]) > 0 for part in ('task', *name.split('+'))), row
        assert set(made['last']) == {'miou', 'accuracy', 'step'} and made['method'] == name
        assert made['teacher']['miou'] > 0 and made['labelled'] == 6 and made['unlabelled'] == 24
    assert made['recipe']['methods'] == [['cwd', 3.0, {}], ['ifvd', 20.0, {}]] and made['seed'] == 2
    written = json.loads((tmp_path / 'a' / 'args.json').read_text())
    assert written['class_names'] == made['class_names'] == list(scenes.CLASSES)
    with np.load(tmp_path / 'a' / 'panels.npz') as file:
        assert {'image', 'truth', 'of teacher', 'of alone', 'of cwd+ifvd'} <= set(file.files)
        assert file['of alone'].shape == file['truth'].shape == (4, 32, 32)
    text = reported(script, tmp_path / 'a', tmp_path / 'r')
    assert 'Segmentation, lraspp:resnet18 teaches lraspp:mobilenet_v3_small@0.5: 6 labelled' in text
    assert text.count('\n| `') == len(SEG) + 2 and '| teacher |' in text


def test_pictures_of_two_runs_in_one_folder(run, script, tmp_path):
    """The second keeps what the first has drawn; a student without a picture is named, not chosen."""
    words = ('--steps', 1, '--note', 'a')
    run('--kd_mode', 'alone', 'st', *words)
    run('--kd_mode', 'cwd', *words, '--unlabelled', 0)
    with np.load(tmp_path / 'a' / 'panels.npz') as file:
        arrays = {name: file[name] for name in file.files}
    assert {'of alone', 'of st', 'of cwd', 'of teacher'} < set(arrays)
    made = results(tmp_path / 'a' / 'cwd')
    made['last']['miou'] = 100.0  # the best, but trained on other pictures than the student alone
    (tmp_path / 'a' / 'cwd' / 'results.json').write_text(json.dumps(made))
    assert str(report_dense.collect(tmp_path / 'a')[1]['best']) == 'st'
    del arrays['of st']
    np.savez(tmp_path / 'a' / 'panels.npz', **arrays)
    done = script('report.dense', tmp_path / 'a', '--out', tmp_path / 'r')
    assert done.code == 0 and 'has no picture of st; ' in done.out, done.err
    assert str(report_dense.collect(tmp_path / 'a')[1]['best']) == 'cwd'


def test_every_row_of_detection_trains(run, script, tmp_path):
    one = ['crosskd', *(name for name in DET if not DENSE[name].heads)]
    for note, words in {
        'two': ['alone', *(name for name in DET if name != 'crosskd'), 'pkd+dkd'],
        'one': one,
    }.items():
        pair = ('--t_name', 'retinanet:resnet10', '--s_name', DETECTORS[1]) if note == 'one' else ()
        run('--task', 'detection', '--kd_mode', *words, *pair, '--steps', 1, '--note', note)
        for name in words:
            folder = tmp_path / note / name
            made, row = results(folder), columns(folder)
            assert set(made['last']) == {'ap', 'ap50', 'ap75', 'step'} and made['ap_by'] == ap.library()
            assert name == 'alone' or all(float(row[part]) > 0 for part in name.split('+')), row
        weighed = {name: weight for name, weight, _ in made['recipe']['methods']}
    assert weighed == {'reviewkd': 1.0} and results(tmp_path / 'one' / 'pkd')['recipe']['methods'][0][1] == 10
    assert results(tmp_path / 'two' / 'pkd')['recipe']['methods'][0][1] == 6, 'of two stages'
    assert 'AP75' in reported(script, tmp_path / 'two', tmp_path / 'r')


def test_alone_or_beside_others_it_is_the_same(run, tmp_path):
    for task, every, some in (
        ('segmentation', ('alone', 'cwd', 'cirkd+afdcd'), ('alone', 'cirkd+afdcd')),
        ('detection', ('pkd', 'dkd'), ('dkd',)),
    ):
        student = ('--s_name', 'fcn:resnet10') if task == 'segmentation' else ()  # it has a dropout
        words = ('--task', task, *student, '--steps', 2, '--note')
        run('--kd_mode', *every, *words, f'{task}all')
        for name in some:
            usual = USUAL if name == 'alone' else ()
            run('--kd_mode', name, *words, f'{task}{name}', *usual)
            assert same(weights(tmp_path / f'{task}{name}' / name), weights(tmp_path / f'{task}all' / name))


@pytest.mark.parametrize(
    'task,modes', [('segmentation', ['cirkd', 'maskd_seg+afdcd']), ('detection', ['freekd'])]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(run, tmp_path, monkeypatch, task, modes):
    words = ('--task', task, '--kd_mode', *modes, '--steps', 4, '--eval_every', 2)
    run(*words, '--note', 'whole')
    step = train_dense.train_student

    def killed(student, seen, args):
        if seen.step == 3:
            raise MemoryError
        step(student, seen, args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train_dense, 'train_student', killed)
        run(*words, '--note', 'half')
    with monkeypatch.context() as patch:
        patch.setattr(dense_build, 'learn_masks', None)  # learnt before, and kept
        assert '2 of 4 steps done' in run(*words, '--note', 'half', '--resume', 'auto')
    for name in modes:
        assert same(weights(tmp_path / 'whole' / name), weights(tmp_path / 'half' / name)), name
        first, second = (results(tmp_path / note / name) for note in ('whole', 'half'))
        assert first['last'] == second['last'] and first['curve'] == second['curve']
    assert '4 of 4 steps done' in run(*words, '--note', 'half', '--resume', 'auto')


def test_a_teacher_of_ones_own_in_bf16(run, tmp_path):
    """--kd_mode alone makes teachers; a student may start from weights; autocast."""
    big = ('--task', 'detection', '--s_name', 'fasterrcnn:resnet10')
    run('--kd_mode', 'alone', *big, '--steps', 1, '--note', 'big', *USUAL)
    file = tmp_path / 'big' / 'alone' / 'student.pt'
    out = run('--kd_mode', 'pkd', 'dkd', *big, '--t_name', big[-1], '--t_model', file, '--s_init', file,
              '--steps', 1, '--amp', 'bf16', '--optim', 'sgd', '--schedule', 'poly', '--warmup', 2,
              '--unlabelled', 0, '--note', 'small', *USUAL)  # fmt: skip
    assert 'teacher fasterrcnn:resnet10: student.pt' in out and '6 labelled and 0 other' in out
    made = results(tmp_path / 'small' / 'pkd')
    assert made['teacher']['ap'] == results(tmp_path / 'big' / 'alone')['last']['ap']
    assert float(columns(tmp_path / 'small' / 'dkd')['dkd']) >= 0


def test_a_teacher_of_other_classes(script, tmp_path):
    """The remedy has flags of this script."""
    for K, names, said in ((9, None, 'only the classifier differs'), (6, [*'abcdef'], 'other classes')):
        net = build('segmentation', 'lraspp:resnet18', K, 32)
        torch.save(named_weights(net, names), tmp_path / f'{K}.pt')
        done = script('train_dense', *QUICK[:-2], '--kd_mode', 'st', '--t_model', tmp_path / f'{K}.pt')
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err
        assert done.err.endswith(': train one for these data: --kd_mode alone --s_name NAME --s_init FILE\n')
        assert '--init' not in done.err and '--new_head' not in done.err


def test_voc_and_coco_train(script, tmp_path):
    """Pictures of any size; a teacher must be given."""
    write_voc(tmp_path)
    write_coco(tmp_path)
    common = ('--img_root', tmp_path, '--steps', 1, '--batch_size', 2, '--size', 32, '--kd_mode', 'alone')
    seg = ('--data_name', 'voc', '--s_name', 'lraspp:resnet10')
    done = script('train_dense', *seg, *common, '--note', 'v')
    assert done.code == 0 and results(tmp_path / 'v' / 'alone')['last']['miou'] >= 0, done.err
    det = ('--task', 'detection', '--data_name', 'coco', '--s_name', DETECTORS[0])
    done = script('train_dense', *det, *common, '--note', 'c')
    assert done.code == 0 and 'ap50' in results(tmp_path / 'c' / 'alone')['last'], done.err
    assert 'every picture is scaled to 32 pixels' in done.out
    net = build('detection', DETECTORS[0], 4, 32)
    assert net.transform([torch.rand(3, 60, 128)])[0].image_sizes == [(15, 32)]
    done = script('train_dense', *seg, *common[:-1], 'cwd', '--note', 'n')
    assert done.code == 2 and '--t_model: needed with voc' in done.err and '--kd_mode alone' in done.err


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_picture_is_named(script, tmp_path, workers):
    write_coco(tmp_path)
    path = tmp_path / 'coco' / 'train2017' / '9.jpg'
    path.write_bytes(path.read_bytes()[:100])
    done = script('train_dense', '--task', 'detection', '--data_name', 'coco', '--img_root', tmp_path,
                  '--steps', 1, '--batch_size', 2, '--kd_mode', 'alone', '--workers', workers)  # fmt: skip
    assert done.code == 2 and done.err.count('\n') == 1 and '9.jpg: cannot be read' in done.err, done.err


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    'words,said',
    [
        (['--kd_mode', 'nonsense'], "no method is called 'nonsense'"),
        (['--kd_mode', 'pkd'], '--kd_mode pkd: is for --task detection'),
        (['--kd_mode', 'cwd', 'cwd'], 'something is named twice'),
        (['--kd_mode', 'st+st'], 'something is named twice'),
        (['--kd_mode', 'st', '--size', '50'], 'must be a multiple of 32'),
        (['--kd_mode', 'st', '--amp', 'fp16'], 'use bf16'),
        (['--kd_mode', 'st', '--kd_args', 'gamma=3'], "st has no argument 'gamma'"),
        (['--kd_mode', 'cwd', '--kd_args', 'tau=-1.0'], 'cwd: CWD: tau must be > 0'),
        (['--kd_mode', 'st', '--s_name', 'unet'], "no network for segmentation is called 'unet'"),
        (
            ['--kd_mode', 'st', '--s_name', 'lraspp:vgg11'],
            "no network for segmentation is called 'lraspp:vgg11'",
        ),
        (['--kd_mode', 'st', '--data_name', 'cityscapes'], 'there are scenes, scenes:N, voc, coco'),
        (['--kd_mode', 'st', '--data_name', 'coco'], 'its masks are not read here'),
        (['--kd_mode', 'st', '--data_name', 'voc'], 'VOCdevkit/VOC2012 is not there'),
        (['--kd_mode', 'st', '--t_model', 'none.pt', *USUAL], 'no such checkpoint file'),
        (['--kd_mode', 'st', '--t_model', 'none.pt'], '--t_steps: no teacher is trained here'),
        (['--kd_mode', 'alone', '--s_init', 'none.pt', *USUAL], 'no such checkpoint file'),
        (['--kd_mode', 'alone'], '--t_steps: alone has no teacher'),
        (['--task', 'detection', '--kd_mode', 'pkd', '--data_name', 'coco'], 'instances_train2017.json'),
        (
            ['--task', 'detection', '--kd_mode', 'pkd', 'crosskd', '--dry_run'],
            'crosskd: is for RetinaNet: --s_name retinanet:resnet10 --t_name retinanet:resnet18',
        ),
        (['--task', 'detection', '--kd_mode', 'dkd', '--t_name', 'fcos_resnet18_fpn'], 'is for Faster R-CNN'),
        (['--task', 'detection', '--kd_mode', 'pkd', '--s_name', 'fcos:resnet10'], 'PKD: '),
        (
            ['--task', 'detection', '--kd_mode', 'alone', '--s_name', 'maskrcnn_resnet50_fpn', *USUAL],
            'no network for detection',
        ),
    ],
)
def test_mistakes_are_one_line(script, words, said):
    done = script('train_dense', *QUICK, '--steps', 1, *words)
    assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err + done.out


def test_queues_of_one_process(script, monkeypatch):
    """What several processes do is in test_ddp.py."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    done = script('train_dense', '--kd_mode', 'st', 'cwd+cirkd')
    assert done.code == 2 and done.err.count('\n') == 1
    assert 'cirkd runs in one process only: its queues' in done.err
    monkeypatch.delenv('WORLD_SIZE')
    monkeypatch.setattr(dense_setting, 'processes', lambda: 7)
    done = script('train_dense', *QUICK, '--kd_mode', 'alone', *USUAL)
    assert done.code == 2 and '6 and 24 pictures for 7 processes' in done.err


def test_a_loss_that_is_not_finite_stops_one_student(script, tmp_path, monkeypatch):
    done = script('train_dense', *QUICK, '--kd_mode', 'alone', 'cwd', '--lambda_kd', 'cwd=1e39', '--steps', 1,
                  '--note', 'x')  # fmt: skip
    assert done.code == 1 and 'cwd: the loss is not finite before evaluation 1, step 1' in done.err, done.err
    assert (tmp_path / 'x' / 'alone' / 'results.json').exists()
    assert not (tmp_path / 'x' / 'cwd' / 'results.json').exists()
    # nothing is prepared for nobody
    seen, real = [], parts.StepPictures
    monkeypatch.setattr(
        parts, 'StepPictures', lambda setting, step, *more: seen.append(step) or real(setting, step, *more)
    )
    done = script('train_dense', *QUICK, '--kd_mode', 'cwd', '--lambda_kd', 'cwd=1e39', '--steps', 9)
    assert done.code == 1 and set(seen) == {0}


def test_rates():
    args = SimpleNamespace(steps=10, schedule='onecycle', warmup=0, milestones=[0.5, 0.8])
    shares = [dense_build.share_of_rate(args, step) for step in range(10)]
    assert (
        max(shares) == shares[2] and shares[0] == pytest.approx(0.25) and shares[-1] == pytest.approx(0.0625)
    )
    args.schedule, args.warmup = 'steps', 4
    shares = [dense_build.share_of_rate(args, step) for step in range(10)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1]) and shares[5] == pytest.approx(0.1)
    assert shares[9] == pytest.approx(0.01)


def test_the_rows_say_what_they_need(script):
    out = script('train_dense', '--kd_mode', 'list').out
    text = ' '.join(out.split())
    assert 'Shu et al., ICCV 2021' in text and 'labels' in text
    assert (ROOT / 'train_dense.py').read_text().count('\n') < 300
    assert segment and Detected


@pytest.mark.parametrize('name', DETECTORS)
def test_boxes_are_float32_under_autocast(name, img_root):
    """torchvision makes anchors and boxes in the precision of the maps, pixels apart in bfloat16."""
    torch.manual_seed(0)
    net = build('detection', name, 4, 32)
    task, given, images, _ = batch_of('detection', net, rooms('detection', img_root))
    plain = task.look(net, given).anchors_of_levels()
    task.setting.amp = lambda: torch.autocast('cpu', torch.bfloat16)
    seen = task.look(net, given)
    for a, b in zip(plain, seen.anchors_of_levels()):
        assert torch.equal(a, b)
    assert torch.isfinite(seen.loss())
    if seen.two_stage:
        assert all(box.dtype == torch.float32 for box in seen.rois.boxes)
    for found in task.found(net.eval(), images):
        assert found['boxes'].dtype == found['scores'].dtype == torch.float32
