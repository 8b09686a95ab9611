"""Events of the page: errors that are shown instead of raised, and views that follow the run folders."""

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


def quietly(leaf: Any) -> dict[str, Any]:
    """Return the arguments of an event that shows no progress.

    Args:
        leaf: any component without parts. Gradio reads everything below a component on which it once showed progress
            again at every event of the page; if that is the editor, the page sends the picture to the server each time.
    """
    return {"show_progress": "hidden", "show_progress_on": leaf}


def run_list(**looks: Any) -> gr.Dropdown:
    """Return an empty list of runs that takes any choice.

    Gradio would refuse one from before a restart of the server; the views look runs up themselves.
    """
    choice = gr.Dropdown([], **looks)
    choice.preprocess = lambda payload: payload  # a subclass would make Gradio write a file next to this one
    return choice


class Follower:
    """Views that follow the run folders, all of them refreshed by one request of the page.

    A request for each view would cost more than what the views read.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Callable[..., Any], list[Any], list[Any]]] = []

    def add(self, refresh: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        """Add a view.

        Args:
            refresh: returns a value for each of several outputs.
        """
        self.parts.append((refresh, inputs, outputs))

    @property
    def inputs(self) -> list[Any]:
        return [component for _, inputs, _ in self.parts for component in inputs]

    @property
    def outputs(self) -> list[Any]:
        return [component for *_, outputs in self.parts for component in outputs]

    def refresh(self, *values: Any) -> list[Any]:
        """Return the values of all views; an error in one of them does not keep the others from being refreshed."""
        results: list[Any] = []
        for function, inputs, outputs in self.parts:
            own, values = values[: len(inputs)], values[len(inputs) :]
            try:
                results += function(*own)
            except (UnziploraError, OSError) as error:  # files of runs come, go and may not be read
                gr.Warning(look.text(error), duration=5)
                results += [gr.skip()] * len(outputs)
        return results
