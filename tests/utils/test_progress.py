"""Views of a running job, in a terminal and elsewhere."""

import io
import time

import pytest

from unziplora.utils.progress import Lines, Progress, Rich, View, counted, describe, duration, show, size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 50, "1048576.0 GiB")],
)
def test_sizes_have_the_largest_unit_up_to_gib(count: int, text: str) -> None:
    assert size(count) == text


def test_report_contains_step_loss_speed_time_left_and_memory() -> None:
    assert describe(Progress(5, 20, 0.25, 2.0, 3 << 30)) == "step 5/20  loss 0.2500  2.00 s/step  30 s left  3.0 GiB"
    assert describe(Progress(5, 20)) == "step 5/20"


def test_lines_are_few_and_include_the_last_step() -> None:
    stream = io.StringIO()
    with Lines(stream, seconds=1000) as view:
        view(Progress(0, 100, message="loading"))
        for step in range(1, 101):
            view(Progress(step, 100, 0.5))
        view(Progress(100, 100, message="wrote a.safetensors"))
    assert stream.getvalue().splitlines() == [
        "loading",
        "step 1/100  loss 0.5000",
        "step 100/100  loss 0.5000",
        "wrote a.safetensors",
    ]


def test_lines_of_several_jobs_begin_with_their_names() -> None:
    stream = io.StringIO()
    with Lines(stream, seconds=1000) as view:
        for step in (1, 2):
            view(Progress(step, 9, 0.5, job="cat"))
            view(Progress(step, 9, 0.25, job="fox"))
        view(Progress(1, 1, message="finished, 1 of 2", job="cat"))
    assert stream.getvalue().splitlines() == [
        "cat  step 1/9  loss 0.5000",
        "fox  step 1/9  loss 0.2500",
        "cat: finished, 1 of 2",
    ]


def test_terminal_has_a_bar_for_each_job_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with Rich(Terminal()) as view:
        for job in ("cat", "fox"):
            view(Progress(1, 9, 0.5, job=job))
        assert [task.description for task in view.bar.tasks] == ["cat", "fox"]
        view(Progress(1, 1, message="finished, 1 of 2", job="cat"))
        assert [task.description for task in view.bar.tasks] == ["fox"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_of_a_terminal_keeps_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with show(stream=stream) as view:
        assert isinstance(view, Rich)
        view(Progress(0, 2, message="[not markup]"))
        view(Progress(2, 2, 0.125, 1.0))
        view(Progress(2, 2, message="wrote a.safetensors"))
    assert "[not markup]" in stream.getvalue()
    assert "loss 0.1250" in stream.getvalue().split("wrote a.safetensors")[-1]


def test_view_is_silent_if_quiet_and_lines_in_pipes() -> None:
    assert type(show(quiet=True)) is View
    assert isinstance(show(stream=io.StringIO()), Lines)


def test_speed_of_counted_steps_starts_anew_with_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 104.0, 200.0, 203.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    events: list[Progress] = []
    report = counted(events.append)
    for done in (0, 2, 0, 3):
        report(done, 4)
    assert [(event.step, event.seconds_per_step) for event in events] == [(0, 0.0), (2, 2.0), (0, 0.0), (3, 1.0)]
