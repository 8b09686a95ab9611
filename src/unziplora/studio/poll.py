"""The page's look at the run folders: a script asks for a stamp, and refreshes the views when the stamp has changed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from unziplora.jobs.state import find_runs
from unziplora.studio import actions, live
from unziplora.studio.workers import Workers
from unziplora.utils.files import absolute

ADDRESS = "/studio/stamp"
BUTTON = "follow"
"""Id of the hidden button that refreshes the views."""

MARK = "stamp"
"""Id of the hidden text with the stamp of the folders that the views show."""

CROPPED = "cropped"
"""Id of the hidden button that shows a cropped picture again. Gradio reports no event for a crop, and forgets that of a
picture which the server gave, unless it is undone and redone."""

LOST = "The studio does not answer. Runs go on without it. Start it again, and this page goes on."

SCRIPT = f"""<script>
(() => {{
  const ask = async () => {{
    try {{
      const answer = await fetch("{ADDRESS[1:]}", {{ cache: "no-store", signal: AbortSignal.timeout(20000) }});
      return answer.ok ? await answer.text() : null;
    }} catch {{ return null; }}
  }};
  const warn = lost => {{
    const note = document.getElementById("lost");
    if (!lost) note?.remove();
    else if (!note) document.body.insertAdjacentHTML("afterbegin", '<div id="lost" role="alert">{LOST}</div>');
  }};
  let asked = 0, before = null;
  const look = async () => {{
    const button = document.getElementById("{BUTTON}");
    if (button && !document.hidden) {{
      const stamp = await ask();
      warn(stamp === null);
      const mark = document.getElementById("{MARK}")?.textContent.trim();
      // A refresh that is not answered is repeated: it may have been lost with the server.
      if (stamp !== null && stamp !== mark && (mark !== before || Date.now() - asked > 10000)) {{
        [asked, before] = [Date.now(), mark];
        button.click();
      }}
    }}
    setTimeout(look, button ? 2000 : 300);
  }};
  look();
  const pause = time => new Promise(done => setTimeout(done, time));
  addEventListener("click", async click => {{
    const confirm = click.target.closest?.('#picture button[style*="green"]');
    if (!confirm) return;
    while (confirm.isConnected) await pause(50);
    for (const arrow of document.querySelectorAll("#picture button:has(svg.feather-rotate-ccw)")) {{
      arrow.click();  // undo, then redo
      await pause(150);
    }}
    await pause(300);
    document.getElementById("{CROPPED}")?.click();
  }}, true);
  for (const event of ["dragover", "drop"]) addEventListener(event, dropped => dropped.preventDefault());
}})();
</script>"""
"""Asks while the page can be seen. A view that Gradio's timer refreshes costs a request each. The last line keeps a
picture that is dropped beside its place from being opened instead of the page."""


def stamp(runs: Path, workers: Workers, folders: Sequence[str] = ()) -> str:
    """Return a text that changes whenever a view of the page does.

    Args:
        folders: in the runs folder, whose files are shown too.
    """
    jobs, parts = actions.jobs(runs), [f"{time.time() // 60} {workers.present()}"]  # ages are shown in minutes
    parts += [f"{job.number} {job.request}" for job in jobs.values()]
    for one in find_runs(runs):
        state = actions.state(one.run, jobs.get(absolute(one.run.path)))
        parts.append(f"{live.signature(one, state)} {sorted(one.run.loras)}")
    parts += sorted(file.name for folder in folders for file in (runs / folder).glob("*"))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
