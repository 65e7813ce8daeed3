"""How many random cases a property is tried on: few and always the same, or with ``--fuzz N`` N times as many new ones.

python -m pytest tests/fuzz --fuzz 100
"""

import os

from hypothesis import HealthCheck, settings

FACTOR = "VERL_DISCO_FUZZ"
"""Set by ``--fuzz``, in the processes of pytest-xdist too."""


def cases(number: int) -> settings:
    """Return the settings of a property that CI tries on ``number`` cases."""
    factor = int(os.environ.get(FACTOR, "0"))
    return settings(
        max_examples=number * max(factor, 1),
        derandomize=not factor,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
    )
