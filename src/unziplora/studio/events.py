"""Events of the page: errors that are shown instead of raised."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import gradio as gr

from unziplora.errors import UnziploraError
from unziplora.studio import look

F = TypeVar("F", bound=Callable[..., Any])


def shown(function: F) -> F:
    """Show the errors of an event handler in the page: the fault and its remedy, no traceback."""

    @wraps(function)
    def handler(*args: Any, **keys: Any) -> Any:
        try:
            return function(*args, **keys)
        except UnziploraError as error:
            raise gr.Error(look.text(error), duration=12, title="Not possible", print_exception=False) from None

    return handler  # type: ignore[return-value]
