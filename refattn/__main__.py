"""`python -m refattn`, for where the script is not on the path."""

import sys

from refattn.cli import main

sys.exit(main())
