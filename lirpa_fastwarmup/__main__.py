"""``python -m lirpa_fastwarmup``."""

import sys

from lirpa_fastwarmup.cli import main

sys.exit(main())
