"""`unziplora batch`: many trainings from a folder or a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unziplora.cli.command import RecipeCommand
from unziplora.cli.options import ExpandedPath, typed_keys
from unziplora.cli.output import emit, note, stdout_to_stderr
from unziplora.config.split import SplitConfig
from unziplora.utils.progress import show

HELP = """Train on many images, one run each, while the base stays loaded.

SOURCE is a folder of images, or a .toml, .csv or .jsonl file whose rows contain `image`, `content`,
`style` and any other key of `unziplora split`, or `method` and the keys of that method. Flags are for
rows that do not set the key.

\b
  unziplora batch photos --content dog --style "oil painting"
  unziplora batch animals.csv --out runs/animals --base bundled

With --engine ray, as many runs are trained at once as there are GPUs, or else cores, on this machine or on a Ray
cluster. All rows are checked before anything starts. The same command continues an interrupted batch: finished
runs are skipped. The folder of --out then contains the runs, report.md and contact-sheet.png. The exit
code is 1 if a run failed.
"""


class BatchCommand(RecipeCommand):
    """The flags of `split` as defaults of all rows."""

    def invoke(self, ctx: click.Context) -> int:
        """Check the rows, then show or train them; return 1 if one failed."""
        from unziplora.jobs.batch import REPORT, default_folder, run_batch
        from unziplora.jobs.remote import pick_engine
        from unziplora.jobs.rows import read_rows

        params, source = ctx.params, ctx.params["source"]
        engine = pick_engine(params["engine"], params["address"])
        keys = {**self.file_keys(ctx), **typed_keys(ctx)}
        out = Path(keys.pop("out", None) or default_folder(source))
        with stdout_to_stderr():
            rows = read_rows(source, out, keys)
        if params["dry_run"]:
            data = {"rows": [row.config.model_dump(mode="json") for row in rows]}
            emit(data, "\n".join(f"{row.place}: {row.config.out}" for row in rows), params["as_json"])
            return 0
        with stdout_to_stderr(), show(params["quiet"]) as progress:
            results = run_batch(rows, out, engine, progress)
        runs = [
            {
                "run": str(result.run.path),
                "result": result.outcome,
                **({"error": result.reason} if result.reason else {}),
            }
            for result in results
        ]
        failed = sum(result.outcome == "failed" for result in results)
        lines = [
            "  ".join([f"{run['result']:<8}", run["run"], *([run["error"]] if "error" in run else [])]) for run in runs
        ]
        emit({"runs": runs, "report": str(out / REPORT)}, "\n".join(lines), params["as_json"])
        if not params["as_json"]:
            note(f"Report: {out / REPORT}")
        return int(failed > 0)


def _unused(*_: Any) -> Any:
    raise AssertionError("a batch has no recipe of its own")


batch_command = BatchCommand(
    "batch",
    SplitConfig,
    _unused,
    _unused,
    help=HELP,
    short_help="Train on many images, from a folder or a table.",
    dry_run="check the rows and train nothing",
    arguments=[click.Argument(["source"], type=ExpandedPath())],
    notes={
        "content": ["for rows without a word of their own"],
        "style": ["for rows without a phrase of their own"],
    },
)
_HELP_OF = {
    "out": "Folder for the runs, the report and the contact sheet.  [default: runs/SOURCE]",
    "dry_run": "Check the rows, list their run folders (with --json all settings), and train nothing.",
}
for _param in batch_command.params:
    if isinstance(_param, click.Option) and _param.name in _HELP_OF:
        _param.help = _HELP_OF[_param.name]
batch_command.params = [
    click.Option(
        ["--engine"],
        type=click.Choice(["local", "ray"]),
        default="local",
        help="local: one run after the other in this process; ray: many at once on a Ray cluster.  [default: local]",
    ),
    click.Option(
        ["--address"],
        metavar="HOST:PORT",
        help="Ray cluster; auto: the one that runs on this machine.  [default: a running one, else this machine alone]",
    ),
    *(param for param in batch_command.params if param.name not in ("images", "masks")),
]
