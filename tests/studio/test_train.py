"""Forms of the trainings: each has every key of its recipe, and starts a run in the queue."""

from pathlib import Path

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")

from unziplora.errors import UserError  # noqa: E402
from unziplora.jobs.trainings import TRAININGS  # noqa: E402
from unziplora.studio import actions, train  # noqa: E402
from unziplora.studio.forms import Form  # noqa: E402


@pytest.mark.parametrize("method", sorted(TRAININGS))
def test_form_has_every_key_that_the_page_does_not_set_and_sets_none_by_itself(method: str) -> None:
    model = TRAININGS[method].recipe
    with gradio.Blocks():
        form = Form(model, method, ("out", "base"))
    assert form.fields.keys() == model.model_fields.keys() - {"out", "base"}
    assert form.keys(["" for _ in form.fields]) == {}
    assert form.keys([None for _ in form.fields]) == {}


def test_pictures_are_opened_upright_and_without_transparency(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (64, 32), "red").save(tmp_path / "side.jpg", exif=exif)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    _, (side, clear) = train._opened([str(tmp_path / "side.jpg"), str(tmp_path / "clear.png")])
    assert side.size == (32, 64)
    assert (clear.mode, clear.getpixel((0, 0))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize("files", [None, []])
def test_training_needs_a_picture(files: list[str] | None) -> None:
    with pytest.raises(UserError, match="drop one first"):
        train._opened(files)


@pytest.mark.parametrize(
    ("method", "keys"),
    [("dreambooth", {"content": "cat"}), ("blora", {"blocks": "bundled"})],
)
def test_trainings_on_pictures_wait_in_the_queue(tmp_path: Path, method: str, keys: dict[str, str]) -> None:
    image = Image.linear_gradient("L").convert("RGB").resize((128, 128))
    job = actions.start(tmp_path, method, {"base": "bundled", **keys}, method, [image])
    assert (job.name, job.state) == (method, "queued")
