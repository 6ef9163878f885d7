"""`python -m meap_lit`."""

import sys

from meap_lit.cli import main

if __name__ == "__main__":
    sys.exit(main())
