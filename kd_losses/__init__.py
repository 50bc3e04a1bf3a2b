"""Distillation losses, one method a file: `from kd_losses import RKD`.

What the scripts train with them is in methods/; `python -m report refresh` rewrites this list.
"""

from .ab import AB
from .adain import AdaINKD
from .afd import AFD
from .at import AT
from .bss import BSS, BSSAttacker
from .byot import BYOT, BYOTStudent
from .catkd import CATKD
from .cc import CC
from .cd import CD, GKD
from .clipkd import CLIPKD
from .crd import CRD
from .crld import CRLD
from .cskd import CSKD
from .ctkd import CTKD
from .dcd import DCD
from .dcm import DCM, DCMStudent
from .ddgsd import DDGSD
from .deit import DeiT
from .dgkd import DGKD
from .diffkd import Denoiser, DiffKD
from .dist import DIST
from .distplus import DISTPlus
from .dkd import DKD
from .dkl import DKL, ClassPrior
from .dlb import DLB
from .dml import DML
from .dot import DOT
from .eakd import EAKD
from .eel import EEL
from .fcfd import FCFD
from .fitnet import FitNet
from .fsp import FSP
from .ft import FT, FactorTransfer, Paraphraser, Translator
from .ickd import ICKD
from .ikd import IKD
from .irg import IRG
from .kdcl import KDCL
from .kdsvd import KDSVD
from .logits import Logits
from .lskd import LSKD
from .lwm import LwM
from .mgd import MGD
from .mhgd import MHGD
from .mlkd import MLKD
from .nkd import NKD
from .norm import NORM, FeatureTransform, NORMStudent
from .nst import NST
from .ofakd import OFAKD, OFAExit
from .ofd import OFD
from .okddip import OKDDip
from .onadvfd import Adversaries, Discriminator, OnAdvFD, TransferLayer
from .one import ONE, Branches
from .pad import PAD
from .pkt import PKT
from .pld import PLD
from .pskd import PSKD
from .quest import QuEST
from .reviewkd import ABF, HCL, ReviewKD
from .rkd import RKD
from .rld import RLD
from .rrd import RRD
from .rsd import RSD
from .sad import SAD
from .scalekd import ScaleKD
from .sdd import SDD
from .semckd import SemCKD
from .simkd import SimKD, SimKDStudent
from .skd import SKD
from .sla import SLA, SLAStudent
from .sobolev import Sobolev
from .sortkd import SortKD
from .sp import SP
from .srd import SRD
from .srrl import SRRL
from .sskd import SSKD, SSHead, SSKDStudent
from .st import SoftTarget
from .tekap import TeKAP
from .tfkd import TfKDReg, TfKDSelf
from .ttm import TTM
from .uskd import USKD
from .vid import VID
from .vitkd import ViTKD
from .vkd import VkD
from .wkd import WKDFeature, WKDLogit
from .wsld import WSLD

__all__ = [
    'AB',
    'ABF',
    'AFD',
    'AT',
    'BSS',
    'BYOT',
    'CATKD',
    'CC',
    'CD',
    'CLIPKD',
    'CRD',
    'CRLD',
    'CSKD',
    'CTKD',
    'DCD',
    'DCM',
    'DDGSD',
    'DGKD',
    'DIST',
    'DKD',
    'DKL',
    'DLB',
    'DML',
    'DOT',
    'EAKD',
    'EEL',
    'FCFD',
    'FSP',
    'FT',
    'GKD',
    'HCL',
    'ICKD',
    'IKD',
    'IRG',
    'KDCL',
    'KDSVD',
    'LSKD',
    'MGD',
    'MHGD',
    'MLKD',
    'NKD',
    'NORM',
    'NST',
    'OFAKD',
    'OFD',
    'ONE',
    'PAD',
    'PKT',
    'PLD',
    'PSKD',
    'RKD',
    'RLD',
    'RRD',
    'RSD',
    'SAD',
    'SDD',
    'SKD',
    'SLA',
    'SP',
    'SRD',
    'SRRL',
    'SSKD',
    'TTM',
    'USKD',
    'VID',
    'WSLD',
    'AdaINKD',
    'Adversaries',
    'BSSAttacker',
    'BYOTStudent',
    'Branches',
    'ClassPrior',
    'DCMStudent',
    'DISTPlus',
    'DeiT',
    'Denoiser',
    'DiffKD',
    'Discriminator',
    'FactorTransfer',
    'FeatureTransform',
    'FitNet',
    'Logits',
    'LwM',
    'NORMStudent',
    'OFAExit',
    'OKDDip',
    'OnAdvFD',
    'Paraphraser',
    'QuEST',
    'ReviewKD',
    'SLAStudent',
    'SSHead',
    'SSKDStudent',
    'ScaleKD',
    'SemCKD',
    'SimKD',
    'SimKDStudent',
    'Sobolev',
    'SoftTarget',
    'SortKD',
    'TeKAP',
    'TfKDReg',
    'TfKDSelf',
    'TransferLayer',
    'Translator',
    'ViTKD',
    'VkD',
    'WKDFeature',
    'WKDLogit',
]
