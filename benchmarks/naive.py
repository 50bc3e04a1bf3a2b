"""The plain transcription of each formula: what the losses are measured against, and checked against.

Written as a paper's equation is first typed in: broadcast products, masks, loops where the old zoos loop.
Slow on purpose; nothing here is used by the losses or the trainers.
"""

import torch
import torch.nn.functional as F


def at(s, t):
    def q(fm):
        a = fm.abs().pow(2).mean(dim=1).flatten(1)
        return a / a.norm(dim=1, keepdim=True)

    return (q(s) - q(t)).pow(2).mean()


def nst(s, t, kernel=lambda x: x**2):
    a, b = (F.normalize(fm.flatten(2), dim=2) for fm in (s, t))

    def mean_kernel(x, y):  # (N, C_y, C_x, HW)
        return kernel((x[:, None] * y[:, :, None]).sum(dim=3)).mean(dim=(1, 2))

    return (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)).mean()


def fsp(s1, s2, t1, t2):
    def matrix(a, b):
        b = F.adaptive_avg_pool2d(b, a.shape[2:]) if b.shape[2] > a.shape[2] else b
        a = F.adaptive_avg_pool2d(a, b.shape[2:]) if a.shape[2] > b.shape[2] else a
        return (a.flatten(2)[:, :, None] * b.flatten(2)[:, None]).mean(dim=3)

    return (matrix(s1, s2) - matrix(t1, t2)).pow(2).mean()


def rkd_distance(s, t):
    def distances(f):
        square = f.pow(2).sum(dim=1)
        d = (square[:, None] + square[None] - 2 * f @ f.T).clamp(min=1e-12).sqrt()
        d = d.clone()
        d[range(len(f)), range(len(f))] = 0
        return d / d[d > 0].mean()

    return F.smooth_l1_loss(distances(s), distances(t))


def rkd_angle(s, t):
    def angles(f):
        e = F.normalize(f[None] - f[:, None], dim=2)
        return torch.bmm(e, e.transpose(1, 2)).view(-1)

    return F.smooth_l1_loss(angles(s), angles(t))


def pkt(s, t):
    def p(f):
        f = F.normalize(f, dim=1)
        k = (f @ f.T + 1) / 2
        return k / k.sum(dim=1, keepdim=True)

    a, b = p(s), p(t)
    return (b * ((b + 1e-7) / (a + 1e-7)).log()).mean()


def sp(s, t):
    def gram(fm):
        f = fm.flatten(1)
        return F.normalize(f @ f.T, dim=1)

    return (gram(s) - gram(t)).pow(2).mean()


def vid(s, t, regressor, alpha, eps):
    pred, var = regressor(s), F.softplus(alpha)[None, :, None, None] + eps
    return (0.5 * (var.log() + (pred - t).pow(2) / var)).mean()


def ab(s, t, margin=1.0):
    off = ((t <= 0) & (s > -margin)).float()
    on = ((t > 0) & (s <= margin)).float()
    return ((s + margin).pow(2) * off + (s - margin).pow(2) * on).mean()


def ofd(s, t, margin):
    t = torch.max(t, margin)
    skip = ((s <= t) & (t <= 0)).float()
    return ((s - t).pow(2) * (1 - skip)).mean()


def irg(s, t, w_vert=0.1, w_edge=5.0, w_tran=5.0):
    def edges(f):
        f = f.flatten(1)
        square = f.pow(2).sum(dim=1)
        d = (square[:, None] + square[None] - 2 * f @ f.T).clamp(min=1e-12).clone()
        d[range(len(f)), range(len(f))] = 0
        return d / d.max()

    def changes(a, b):  # the earlier, larger map is pooled, channels are averaged in groups
        a = F.adaptive_avg_pool2d(a, b.shape[2:])
        b = b.unflatten(1, (a.shape[1], -1)).mean(dim=2)
        d = (a - b).pow(2).flatten(1).sum(dim=1)
        return d / d.max()

    vert = F.mse_loss(s[3], t[3])
    edge = sum(F.mse_loss(edges(x), edges(y)) for x, y in zip(s[:3], t[:3])) / 3
    return w_vert * vert + w_edge * edge + w_tran * F.mse_loss(changes(*s[:2]), changes(*t[:2]))


def crd(e_s, e_t, memory_s, memory_t, sample_idx, z_s, z_t, T):
    n, n_neg, n_data = len(e_s), sample_idx.shape[1] - 1, len(memory_s)

    def nce(e, memory, z):
        rows = memory.index_select(0, sample_idx.flatten()).view(n, n_neg + 1, -1)
        x = torch.exp(torch.bmm(rows, e[:, :, None])[:, :, 0] / T) / z
        c = n_neg / n_data
        return -((x[:, 0] / (x[:, 0] + c + 1e-7)).log().sum() + (c / (x[:, 1:] + c + 1e-7)).log().sum()) / n

    return nce(e_s, memory_t, z_s) + nce(e_t, memory_s, z_t)


def kdsvd(fms_s, fms_t, k=1):
    def vectors(fm, count):
        _, values, v = torch.linalg.svd(fm.flatten(2).transpose(1, 2), full_matrices=False)
        return values[:, :count], v[:, :count].transpose(1, 2)

    def pair(s, t):
        values, v = vectors(t, k)
        v = v * torch.sign(v.gather(1, v.abs().argmax(dim=1, keepdim=True)))
        w = (values / values.norm(dim=1, keepdim=True))[:, None]
        a = vectors(s, k + 3)[1]
        match = a.transpose(1, 2) @ v
        chosen = match.abs().argmax(dim=1, keepdim=True)
        a = a.gather(2, chosen.expand(-1, a.shape[1], -1)) * torch.sign(match.gather(1, chosen))
        return a * w, v * w

    pairs = [pair(s, t) for s, t in zip(fms_s, fms_t)]
    loss = 0
    for low, high in zip(pairs, pairs[1:]):
        r = [torch.exp(-(high[i][:, :, None] - low[i][:, None]).pow(2) / 8) for i in (0, 1)]
        loss = loss + (r[0] - r[1]).pow(2).sum(dim=(1, 2, 3)).mean()
    return loss


def dcm(outs_1, outs_2, target, eps=1e-8):
    def smooth(z):
        return (F.softmax(z, dim=1) + eps) / (1 + z.shape[1] * eps)

    loss = sum(F.cross_entropy(z, target) for z in (*outs_1, *outs_2))
    for one, other in ((outs_1, outs_2), (outs_2, outs_1)):
        for a in one:
            for b in other:
                p, q = smooth(a.detach()), smooth(b)
                loss = loss + (p * (p / q).log()).sum(dim=1).mean()
    return loss


def quest(s, t, centroids, weight, scale, tau=5.0):
    t, s = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (t, s))
    p = F.softmax(-tau * torch.cdist(t, centroids).pow(2), dim=1)
    q = F.softmax(scale * F.normalize(s, dim=1) @ F.normalize(weight, dim=1).T, dim=1)
    return (p * (p.clamp(min=1e-30) / q).log()).sum(dim=1).mean()


def dkd(out_s, out_t, target, alpha=1.0, beta=8.0, T=4.0):
    mask = torch.zeros_like(out_s).scatter_(1, target[:, None], 1).bool()

    def binary(out):
        p = F.softmax(out / T, dim=1)
        return torch.stack([(p * mask).sum(dim=1), (p * ~mask).sum(dim=1)], dim=1)

    tckd = F.kl_div(binary(out_s).log(), binary(out_t), reduction='batchmean')
    rest = [out / T - 1000.0 * mask for out in (out_s, out_t)]
    nckd = F.kl_div(F.log_softmax(rest[0], dim=1), F.softmax(rest[1], dim=1), reduction='batchmean')
    return (alpha * tckd + beta * nckd) * T**2


def bss_selection(out_s, out_t, target, size, u):
    """Base samples and attack classes with loops over samples and classes."""
    p_s, p_t = F.softmax(out_s, dim=1), F.softmax(out_t, dim=1)
    found = []
    for n in range(len(target)):
        if p_s[n].argmax() == target[n] and p_t[n].argmax() == target[n]:
            gap = sum(float((p_t[n, k] - p_s[n, k]) ** 2) for k in range(p_s.shape[1]) if k != int(target[n]))
            found.append((-gap, n))
    found = [n for _, n in sorted(found)[:size]] if len(found) > size else [n for _, n in found]
    classes = []
    for i, n in enumerate(found):
        p, order = p_t[n].sort(descending=True)
        reach, total = float(u[i]) * float(p[1:].sum()), 0.0
        for k in range(1, len(p)):
            total += float(p[k])
            if total >= reach:
                break
        classes.append(int(order[k]))
    return torch.tensor(found), torch.tensor(classes)


def sobolev_step(net_s, net_t, img, target):
    """Both input gradients with a graph, as Knowledge-Distillation-Zoo takes them."""
    img = img.detach().requires_grad_()
    out_s, out_t = net_s(img), net_t(img)

    def unit(out):
        (g,) = torch.autograd.grad(out.gather(1, target[:, None]).sum(), img, create_graph=True)
        return F.normalize(g.flatten(1), dim=1)

    return F.mse_loss(unit(out_s), unit(out_t).detach()) + F.cross_entropy(out_s, target)


def lwm_step(net_s, net_t, img, target):
    """Both class activation maps with a graph from the image, as Knowledge-Distillation-Zoo takes them."""
    img = img.detach().requires_grad_()
    s, t = net_s(img, True), net_t(img, True)

    def cam(f):
        (g,) = torch.autograd.grad(f.out.gather(1, target[:, None]).sum(), f.fms[-1], create_graph=True)
        m = (g.mean(dim=(2, 3), keepdim=True) * f.fms[-1]).sum(dim=1).relu()
        return F.normalize(m.flatten(1), dim=1)

    return F.l1_loss(cam(s), cam(t).detach()) + F.cross_entropy(s.out, target)
