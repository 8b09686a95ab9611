"""Look of the studio: theme, style sheet, and small pieces of HTML. Every text from outside is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from unziplora.utils.text import printable

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1180px !important; width: 100%; min-width: 0; margin: 0 auto !important; }
.gradio-container .wrap, .gradio-container main, .gradio-container .main { min-width: 0; max-width: 100%; }
.gradio-container .fillable { padding-left: 1rem !important; padding-right: 1rem !important; }
.gradio-container main { padding: 1rem; }
.dark { --color-accent: #2dd4bf; }
.tab-container button.selected { color: var(--color-accent) !important; font-weight: 600; }
.title h1 { font-size: 1.35rem; margin: 0; }
.title p { margin: .1rem 0 0; color: var(--body-text-color-subdued); }
.gradio-container .html-container { padding: 0; }
.gradio-container h2 { font-size: 1.15rem; margin: .6rem 0 0; }
.hint { margin: 0; color: var(--body-text-color-subdued); }
.keys .form { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
.keys .form { background: var(--block-background-fill) !important; }
.empty { padding: 1.6rem 1rem; text-align: center; color: var(--body-text-color-subdued);
  border: 1px dashed var(--border-color-primary); border-radius: var(--radius-lg); }
h3.step { font-size: 1rem; margin: 0; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .25rem .9rem; margin: 0; }
.facts dt { color: var(--body-text-color-subdued); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(116px, 1fr)); gap: .6rem; margin: .6rem 0; }
.figures div { border: 1px solid var(--border-color-primary); border-radius: var(--radius-md); padding: .45rem .6rem; }
.figures b { display: block; font-size: 1.05rem; font-variant-numeric: tabular-nums; }
.figures span { font-size: .8rem; color: var(--body-text-color-subdued); }
.run h3 { font-size: 1rem; margin: .8rem 0 .2rem; }
.run h2 { font-size: 1.1rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
.run progress { width: 100%; height: .5rem; appearance: none; border: 0; border-radius: 99px; overflow: hidden; }
.run progress, .run progress::-webkit-progress-bar { background: var(--border-color-primary); }
.run progress::-webkit-progress-value { background: var(--color-accent); }
.run progress::-moz-progress-bar { background: var(--color-accent); }
.run svg { width: 100%; height: 110px; display: block; }
.run svg .line { fill: none; stroke: var(--color-accent); stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.run svg .axis { stroke: var(--border-color-primary); vector-effect: non-scaling-stroke; }
.state { display: inline-block; padding: .05rem .55rem; border-radius: 99px; font-size: .85rem;
  border: 1px solid currentColor; }
.state.running { color: #0f766e; } .state.failed { color: #b91c1c; } .state.finished { color: #3f6212; }
.dark .state.running { color: #5eead4; } .dark .state.failed { color: #fca5a5; }
.dark .state.finished { color: #bef264; }
.fault { border-left: 3px solid #b91c1c; padding: .2rem .8rem; margin: .6rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.remark { border-left: 3px solid #b45309; padding: .1rem .8rem; margin: 0 0 .6rem; }
#lost { position: sticky; top: 0; z-index: 99; padding: .6rem 1rem; background: #b91c1c; color: white; }
pre.log { max-height: 16rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
.gradio-container .grid-wrap { min-height: 0 !important; height: auto !important; max-height: none !important; }
.gradio-container .wrap-inner input { text-overflow: ellipsis; padding-right: 1.8rem; }
.gradio-container .wrap-inner .secondary-wrap { min-width: 0; }
.sheets .thumbnail-lg, .sheets .thumbnail-item { aspect-ratio: 2.2 !important; }
.caption-label { white-space: normal !important; }
#runs .grid-wrap, #pictures .grid-wrap, .sheets .grid-wrap { padding-top: 2.3rem !important; }
#runs .thumbnail-lg { aspect-ratio: auto !important; height: auto !important; }
#runs .thumbnail-lg img { aspect-ratio: 1; height: auto !important; }
#runs .caption-label { position: static; display: block; max-width: none; border: 0; text-align: left; }
.gradio-container button.label-wrap { text-align: left; }
.gradio-container .bar { align-items: center; } .gradio-container .bar > button { flex: 0 1 auto; }
#learned { flex: 1 1 220px; } #forecast { flex: 2 1 300px; min-width: min(100%, 300px) !important; }
#inspection pre.log { max-height: 32rem; }
table.jobs { width: 100%; border-collapse: collapse; }
table.jobs th, table.jobs td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid
  var(--border-color-primary); overflow-wrap: anywhere; }
.downloads a { display: inline-block; margin: .15rem .6rem .15rem 0; color: var(--link-text-color); }
button:focus-visible, a:focus-visible, [role=tab]:focus-visible { outline: 2px solid var(--color-accent);
  outline-offset: 2px; }
@media (max-width: 480px) {
  .gradio-container .fillable, .gradio-container main { padding: .4rem !important; }
  .sheets .grid-container { grid-template-columns: 1fr !important; }
  #runs .grid-container, #pictures .grid-container { grid-template-columns: 1fr 1fr !important; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""


def theme() -> Any:
    """Return the theme: calm colors, and the fonts of the system, so that none is fetched."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="teal", neutral_hue="stone", font=_FONT, font_mono=_MONO, radius_size="md", spacing_size="md"
    ).set(
        body_background_fill="*neutral_50",
        color_accent="*primary_700",
        color_accent_soft_dark="*primary_900",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def text(value: object) -> str:
    """Return a text for HTML: escaped, and without characters that change how the rest is shown."""
    return escape(printable(str(value)))


def empty(what: str, action: str) -> str:
    """Return the placeholder of an empty place: what will be here, and what to do for it."""
    return f'<div class="empty"><strong>{text(what)}</strong><br>{text(action)}</div>'


def hint(words: str) -> str:
    """Return a remark in a quiet color."""
    return f'<p class="hint">{text(words)}</p>'


def remarks(sentences: Iterable[str]) -> str:
    """Return sentences that ask for attention, though nothing failed."""
    return "".join(f'<p class="remark">{text(sentence)}</p>' for sentence in sentences)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return names and values as a list of definitions."""
    return '<dl class="facts">' + "".join(f"<dt>{text(a)}</dt><dd>{text(b)}</dd>" for a, b in pairs) + "</dl>"


def figures(pairs: Iterable[tuple[str, str]]) -> str:
    """Return figures as tiles, those that are known."""
    tiles = (f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for name, value in pairs if value)
    return f'<div class="figures">{"".join(tiles)}</div>'


def state_mark(state: str) -> str:
    """Return a state as a colored word."""
    return f'<span class="state {text(state)}">{text(state)}</span>'


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="jobs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def curve(values: Sequence[float], label: str) -> str:
    """Draw values as a line over their number; averaged where there are more than 200."""
    if len(values) < 2:
        return ""
    size = -(-len(values) // 200)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    points = " ".join(
        f"{100 * i / max(1, len(means) - 1):.2f},{28 - 26 * (mean - low) / span:.2f}" for i, mean in enumerate(means)
    )
    about = f"{label}: from {means[0]:.4f} to {means[-1]:.4f}, lowest {low:.4f}"
    return (
        f'<svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label="{text(about)}">'
        f'<line class="axis" x1="0" y1="29.5" x2="100" y2="29.5"/><polyline class="line" points="{points}"/></svg>'
    )
