"""Imported before torch, because OpenMP reads its settings once, when torch is loaded.

Threads that wait for each other inside an operation spin by default, and get in each other's way as soon as
another program wants one of the cores. They spin for a moment only and then sleep, unless you chose a policy.
On an idle machine that costs nothing; without the moment it costs a fifth (docs/speed.md).
"""

import os

if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ['OMP_WAIT_POLICY'] = 'passive'
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')
