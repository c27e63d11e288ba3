"""Python imports this module at its start, in every process that has this directory in `PYTHONPATH`."""

import os

from chaos_tests.planted.planting import VARIABLE, plant

plant(os.environ[VARIABLE])
