"""Session of a benchmark in which seed 0 takes no time, and every other seed very long. It imports little."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SlowWorkspace:
    folder: Path
    config: Any = None
    overrides: dict[str, Any] = field(default_factory=dict)
    method_folders: dict[str, Path] = field(default_factory=dict)


@dataclass
class SlowSession:
    workspace: SlowWorkspace

    def evaluate(self, method: str, case: str, seed: int) -> None:
        (self.workspace.folder / f"{case}-{seed}").write_text(str(os.getsid(0)))
        time.sleep(0 if seed == 0 else 600)


def open_slow_session(folder: Path) -> SlowSession:
    return SlowSession(SlowWorkspace(folder))
