"""``python -m latemax.cli`` is the ``latemax`` command."""

import sys

from latemax.cli import main

sys.exit(main())
