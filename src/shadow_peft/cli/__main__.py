"""`python -m shadow_peft.cli`: the same entry point, for launchers that start modules."""

import sys

from shadow_peft.cli.dispatch import main

sys.exit(main())
