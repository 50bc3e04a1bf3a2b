"""Transferability: which trained model should a new task start from? One metric a file, to copy as it is.

`leep(prob, label)`, `logme(feat, label)` and so on give a number per model, higher is better for all; maps
and graphs compare models with each other. docs/transferability.md says which to take.
"""

from .attribution import affinity_matrix, attribution_map, attribution_similarity, map_affinity
from .depara import depara, edge_vector, node_similarity, spearman
from .gbc import gbc
from .graph import build_graph, layout
from .hscore import h_score, shrinkage
from .knowledge import (
    NoiseScale,
    central_square,
    concepts,
    discard_entropy,
    distances,
    effective,
    entropy,
    layer_change,
    metrics,
)
from .leep import leep
from .logme import log_evidence, logme
from .nce import nce
from .nleep import nleep
from .sfda import sfda
from .transrate import transrate

__all__ = [
    'NoiseScale',
    'affinity_matrix',
    'attribution_map',
    'attribution_similarity',
    'build_graph',
    'central_square',
    'concepts',
    'depara',
    'discard_entropy',
    'distances',
    'edge_vector',
    'effective',
    'entropy',
    'gbc',
    'h_score',
    'layer_change',
    'layout',
    'leep',
    'log_evidence',
    'logme',
    'map_affinity',
    'metrics',
    'nce',
    'nleep',
    'node_similarity',
    'sfda',
    'shrinkage',
    'spearman',
    'transrate',
]
