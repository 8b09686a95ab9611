"""`unziplora blocks`: find the blocks of a base that decide content, and those that decide style."""

from __future__ import annotations

from unziplora.cli.command import Output, Plan, RecipeCommand
from unziplora.config.probe import ProbeConfig
from unziplora.utils.progress import Callback, counted


def _run(config: ProbeConfig, progress: Callback) -> Output:
    from unziplora.probe.probe import find_blocks
    from unziplora.probe.scores import format_findings

    findings = find_blocks(config, progress=counted(progress))
    lines = [format_findings(findings), "", *(f"{name:<9} {path}" for name, path in findings.files.items())]
    return Output(findings.model_dump(mode="json"), "\n".join(lines))


def _plan(config: ProbeConfig) -> Plan:
    """List the words of every pair; no weights of the base are read."""
    from unziplora.models.sizes import inspect_base

    inspect_base(config.base)
    pairs = config.word_pairs()
    lines = [f"{one.content} ({one.other_content} instead), {one.style} ({one.other_style} instead)" for one in pairs]
    return Plan(config, {"pairs": [pair._asdict() for pair in pairs]}, ["Pairs", *lines])


blocks_command = RecipeCommand(
    "blocks",
    ProbeConfig,
    _run,
    _plan,
    help="""Find the blocks of a base that decide content and style, for `unziplora split --blocks`.

    One block at a time sees a prompt with another content word, or another style phrase. The score of a block
    is how far the image follows it (B-LoRA's probe). Writes a block map, the figures, a plot and images.

    \b
      unziplora blocks --base models/my-xl --out blocks
      unziplora split cat.jpg --content cat --style "pencil sketch" --base models/my-xl --blocks blocks/blocks.toml

    Generates (1 + 2 · (blocks + 2)) · pairs · seeds images: 27 · pairs · seeds for SDXL, which has 11 blocks.
    """,
    short_help="Find the blocks of a base that decide content and style.",
    dry_run="list the pairs of words; generate nothing",
)
