"""Imported before torch, because OpenMP reads its settings once, when torch is loaded.

Threads that wait for each other inside an operation spin by default: a little faster on an idle machine, and
many times slower as soon as another program wants one of the cores. They sleep instead, unless you chose a
policy.
"""

import os

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
