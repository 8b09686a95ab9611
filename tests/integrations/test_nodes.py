"""The node pack as ComfyUI sees it: entry point, schemas, choices, registry entry, workflows."""

import asyncio
import inspect
import json
import sys

import pack
import pytest

from unziplora.config.split import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_entry_point_lists_the_four_nodes(nodes):
    classes = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    names = {node.define_schema().node_id for node in classes}
    assert names == {"UnziploraPair", "UnziploraSeparatePrompts", "UnziploraSplit", "UnziploraSaveRecipe"}


def test_inputs_are_the_arguments_of_execute(nodes):
    for node in nodes.nodes.NODES:
        schema = node.define_schema()
        parameters = inspect.signature(node.execute).parameters
        ids = [one.id for one in schema.inputs]
        assert len(ids) == len(set(ids))
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            assert ids == list(parameters)
        for one in schema.inputs:
            if one.options.get("optional"):
                assert parameters[one.id].default is not inspect.Parameter.empty


def test_choices_are_the_files_of_comfyui(nodes, files):
    schema = nodes.nodes.UnziploraPair.define_schema()
    for kind in ("content", "style"):
        assert schema.input(kind).options["options"] == ["none", "cat-content.safetensors", "cat-style.safetensors"]
        dial = schema.input(f"{kind}_strength").options
        assert dial["min"] <= -1
        assert (dial["default"], dial["max"] >= 2) == (1.0, True)
    split = nodes.nodes.UnziploraSplit.define_schema()
    assert split.input("preset").options["options"] == ["auto", *PRESETS]
    assert split.input("base").options["options"][-1] == "bundled"
    assert [one.kind for one in split.outputs] == ["COMBO", "COMBO"]  # connects to the files of the pair


def test_registry_entry_keeps_the_rules():
    project = tomllib.loads((pack.FOLDER / "pyproject.toml").read_text("utf-8"))
    assert "comfyui" not in project["project"]["name"].lower()
    assert project["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName"}


def test_pack_neither_downloads_nor_installs():
    for file in pack.FOLDER.rglob("*.py"):
        text = file.read_text("utf-8")
        for word in ("pip", "requests", "urllib", "hf_hub_download", "snapshot_download"):
            assert f" {word}" not in text, f"{file.name}: {word}"


@pytest.mark.parametrize("file", sorted((pack.FOLDER / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_workflows_fit_the_schemas(nodes, file):
    workflow = json.loads(file.read_text("utf-8"))
    schemas = {node.define_schema().node_id: node.define_schema() for node in nodes.nodes.NODES}
    own = [node for node in workflow["nodes"] if node["type"] in schemas]
    assert own
    for node in own:
        schema = schemas[node["type"]]
        for entry in node["inputs"]:
            assert entry["type"] == schema.input(entry["name"]).kind
        assert [entry["type"] for entry in node["outputs"]] == [one.kind for one in schema.outputs]
        sockets = ("MODEL", "CLIP", "IMAGE", "CONDITIONING")
        widgets = [one for one in schema.inputs if one.kind not in sockets and not one.options.get("force_input")]
        assert len(node["widgets_values"]) == len(widgets)
