"""The graph of trained networks: who looks at the same pixels? Attribution maps, distances, picture, page.

    python tools/transferability_graph.py 'save/*/net.pt' --data_name cifar10 --out save/graph

Every network looks at the same probe images, test images of the data; the distance of two is 1 - the mean
cosine of their attribution maps (transferability/attribution.py). Writes to FOLDER:

    graph.json    nodes (name, task, dataset, url, index), edges [source, target, length] to the nearest, the
                  affinity matrix, positions, and how much alike networks of one training set are
    graph.png     nodes laid out by distance, coloured by training set, edges by strength; needs matplotlib
    graph.html    the same to open in a browser: drag, hover, arrow keys; one file, nothing is fetched

Maps are kept in FOLDER/maps and not worked out again for the same weights and images (--no_cache).
"""

import hashlib
import html
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import transferability as tr  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import read_data  # noqa: E402
from engine.device import refuse_amp, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import add_data_flags, add_machine_flags, positive_int, seed_number  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.record import (  # noqa: E402
    fingerprint,
    output_folder,
    provenance,
    save_checkpoint,
    write_atomic,
    write_json,
)
from engine.sources import HELP, Source, probe_images, read_sources, some  # noqa: E402
from report.plot import pyplot  # noqa: E402

PAGE = Path(__file__).with_name('transferability_graph.html')
# ten colours that are told apart in light and dark, then again with other markers
COLOURS = '#4269d0 #efb118 #ff725c #6cc5b0 #3ca951 #ff8ab7 #a463f2 #97bbf5 #9c6b4e #9498a0'.split()


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument('networks', nargs='+', metavar='NETWORK', help=HELP)
    # fmt: off
    flag = parser.add_argument_group('the graph').add_argument
    flag('--out', required=True, metavar='FOLDER', help='where the graph goes')
    flag('--probes', type=positive_int, default=200, metavar='N', help='probe images, default 200')
    flag('--seed', type=seed_number, default=2, help='which probe images, default 2')
    flag('--topk', type=positive_int, default=5, metavar='K', help='edges per network, default 5')
    flag('--method', choices=('grad_input', 'saliency'), default='grad_input', help='default grad_input')
    flag('--output', choices=('sum', 'norm'), default='sum',
         help='of the embedding: sum, the paper; norm, KamalEngine; default sum')
    flag('--channel', choices=('mean', 'abs_mean', 'keep'), default='mean',
         help='of the map: mean over colours, the paper; keep, KamalEngine; default mean')
    flag('--title', default='Who looks at the same pixels?', help='of the picture and the page')
    flag('--no_cache', action='store_true', help='work all maps out anew')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args()


def map_of(source: Source, img: Tensor, args, cache: Path | None, scale: tuple) -> Tensor:
    """The attribution map of a network on images of the probe data; from the cache if it is there.

    scale: mean and std of these images.
    """
    net = source.load(img.device)
    key = hashlib.sha1(img.cpu().numpy().tobytes())
    own = f'{scale} {source.scale}' if source.scale else ''
    key.update(f'{fingerprint(net)} {source.data}{own} {args.method} {args.output}'.encode())
    file = cache / f'{key.hexdigest()[:16]}.pt' if cache else None
    if file and file.is_file():
        return torch.load(file, weights_only=True)['map']

    own = source.seen_by(img, args.data_name, scale)
    parts = own.split(50)  # memory: every layer keeps what backward needs
    with user_errors():
        made = [
            tr.attribution_map(lambda x: net(x, True).feat.flatten(1), x, args.method, args.output)
            for x in parts
        ]
    made = torch.cat(made).cpu()
    if file:
        save_checkpoint(file, {'map': made})
    return made


def likeness(affinity: Tensor, groups: list, among: list | None = None) -> dict:
    """Mean similarity within and between groups, and how often the nearest network is of one's own group.

    among: only pairs that have this in common. Members of groups of one do not count for the nearest.
    """
    known = [k for k, g in enumerate(groups) if g is not None]
    within, between, right, asked = [], [], 0, 0
    for i in known:
        others = [j for j in known if j != i and (among is None or among[i] == among[j])]
        within += [float(affinity[i, j]) for j in others if j > i and groups[i] == groups[j]]
        between += [float(affinity[i, j]) for j in others if j > i and groups[i] != groups[j]]
        if any(groups[j] == groups[i] for j in others):
            nearest = max(others, key=lambda j: float(affinity[i, j]))
            right, asked = right + (groups[nearest] == groups[i]), asked + 1

    def mean(x):
        return sum(x) / len(x) if x else None

    return {
        'within': mean(within),
        'between': mean(between),
        'pairs_within': len(within),
        'pairs_between': len(between),
        'nearest_in_group': right / asked if asked else None,
        'asked': asked,
    }


def overlap_of(a: Source, b: Source) -> str | None:
    """How the training sets of two networks lie to each other."""
    if not (a.known and b.known):
        return None
    if a.trained_on == b.trained_on:
        return 'the same classes'
    if not (same := a.of(b.data, b.images)):
        return None if same is None else 'other data'
    return 'some classes in common' if a.saw(b.data, b.classes, b.images) else 'no class in common'


def by_overlap(affinity: Tensor, sources: list[Source]) -> dict:
    """Mean similarity of pairs, by what their training sets have in common."""
    found = {}
    for i, a in enumerate(sources):
        for j in range(i + 1, len(sources)):
            if kind := overlap_of(a, sources[j]):
                found.setdefault(kind, []).append(float(affinity[i, j]))
    return {kind: {'mean': sum(x) / len(x), 'pairs': len(x)} for kind, x in found.items()}


# -------------------------------------------------------------------------------------------------- drawing


def draw(path: Path, graph: dict, title: str) -> None:
    """The picture, where matplotlib is there."""
    if not (plt := pyplot(f'{path}: not drawn,')):
        return
    nodes, sets = graph['nodes'], list(graph['colours'])
    markers = 'osD^vP*X'
    nets = list(dict.fromkeys(n.get('net') for n in nodes))
    figure, axes = plt.subplots(figsize=(10, 7.2), dpi=130)
    for i, j, d in sorted(graph['edges'], key=lambda e: -e[2]):
        (x1, y1), (x2, y2) = (nodes[k]['position'] for k in (i, j))
        axes.plot(
            [x1, x2], [y1, y2], color='#555555', lw=0.4 + 1.8 * (1 - d), alpha=0.08 + 0.45 * (1 - d), zorder=1
        )
    for n in nodes:
        marker = markers[nets.index(n.get('net')) % len(markers)]
        axes.scatter(
            *n['position'], s=95, color=graph['colours'][n['dataset'] or 'unknown'], marker=marker,
            edgecolors='white', linewidths=0.9, zorder=2,
        )  # fmt: skip
    handles = [
        plt.Line2D([], [], marker='o', ls='', color=graph['colours'][s], label=s, markersize=8) for s in sets
    ]
    handles += [
        plt.Line2D([], [], marker=markers[k % len(markers)], ls='', color='#555555', label=net or 'network')
        for k, net in enumerate(nets)
    ]
    axes.legend(handles=handles, loc='center left', bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.set_title(title)
    axes.set_aspect('equal')
    axes.axis('off')
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True


def page(graph: dict, title: str) -> str:
    """One HTML file with everything in it."""
    kept = {key: graph[key] for key in ('nodes', 'edges', 'affinity', 'colours', 'probes', 'data')}
    # nothing in a name may end the script or be read as markup
    data = json.dumps(kept).replace('<', '\\u003c').replace('\u2028', '\\u2028').replace('\u2029', '\\u2029')
    return PAGE.read_text().replace('{{TITLE}}', html.escape(title)).replace('{{GRAPH}}', data)


def main():
    args = parse_args()
    refuse_amp(args)
    device = setup(args)
    folder = output_folder(Path(args.out))
    cache = None if args.no_cache else output_folder(folder / 'maps')
    sources = read_sources(args.networks, args.data_name)
    if len(sources) < 2:
        raise UserError('a graph needs two networks or more')
    _, test = read_data(args, device)
    img = probe_images(some(test, args.probes, args.seed))
    maps = []
    for number, source in enumerate(sources, 1):
        maps.append(map_of(source, img, args, cache, (test.mean, test.std)))
        print(f'{number}/{len(sources)} {source.name}', file=sys.stderr, flush=True)
    for source, made in zip(sources, maps):
        if not torch.isfinite(made).all():
            raise UserError(f'{source.file}: its attribution maps are not finite')
    with user_errors():
        affinity = tr.map_affinity(maps, None if args.channel == 'keep' else args.channel)
        nodes = [
            {
                'name': s.name,
                'dataset': s.trained_on,
                'url': s.url or str(s.file),
                'net': s.net,
                'seed': s.seed,
            }
            for s in sources
        ]
        graph = tr.build_graph(nodes, 1 - affinity, args.topk)
        positions = tr.layout(1 - affinity)
    for node, position in zip(graph['nodes'], positions.tolist()):
        node['position'] = [round(x, 5) for x in position]
    sets = list(dict.fromkeys(s.trained_on or 'unknown' for s in sources))
    graph['colours'] = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(sorted(sets))}
    graph['affinity'] = [[round(x, 5) for x in row] for row in affinity.tolist()]
    graph |= {
        'script': 'transferability_graph',
        'data': args.data_name,
        'probes': len(img),
        'seed': args.seed,
    }
    graph |= {'method': args.method, 'output': args.output, 'channel': args.channel, 'topk': args.topk}
    trained_on, nets = [s.trained_on for s in sources], [s.net for s in sources]
    graph['likeness'] = {
        'by training set': likeness(affinity, trained_on),
        'by training set, one architecture': likeness(affinity, trained_on, nets),
        'by architecture': likeness(affinity, nets),
        'by common classes': by_overlap(affinity, sources),
    }
    write_json(folder / 'graph.json', graph | provenance(device))
    write_atomic(folder / 'graph.html', page(graph, args.title).encode())
    draw(folder / 'graph.png', graph, args.title)
    for kind in list(graph['likeness'])[:3]:
        k = graph['likeness'][kind]
        cells = ['-' if k[x] is None else f'{k[x]:.3f}' for x in ('within', 'between', 'nearest_in_group')]
        print(f'similarity {kind}: within {cells[0]}, between {cells[1]}, nearest is of the same {cells[2]}')
    for kind, k in graph['likeness']['by common classes'].items():
        print(f'similarity of pairs with {kind}: {k["mean"]:.3f} ({k["pairs"]} pairs)')
    print(folder / 'graph.html')


if __name__ == '__main__':
    errors.run(main)
