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
from .crd import CRD
from .cskd import CSKD
from .ctkd import CTKD
from .dcm import DCM, DCMStudent
from .ddgsd import DDGSD
from .dgkd import DGKD
from .dist import DIST
from .dkd import DKD
from .dlb import DLB
from .dml import DML
from .dot import DOT
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
from .pskd import PSKD
from .quest import QuEST
from .reviewkd import ABF, HCL, ReviewKD
from .rkd import RKD
from .sad import SAD
from .sdd import SDD
from .semckd import SemCKD
from .simkd import SimKD, SimKDStudent
from .sla import SLA, SLAStudent
from .sobolev import Sobolev
from .sp import SP
from .srrl import SRRL
from .st import SoftTarget
from .tfkd import TfKDReg, TfKDSelf
from .ttm import TTM
from .uskd import USKD
from .vid import VID
from .vkd import VkD
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
    'CRD',
    'CSKD',
    'CTKD',
    'DCM',
    'DDGSD',
    'DGKD',
    'DIST',
    'DKD',
    'DLB',
    'DML',
    'DOT',
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
    'PSKD',
    'RKD',
    'SAD',
    'SDD',
    'SLA',
    'SP',
    'SRRL',
    'TTM',
    'USKD',
    'VID',
    'WSLD',
    'AdaINKD',
    'Adversaries',
    'BSSAttacker',
    'BYOTStudent',
    'Branches',
    'DCMStudent',
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
    'SemCKD',
    'SimKD',
    'SimKDStudent',
    'Sobolev',
    'SoftTarget',
    'TfKDReg',
    'TfKDSelf',
    'TransferLayer',
    'Translator',
    'VkD',
]
