from PIL import Image

from unziplora.probe.plot import COLORS, LEFT, ROW, TOP, WIDE, image_sheet, plot
from unziplora.probe.scores import ALL, BlockScores, Score, judge


def row(content: float, style: float, error: float | None = None) -> BlockScores:
    return BlockScores(content=Score(mean=content, error=error, pairs=2), style=Score(mean=style, error=error, pairs=2))


def bar_width(image: Image.Image, number: int, axis: str) -> int:
    """Return the largest number of pixels in an axis's color in a line of a block's row."""
    rows = range(TOP + number * ROW, TOP + (number + 1) * ROW)
    return max(sum(image.getpixel((x, y)) == COLORS[axis] for x in range(LEFT, LEFT + WIDE)) for y in rows)


def test_bars_are_as_long_as_the_movements():
    rows = {"up_blocks.0.attentions.0": row(0.4, 0.1), "up_blocks.0.attentions.1": row(0.0, 0.2), ALL: row(1, 1)}
    image = plot(judge(rows, 2, 4, base="tiny-xl", measure="statistics"))
    assert image.height > TOP + 2 * ROW
    # the axis ends at the largest movement, 0.4
    assert abs(bar_width(image, 0, "content") - WIDE) <= 1
    assert abs(bar_width(image, 0, "style") - WIDE / 4) <= 1
    assert bar_width(image, 1, "content") <= 1
    assert abs(bar_width(image, 1, "style") - WIDE / 2) <= 1


def test_error_adds_whiskers():
    rows = {"up_blocks.0.attentions.0": row(0.3, 0.1, error=0.05), ALL: row(1, 1)}
    plain, whiskers = (
        plot(judge({**rows, "up_blocks.0.attentions.0": found}, 2, 4, base="x", measure="statistics"))
        for found in (row(0.3, 0.1), row(0.3, 0.1, error=0.05))
    )
    assert plain.size == whiskers.size
    assert plain.tobytes() != whiskers.tobytes()


def test_sheet_has_a_row_per_block_and_a_column_per_swap():
    columns = [[Image.new("RGB", (32, 32), (red, 0, 0)) for red in (10, 20, 30)] for _ in range(2)]
    image = image_sheet(columns, ["P", "a", "Q"], ["dog for cat", "oil for ink"])
    for number, red in enumerate((30, 20, 10)):  # from below, pictures lie 4 pixels apart
        y = image.height - 4 - 192 // 2 - number * 196
        assert image.getpixel((image.width - 100, y)) == image.getpixel((image.width - 300, y)) == (red, 0, 0)
