"""Recipes: how the models shipped with the package were made."""

import sys
from collections.abc import Callable

from unziplora.cli.output import report_error
from unziplora.errors import UnziploraError


def run(main: Callable[[], None]) -> None:
    """Run a script; a failure that a person can mend becomes one message, and a bug keeps its traceback."""
    try:
        main()
    except UnziploraError as error:
        sys.exit(report_error(error, as_json=False))
