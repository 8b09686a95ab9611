"""Forms made from recipes: a component for each key, and a panel to copy what was chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import gradio as gr
from pydantic.fields import FieldInfo

from unziplora.config.recipe import Recipe, defaults, group_of
from unziplora.studio.spelling import SPELLINGS, choices, read, write


class Form:
    """A component for each key of a recipe, in the groups of its help; an empty one leaves the key as it is.

    Attributes:
        fields: components by key.
    """

    def __init__(self, model: type[Recipe], name: str, skip: Collection[str] = ()) -> None:
        """Make the components; within the context of a page.

        Args:
            name: begins the components' ids in the page.
            skip: keys that the page sets in another way.
        """
        self.model = model
        self.fields: dict[str, Any] = {}
        groups: dict[str, list[tuple[str, FieldInfo]]] = {}
        for key, field in model.keys().items():
            if key not in skip:
                groups.setdefault(group_of(field), []).append((key, field))
        for group, members in groups.items():
            with gr.Accordion(group, open=False), gr.Row(elem_classes="keys"):
                for key, field in members:
                    self.fields[key] = _component(model, key, field, f"{name}-{key}")

    @property
    def components(self) -> list[Any]:
        return list(self.fields.values())

    def keys(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the keys that were set, from the values of the components; the recipe checks them."""
        texts = zip(self.fields, values, strict=True)
        return {name: read(self.model.model_fields[name], text) for name, text in texts if text not in (None, "")}

    def values(self, settings: Mapping[str, Any]) -> list[Any]:
        """Return the values of the components that stand for some settings."""
        return [write(settings[name]) if settings.get(name) is not None else "" for name in self.fields]


def _component(model: type[Recipe], name: str, field: FieldInfo, id: str) -> Any:
    title = name.replace("_", " ").capitalize()
    notes = "; ".join(defaults(model, name, field))
    about = f"{field.description}" + (f" ({notes})" if notes else "")
    if options := choices(field.annotation):
        named = [("as the recipe", ""), *((option, option) for option in options)]
        return gr.Dropdown(named, value="", label=title, info=about, min_width=260, elem_id=id)
    return gr.Textbox(label=title, info=about, placeholder="as the recipe", min_width=260, max_lines=1, elem_id=id)


def settled(component: Any) -> Any:
    """Return the event of a component at the end of an entry: not of every letter that is typed."""
    return component.blur if isinstance(component, gr.Textbox) else component.change


def copy_panel() -> tuple[Any, Any]:
    """Make the panel that shows a form as command, TOML or Python; return its choice and its text."""
    with gr.Accordion("Copy as command, TOML or Python", open=False):
        spelling = gr.Radio(list(SPELLINGS), value="Command", label="Written as", container=False)
        text = gr.Textbox(label="Text to copy", lines=4, max_lines=24, interactive=False, buttons=["copy"])
    return spelling, text
