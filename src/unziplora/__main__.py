"""`python -m unziplora` is the `unziplora` command."""

import sys

from unziplora.cli import main

sys.exit(main())
