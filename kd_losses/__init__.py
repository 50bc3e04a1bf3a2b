"""Distillation losses, one method a file: `from kd_losses import RKD`.

Here are all public classes of the files: each method's loss, and the modules that belong to some methods
beside the networks, such as FT's Paraphraser or the exits of BYOTStudent; they stay importable from here.
Functions come from their file, `from kd_losses.lwm import grad_cam`; so does a second name of a class.
What the scripts train with them is in methods/; `python -m report refresh` rewrites this list.
"""

from .ab import AB
from .abkd import ABKD
from .adain import AdaINKD
from .aekd import AEKD
from .afd import AFD
from .afdcd import AfDCD
from .akl import AKL
from .at import AT
from .bss import BSS, BSSAttacker
from .byot import BYOT, BYOTStudent
from .c2kd import DSA, ESA
from .camkd import CAMKD, FeatureAdapters
from .catkd import CATKD
from .cc import CC
from .cd import CD, GuidedKD
from .cirkd import CIRKD
from .clipkd import CLIPKD
from .crd import CRD
from .crld import CRLD
from .crosskd import CrossKD
from .cskd import CSKD
from .ctkd import CTKD
from .cwd import CWD
from .dcd import DCD
from .dcm import DCM, DCMStudent
from .ddgsd import DDGSD
from .deep_geometric_graphs import GraphKD
from .deit import DeiT
from .dgkd import DGKD
from .diffkd import Denoiser, DiffKD
from .dist import DIST
from .distillm import DistiLLM, SampleSchedule
from .distillm2 import DistiLLM2
from .distplus import DISTPlus
from .dkd import DKD
from .dkl import DKL, ClassPrior
from .dlb import DLB
from .dml import DML
from .dot import DOT
from .dsd import DSD
from .dskd import DSKD, DSKDCMA
from .eakd import EAKD
from .ebkd import EBKD
from .eel import EEL
from .fcfd import FCFD
from .fdistill import FDistill
from .fgd import FGD
from .fgfi import FGFI
from .fitnet import FitNet
from .fkd_labels import SoftCE, SoftKL
from .freekd import FreeKD
from .fsp import FSP
from .ft import FT, FactorTransfer, Paraphraser, Translator
from .gkd import GKD
from .graftkd import GraftKD
from .ickd import ICKD
from .ifvd import IFVD
from .ikd import IKD
from .irg import IRG
from .kdcl import KDCL
from .kdsvd import KDSVD
from .ld import LD
from .libs import LIBS
from .logits import Logits
from .lskd import LSKD
from .lsp import LSP
from .lwm import LwM
from .maskd import MasKD
from .mgd import MGD
from .mhgd import MHGD
from .minillm import MiniLLM, ReverseKL
from .mkd_avg import MultiTeacherKD
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
from .pkd import PKD
from .pkt import PKT
from .pld import PLD
from .pskd import PSKD
from .quest import QuEST
from .radio import PHIS, RADIO
from .reviewkd import ABF, HCL, ReviewKD
from .rkd import RKD
from .rld import RLD
from .rrd import RRD
from .rsd import RSD
from .sad import SAD
from .sakd import SAKD, SpotPolicy
from .scalekd import ScaleKD
from .sdb import SDB, BoxStudent, SDBStudent
from .sdd import SDD
from .semckd import SemCKD
from .simkd import SimKD, SimKDStudent
from .skd import SKD
from .skds import Holistic, PairWise, PixelWise
from .sla import SLA, SLAStudent
from .sobolev import Sobolev
from .sortkd import SortKD
from .sp import SP
from .srd import SRD
from .srrl import SRRL
from .sskd import SSKD, SSHead, SSKDStudent
from .st import SoftTarget
from .taid import TAID
from .tdd import TDD
from .tekap import TeKAP
from .tfkd import TfKDReg, TfKDSelf
from .ttm import TTM
from .uld import ULD
from .unic import UNIC, TeacherNorm
from .uskd import USKD
from .vid import VID
from .vitkd import ViTKD
from .vkd import VkD
from .wkd import WKDFeature, WKDLogit
from .wsld import WSLD

__all__ = [
    'AB',
    'ABF',
    'ABKD',
    'AEKD',
    'AFD',
    'AKL',
    'AT',
    'BSS',
    'BYOT',
    'CAMKD',
    'CATKD',
    'CC',
    'CD',
    'CIRKD',
    'CLIPKD',
    'CRD',
    'CRLD',
    'CSKD',
    'CTKD',
    'CWD',
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
    'DSA',
    'DSD',
    'DSKD',
    'DSKDCMA',
    'EAKD',
    'EBKD',
    'EEL',
    'ESA',
    'FCFD',
    'FGD',
    'FGFI',
    'FSP',
    'FT',
    'GKD',
    'HCL',
    'ICKD',
    'IFVD',
    'IKD',
    'IRG',
    'KDCL',
    'KDSVD',
    'LD',
    'LIBS',
    'LSKD',
    'LSP',
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
    'PHIS',
    'PKD',
    'PKT',
    'PLD',
    'PSKD',
    'RADIO',
    'RKD',
    'RLD',
    'RRD',
    'RSD',
    'SAD',
    'SAKD',
    'SDB',
    'SDD',
    'SKD',
    'SLA',
    'SP',
    'SRD',
    'SRRL',
    'SSKD',
    'TAID',
    'TDD',
    'TTM',
    'ULD',
    'UNIC',
    'USKD',
    'VID',
    'WSLD',
    'AdaINKD',
    'Adversaries',
    'AfDCD',
    'BSSAttacker',
    'BYOTStudent',
    'BoxStudent',
    'Branches',
    'ClassPrior',
    'CrossKD',
    'DCMStudent',
    'DISTPlus',
    'DeiT',
    'Denoiser',
    'DiffKD',
    'Discriminator',
    'DistiLLM',
    'DistiLLM2',
    'FDistill',
    'FactorTransfer',
    'FeatureAdapters',
    'FeatureTransform',
    'FitNet',
    'FreeKD',
    'GraftKD',
    'GraphKD',
    'GuidedKD',
    'Holistic',
    'Logits',
    'LwM',
    'MasKD',
    'MiniLLM',
    'MultiTeacherKD',
    'NORMStudent',
    'OFAExit',
    'OKDDip',
    'OnAdvFD',
    'PairWise',
    'Paraphraser',
    'PixelWise',
    'QuEST',
    'ReverseKL',
    'ReviewKD',
    'SDBStudent',
    'SLAStudent',
    'SSHead',
    'SSKDStudent',
    'SampleSchedule',
    'ScaleKD',
    'SemCKD',
    'SimKD',
    'SimKDStudent',
    'Sobolev',
    'SoftCE',
    'SoftKL',
    'SoftTarget',
    'SortKD',
    'SpotPolicy',
    'TeKAP',
    'TeacherNorm',
    'TfKDReg',
    'TfKDSelf',
    'TransferLayer',
    'Translator',
    'ViTKD',
    'VkD',
    'WKDFeature',
    'WKDLogit',
]
