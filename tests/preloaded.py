"""What processes of tests/fresh.py need not import: the scripts, as far as that starts nothing."""

import engine.threads  # noqa: F401  before torch

import torch._dynamo  # noqa: F401  the first optimiser asks for it
import torchvision.transforms.v2  # noqa: F401

import report.overview  # noqa: F401
import report.table  # noqa: F401
import train_dfkd  # noqa: F401
import train_dml  # noqa: F401
import train_ka  # noqa: F401
import train_kd  # noqa: F401
