"""TDD, tree-like decisions: each layer learns to tell apart the groups of classes that the teacher's can.

J. Song, H. Zhang, X. Wang, M. Xue, Y. Chen, L. Sun, D. Tao, M. Song, "Tree-like Decision Distillation", CVPR
2021.

    offline, for each stage of the teacher: groups of classes (see merge_classes); deep stages have one class
    per group, shallow ones few groups
    g_n = group of target[n],  w_g = 1 / (number of classes in group g)
    level = sum over n of w_{g_n} * CE(linear map of the pooled map, g_n) / sum over n of w_{g_n}
    loss = sum over levels of level

Tap: the student's maps after the ReLU of every stage (of a wide network its sums, which have none), and
labels; the teacher only through its groups. The linear maps are trained with the student and dropped. The
authors' total is 0.1 * CE + 0.9 * KD + 0.1 * TDD, KD with T = 4: --kd_mode tdd+st --lambda_ce 0.1
--lambda_kd tdd=0.1 st=0.9.

Differences: the authors' code fails for a batch of one, which is legal here; its linear maps have an output
per group, here an output per class, those of groups that do not exist left out of the softmax: value and
gradients are the same, and groups may change after the loss was built. The paper's figures could not be read.

Source: zju-vipa/KamalEngine, kamal/core/tasks/loss/hierarchical_loss.py and kamal/distillation/TDD.

Use:
    >>> import torch
    >>> from tdd import TDD
    >>> fms_s = [torch.randn(8, 4, 6, 6, requires_grad=True), torch.randn(8, 9, 3, 3, requires_grad=True)]
    >>> loss = TDD([[0, 0, 1, 1], [0, 1, 2, 3]], [4, 9])  # two groups, then every class by itself
    >>> loss(fms_s, torch.arange(8) % 4).backward()
    >>> fms_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TDD(nn.Module):
    """Cross-entropy of the groups of classes at every level, classes of large groups weighing less.

    Args:
        class_to_group: per level the group of every class, (K,) numbers from 0 on.
        channels: of the student's map at every level.

    Shape:
        fms_s: list of maps (N, C_l, H_l, W_l), one per level; target: (N,) labels. Returns a scalar, `levels`
        a list of them. Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: the lists differ in length, or groups in their number of classes; shapes or labels are
            wrong.
    """

    def __init__(self, class_to_group: list[Tensor], channels: list[int]) -> None:
        super().__init__()
        groups = [torch.as_tensor(x).long() for x in class_to_group]
        if len(groups) != len(channels) or not groups or any(x.shape != groups[0].shape for x in groups):
            raise ValueError(
                f'TDD: class_to_group must hold a group per class for every level, got '
                f'{[tuple(x.shape) for x in groups]} for {len(channels)} maps: one (K,) per map'
            )
        K = len(groups[0])
        if min(int(x.min()) for x in groups) < 0 or max(int(x.max()) for x in groups) >= K:
            raise ValueError(f'TDD: class_to_group must be in 0..{K - 1}, got others: number groups from 0')
        self.channels = list(channels)
        self.classifiers = nn.ModuleList(nn.Linear(c, K) for c in channels)
        self.register_buffer('class_to_group', torch.stack(groups))

    def forward(self, fms_s: list[Tensor], target: Tensor) -> Tensor:
        return sum(self.levels(fms_s, target))

    def levels(self, fms_s: list[Tensor], target: Tensor) -> list[Tensor]:
        if len(fms_s) != len(self.channels):
            raise ValueError(
                f'TDD: fms_s must hold {len(self.channels)} maps, got {len(fms_s)}: a list, one per level'
            )
        for i, (fm, c) in enumerate(zip(fms_s, self.channels)):
            _expect('TDD', f'fms_s[{i}]', fm, len(fms_s[0]) or 'N', c, 'H', 'W')
        L, K = self.class_to_group.shape
        target, valid = _labels('TDD', target, len(fms_s[0]), K)
        losses = []
        with _no_autocast(fms_s[0]):
            for fm, layer, groups in zip(fms_s, self.classifiers, self.class_to_group):
                z = _run(layer, _full(fm, fms_s[0]).mean(dim=(2, 3)))
                size = z.new_zeros(K).index_add(0, groups, z.new_ones(K))  # classes per group
                # the lowest number there is: -inf would make 0 * inf where a map is not finite
                z = torch.where(size == 0, torch.finfo(z.dtype).min, z)
                group = groups[target]
                weight = 1 / size[group]
                if valid is not None:
                    weight = torch.where(valid, weight, 0.0)
                ce = F.cross_entropy(z, group, reduction='none')
                ce = ce if valid is None else torch.where(valid, ce, 0.0)
                losses.append((weight * ce).sum() / weight.sum().clamp(min=1e-12))
        return losses


@torch.no_grad()
def merge_classes(feats: Tensor, target: Tensor, k: int = 20, threshold: float = 0.2) -> list[list[int]]:
    """Groups of classes that a layer does not tell apart.

    feats: (n, D) pooled maps of the training set without augmentation; target: (n,) labels of 0..K-1, each
    there. The means of the classes are joined to a tree (Ward's criterion). From the root down: a node whose
    k nearest feats are of its own classes for less than `threshold` is a group, and so is a leaf.
    """
    _expect('merge_classes', 'feats', feats, 'N', 'D')
    feats = _double(_full(feats))
    target = target.to(feats.device)
    K = int(target.max()) + 1
    means = torch.stack([feats[target == c].mean(dim=0) for c in range(K)])
    if not torch.isfinite(means).all():
        raise ValueError(f'merge_classes: feats must be finite, with samples of all {K} classes, got others')
    members, children, centre = _ward(means)
    groups, open_nodes = [], [len(members) - 1]
    while open_nodes:
        node = open_nodes.pop()
        nearest = (feats - centre[node]).square().sum(dim=1).topk(min(k, len(feats)), largest=False).indices
        own = torch.isin(target[nearest], torch.tensor(members[node], device=target.device))
        if node < K or float(own.double().mean()) < threshold:
            groups.append(sorted(members[node]))
        else:
            open_nodes += children[node]
    return sorted(groups)


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


def _ward(means: Tensor) -> tuple[list[list[int]], dict, list[Tensor]]:
    """Classes, children and centre of all nodes; leaves first, the root last.

    A centre is the unweighted mean of the children's, as in the authors' code.
    """
    K = len(means)
    members, children, centre = [[c] for c in range(K)], {}, list(means)
    at = list(range(K))  # which node stands in a row of the distances
    d = (means[:, None] - means[None, :]).square().sum(dim=2)
    d.fill_diagonal_(torch.inf)
    size = means.new_ones(K)
    for _ in range(K - 1):
        i, j = divmod(int(d.argmin()), K)
        joined = ((size[i] + size) * d[i] + (size[j] + size) * d[j] - size * d[i, j]) / (
            size[i] + size[j] + size
        )
        joined[i] = torch.inf
        d[i], d[:, i] = joined, joined
        d[j], d[:, j] = torch.inf, torch.inf
        size[i] += size[j]
        children[len(members)] = [at[i], at[j]]
        members.append(members[at[i]] + members[at[j]])
        centre.append((centre[at[i]] + centre[at[j]]) / 2)
        at[i] = len(members) - 1
    return members, children, centre


def _expect(who: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """Refuse another shape and say what to do. A letter is an axis of any length but 0, for K (classes) 1."""
    got = tuple(x.shape)
    right = [n > int(w == 'K') if isinstance(w, str) else n == w for n, w in zip(got, wanted)]
    if len(got) == len(wanted) and all(right) and 0 not in got:
        return
    if 0 in got:
        remedy = 'leave an empty batch out'
    elif len(got) == 2 and len(wanted) == 1:
        remedy = 'a number per row: x.flatten() of (N, 1) or (N, L), x.argmax(1) of one-hot labels'
    elif len(got) > len(wanted) and len(wanted) < 3:
        remedy = (
            'classes last, then flatten: x.movedim(1, -1).flatten(0, 2) for (N, K, H, W), x.flatten(0, 1) '
        )
        remedy += 'for (N, L, V), target.flatten()'
    elif len(wanted) == 4 and len(got) in (3, 5):
        remedy = 'x[..., None] makes a map of (N, C, L), x.flatten(3) one of (N, C, D, H, W)'
    elif len(got) != len(wanted):
        remedy = 'unsqueeze or flatten axes'
    elif not right[0]:
        remedy = 'all arguments need the samples of one batch (drop_last=True if the last one is smaller)'
    elif got[1] == 1 and 'K' in wanted:
        remedy = 'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
    elif not right[1]:
        remedy = 'give channels, widths or classes as the loss was built for, or as the other side has them'
    else:
        remedy = 'bring maps to one size, F.adaptive_avg_pool2d'
    shape = ', '.join(map(str, wanted)) + ',' * (len(wanted) == 1)
    raise ValueError(f'{who}: {name} must be ({shape}), got {got}: {remedy}')


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _run(module: nn.Module, x: Tensor, *more):
    """module(x, ...) in the precision of x, whatever half() or double() has made of the parameters."""
    if all(p.dtype == x.dtype for p in module.parameters()):
        return module(x, *more)
    state = {name: _full(p, x) for name, p in module.named_parameters()}
    state |= {name: _full(b, x) if b.is_floating_point() else b for name, b in module.named_buffers()}
    y = torch.func.functional_call(module, state, (x, *more))
    with torch.no_grad():
        for name, b in module.named_buffers():  # running statistics
            if b is not state[name]:  # a copy onto itself is a change, which backward would refuse
                b.copy_(state[name])
    return y


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.fms[1 : len(kd.channels) + 1], batch.target)


def build(loss, probe, k: int = 20, threshold: float = 0.2):
    """k, threshold: of merge_classes, over the whole training set, not augmented."""
    net, feats, labels = probe.net_t, [], []
    levels = min(len(probe.s.fms), len(probe.t.fms)) - 1
    for img, target, *_ in probe.train_set.test_batches(probe.batch_size):
        with torch.no_grad():
            fms = net(img, True).fms[-levels:]
        feats.append([fm.float().mean(dim=(2, 3)) for fm in fms])
        labels.append(target)
    labels, groups = torch.cat(labels), []
    known = labels != -100
    if not known.any():
        raise ValueError(
            'TDD: no image of the training set has a label, groups of classes are made from them'
        )
    for level in zip(*feats):
        group = torch.zeros(probe.num_classes, dtype=torch.int64)
        found = merge_classes(torch.cat(level)[known], labels[known], k, threshold)
        for number, classes in enumerate(found):
            group[classes] = number
        groups.append(group)
    return loss(groups, [fm.shape[1] for fm in probe.s.fms[1 : levels + 1]])
