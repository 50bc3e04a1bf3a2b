"""Faces with fourteen yes-or-no attributes, drawn here, nothing to download: an embedded stand-in for CelebA.

Attributes have CelebA's names and are drawn independently, but for the colour of the hair, of which there is
one, and earrings, which are rare beside a goatee. Everything is a function of seed and index.
"""

import numpy as np

NAMES = (
    'Black_Hair', 'Blond_Hair', 'Brown_Hair', 'Bangs', 'Wearing_Hat', 'Eyeglasses', 'Smiling',
    'Mouth_Slightly_Open', 'Goatee', 'Bushy_Eyebrows', 'Big_Nose', 'Pale_Skin', 'Oval_Face',
    'Wearing_Earrings',
)  # fmt: skip
# the first images of teachers with labels, of students without, and of tests
LABELLED, UNLABELLED, TEST = 0, 10000, 20000
_CHANCES = (0.4, 0.25, 0.3, 0.5, 0.4, 0.3, 0.4, 0.4, 0.35, 0.5)  # of the attributes 3 to 12
_HAIR = np.array([(0.08, 0.07, 0.06), (0.88, 0.76, 0.42), (0.42, 0.26, 0.14), (0.62, 0.62, 0.62)])
_PALE, _DARK = np.array((0.97, 0.88, 0.82)), np.array((0.78, 0.57, 0.42))


def faces(n: int, first: int, size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The faces first, first + 1, ...: (n, size, size, 3) bytes and (n, 14) zeros and ones."""
    made = [face(first + i, seed, size) for i in range(n)]
    images = np.stack([image for image, _ in made]).transpose(0, 2, 3, 1)
    return np.rint(images * 255).astype(np.uint8), np.stack([attributes for _, attributes in made])


def face(index: int, seed: int = 0, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """(3, size, size) float32 in 0..1, and (14,) uint8 in the order of NAMES."""
    g = np.random.default_rng([seed, index])
    u = g.uniform  # every draw below is in a fixed order: pictures are the same everywhere
    hair_kind = int(np.searchsorted((0.3, 0.55, 0.8), g.random(), side='right'))  # 3: grey, no attribute
    has = np.concatenate([[hair_kind == k for k in range(3)], g.random(10) < _CHANCES, [False]])
    yes = dict(zip(NAMES, has))
    yes['Wearing_Earrings'] = has[13] = g.random() < (0.1 if yes['Goatee'] else 0.5)
    cx, cy = u(-0.08, 0.08, 2)
    scale, turn = u(0.9, 1.1), np.radians(u(-12, 12))
    hair = np.clip(_HAIR[hair_kind] + u(-0.05, 0.05, 3), 0, 1)
    skin = (_PALE if yes['Pale_Skin'] else _DARK) * u(0.92, 1.04)
    above, below = u(0.15, 0.9, 3), u(0.15, 0.9, 3)
    hat, iris, light = u(0.1, 0.9, 3), u(0.05, 0.4, 3), u(-0.15, 0.15, 2)
    noise = g.normal(0, 0.03, (size, size, 3))

    q = (np.arange(size) + 0.5) / size * 2 - 1
    across, down = q[None, :], q[:, None]
    cos, sin, x, y = np.cos(turn), np.sin(turn), (across - cx) / scale, (down - cy) / scale
    x, y = cos * x + sin * y, -sin * x + cos * y
    image = above + (below - above) * ((down + 1) / 2)[..., None] * np.ones((size, size, 1))
    both = (-1, 1)

    def paint(d: np.ndarray, colour) -> None:
        """Where the distance d is negative, with an edge one pixel wide."""
        nonlocal image
        alpha = np.clip(0.5 - d / (2 / (size * scale)), 0, 1)[..., None]
        image = (1 - alpha) * image + alpha * np.asarray(colour)

    def ellipse(ex, ey, a, b):
        return (np.sqrt(((x - ex) / a) ** 2 + ((y - ey) / b) ** 2) - 1) * min(a, b)

    def box(ex, ey, hx, hy):
        return np.maximum(np.abs(x - ex) - hx, np.abs(y - ey) - hy)

    wide, high = (0.42, 0.66) if yes['Oval_Face'] else (0.54, 0.56)
    paint(ellipse(0, -0.08, 0.64, 0.70), hair)
    for s in both:
        paint(ellipse(s * (wide + 0.02), 0.02, 0.09, 0.14), 0.95 * skin)
    for s in both if yes['Wearing_Earrings'] else ():
        paint(ellipse(s * (wide + 0.04), 0.25, 0.09, 0.10), (0.98, 0.86, 0.1))
    head = ellipse(0, 0.06, wide, high)
    paint(head, skin)
    paint(np.maximum(head, y + 0.42), hair)
    if yes['Bangs']:
        paint(np.maximum(head, y + 0.20 + 0.05 * np.sin(14 * x)), hair)
    for s in both:
        paint(box(s * 0.2, -0.14, 0.12, 0.07 if yes['Bushy_Eyebrows'] else 0.022), 0.5 * hair)
        paint(ellipse(s * 0.2, 0, 0.095, 0.055), (1, 1, 1))
        paint(ellipse(s * 0.2, 0, 0.045, 0.045), iris)
        if yes['Eyeglasses']:
            paint(np.abs(ellipse(s * 0.2, 0, 0.15, 0.13)) - 0.022, (0.05, 0.05, 0.05))
    if yes['Eyeglasses']:
        paint(box(0, -0.01, 0.06, 0.018), (0.05, 0.05, 0.05))
    if yes['Big_Nose']:
        paint(ellipse(0, 0.16, 0.17, 0.14), 0.62 * skin)
    else:
        paint(ellipse(0, 0.16, 0.05, 0.11), 0.75 * skin)
    centre, bend = (0.46, -0.20) if yes['Smiling'] else (0.36, 0.10)
    lips = y - (centre + bend * (x / 0.2) ** 2)
    paint(np.maximum(np.abs(lips) - 0.045, np.abs(x) - 0.24), (0.7, 0.15, 0.18))
    if yes['Mouth_Slightly_Open']:
        paint(ellipse(0, 0.41, 0.12, 0.075), (0.2, 0.02, 0.04))
    if yes['Goatee']:
        paint(np.maximum(ellipse(0, 0.62, 0.2, 0.12), head), 0.6 * hair)
    if yes['Wearing_Hat']:
        paint(np.maximum(ellipse(0, -0.46, 0.58, 0.46), y + 0.40), hat)
        paint(box(0, -0.40, 0.70, 0.05), 0.7 * hat)
    image = image * (1 + light[0] * across + light[1] * down)[..., None] + noise
    return image.clip(0, 1).transpose(2, 0, 1).astype(np.float32), has.astype(np.uint8)
