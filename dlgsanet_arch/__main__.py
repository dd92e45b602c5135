"""`python -m dlgsanet_arch <verb>`: the command line where no `dlgsanet` script is installed."""

import sys

from dlgsanet_arch.cli import main

if __name__ == "__main__":
    sys.exit(main())
