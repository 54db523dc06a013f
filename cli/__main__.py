"""`python -m engram_cli`."""

import sys

from .main import run_process

sys.exit(run_process())
