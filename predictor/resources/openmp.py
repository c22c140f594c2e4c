"""How long OpenMP's threads wait actively, which is to be set before torch is imported: it loads the runtime."""

import os

SPIN_COUNT = 20000
"""Iterations of 10 to 50 ns: longer than a step needs between two kernels, and shorter than a time slice.

With 4000, threads sleep between the kernels of a step, and 32 callers got two thirds of the tokens/s.
"""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Of the environment."""


def limit_spinning() -> None:
    """Let threads that wait for others give up their core after a short time, unless the environment says otherwise.

    By default they spin for 300,000 iterations. Where another process holds up one thread, the others would keep busy
    the cores on which it could go on.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
