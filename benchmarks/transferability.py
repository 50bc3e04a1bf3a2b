"""Time of the transferability metrics on 50 000 x 512 features, as ratios to plain transcriptions.

    python -m benchmarks.transferability [--quick] [--out FILE]

The plain forms are the formulas as published code writes them: the SVD of the features and a loop over the
classes (LogME), covariances and a pseudo-inverse (H-score), a loop over samples (LEEP), a log-determinant per
class (TransRate). Both sides run in turns with one thread; CPU time, median. A case fails where the values
differ by more than 1e-6. N-LEEP, GBC and SFDA have no published form to compare with: seconds only.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import transferability as tr
from engine.record import provenance, write_json


def plain_logme(feat, label):
    f = feat.double().numpy()
    n, d = f.shape
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    sigma, scores = (s**2)[:, None], []
    for c in range(int(label.max()) + 1):
        y = (label.numpy() == c).astype(float)
        x = u.T @ y[:, None]
        x2, r0, a, b = x**2, float(y @ y - (x**2).sum()), 1.0, 1.0
        for _ in range(11):
            t = a / b
            gamma = (sigma / (sigma + t)).sum()
            m2, res = (sigma * x2 / (t + sigma) ** 2).sum(), (x2 / (1 + sigma / t) ** 2).sum() + r0
            a, b = gamma / (m2 + 1e-5), (n - gamma) / (res + 1e-5)
            if abs(a / b - t) / t <= 1e-3:
                break
        logs = d / 2 * np.log(a) + n / 2 * np.log(b) - 0.5 * np.log(a + b * sigma).sum()
        scores.append((logs - b / 2 * res - a / 2 * m2 - n / 2 * np.log(2 * np.pi)) / n)
    return float(np.mean(scores))


def plain_h_score(feat, label):
    f, y = feat.double().numpy(), label.numpy()
    g = np.zeros_like(f)
    for c in np.unique(y):
        g[y == c] = f[y == c].mean(axis=0)
    return float(np.trace(np.linalg.pinv(np.cov(f, rowvar=False), rcond=1e-15) @ np.cov(g, rowvar=False)))


def plain_h_score_reg(feat, label):
    f, y = feat.double().numpy(), label.numpy()
    x = f - f.mean(axis=0)
    n, d = x.shape
    s = x.T @ x / n
    mu = np.trace(s) / d
    d2 = ((s - mu * np.eye(d)) ** 2).sum()
    al = min(d2, ((x**2).T @ (x**2) / n - s**2).sum() / n) / d2
    g = np.zeros_like(f)
    for c in np.unique(y):
        g[y == c] = f[y == c].mean(axis=0)
    shrunk = (1 - al) * s + al * mu * np.eye(d)
    return float(np.trace(np.linalg.pinv(shrunk) @ ((1 - al) * np.cov(g, rowvar=False))))


def plain_leep(prob, label):
    p, y = prob.double().numpy(), label.numpy()
    joint = np.zeros((y.max() + 1, p.shape[1]))
    for k in range(len(p)):
        joint[y[k]] += p[k] / len(p)
    given = joint / joint.sum(axis=0)
    return float(np.mean([np.log(given[y[k]] @ p[k]) for k in range(len(p))]))


def plain_transrate(feat, label, eps=1e-4):
    def rate(z):
        return 0.5 * np.linalg.slogdet(np.eye(z.shape[1]) + z.T @ z / (len(z) * eps))[1]

    z, y = feat.double().numpy(), label.numpy()
    z = z - z.mean(axis=0)
    return float(rate(z) - sum((y == c).mean() * rate(z[y == c]) for c in np.unique(y)))


def cases():
    n, d, classes = 50_000, 512, 100
    g = torch.Generator().manual_seed(0)
    label = torch.arange(n) % classes
    feat = (torch.randn(n, d, generator=g) + torch.randn(classes, d, generator=g)[label]).relu()
    size = f'{n} x {d}, {classes} classes'
    yield 'logme', size, lambda: tr.logme(feat, label), lambda: plain_logme(feat, label)
    yield 'h_score', size, lambda: tr.h_score(feat, label), lambda: plain_h_score(feat, label)
    name = 'h_score, regularized'
    yield name, size, lambda: tr.h_score(feat, label, True), lambda: plain_h_score_reg(feat, label)
    wide = torch.randn(500, 2048, generator=g) + torch.randn(10, 2048, generator=g)[label[:500] % 10]
    few = label[:500] % 10
    ours, plain = lambda: tr.h_score(wide, few, True), lambda: plain_h_score_reg(wide, few)
    yield name, '500 x 2048, 10 classes', ours, plain
    yield 'transrate', size, lambda: tr.transrate(feat, label), lambda: plain_transrate(feat, label)
    prob = torch.randn(n, 1000, generator=g).mul(2).softmax(1)
    yield 'leep', f'{n} x 1000', lambda: tr.leep(prob, label), lambda: plain_leep(prob, label)
    source = prob.argmax(1)
    yield 'nce', f'{n}', lambda: tr.nce(source, label), None
    yield 'nleep', f'{n} x {d}, 10 classes', lambda: tr.nleep(feat, label % 10), None
    yield 'gbc', size, lambda: tr.gbc(feat, label), None
    yield 'sfda', size, lambda: tr.sfda(feat, label), None


def timed(call) -> tuple[float, float]:
    started = time.process_time()
    value = call()
    return time.process_time() - started, value


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='1 round instead of 3')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f'{"metric":22}{"size":30}{"seconds":>9}{"plain":>9}{"ratio":>8}')
    for name, size, ours, plain in cases():
        rounds = [
            (timed(ours), timed(plain) if plain else (None, None)) for _ in range(1 if args.quick else 3)
        ]
        seconds = statistics.median(a[0] for a, _ in rounds)
        row = {'metric': name, 'size': size, 'seconds': round(seconds, 3)}
        if plain:
            value, wanted = rounds[0][0][1], rounds[0][1][1]
            if abs(value - wanted) > 1e-6 * max(abs(wanted), 1e-3):
                raise SystemExit(f"{name}: {value} is not the plain form's {wanted}")
            other = statistics.median(b[0] for _, b in rounds)
            row |= {'seconds_plain': round(other, 3), 'ratio': round(other / seconds, 2)}
        rows.append(row)
        print(f'{name:22}{size:30}{seconds:9.3f}{row.get("seconds_plain", "-"):>9}{row.get("ratio", "-"):>8}')
    if args.out:
        origin = provenance(torch.device('cpu'))
        origin['command'] = 'python -m benchmarks.transferability' + ' --quick' * args.quick
        write_json(Path(args.out), {'rows': rows, **origin})


if __name__ == '__main__':
    main()
