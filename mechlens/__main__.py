"""`python -m mechlens` is the `mechlens` command."""

import sys

from mechlens.cli import main

sys.exit(main())
