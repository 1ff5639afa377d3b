"""`python -m edgeattn`: the command `edgeattn`."""
import sys

from edgeattn.cli import main

sys.exit(main())
