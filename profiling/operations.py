"""Number of operations that a training step dispatches.

On a GPU it decides the time, because Python takes longer per operation than the card.

    python profiling/operations.py                     # the bundled base's size, in bf16, on the CPU

Views are not counted: they compute nothing. The steps are those of `step.py`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from step import KINDS, make
from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Counts what is dispatched inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        view = any(value.alias_info and not value.alias_info.is_write for value in function._schema.returns)
        if not view and name != "aten::_unsafe_view":
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def count(kind: str, options: argparse.Namespace) -> Counter[str]:
    """The operations of one step, after two others."""
    step = make(kind, options)
    step(0)
    step(1)
    with Counting() as counting:
        step(2)
    return counting.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=("floor", "split", "dreambooth", "blora"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--names", action="store_true", help="also say which operations a kind adds to the first")
    options = parser.parse_args()
    size = {"size": "small", "device": "cpu", "batch": 1, "rank": 16, "checkpointing": False, "latent_side": 16}
    vars(options).update(size)
    found = {kind: count(kind, options) for kind in options.kinds}
    first = found[options.kinds[0]]
    print("| | operations | more than the first |\n|---|---|---|")
    for kind, names in found.items():
        print(f"| {kind} | {names.total()} | {names.total() - first.total()} |")
        if options.names:
            print(", ".join(f"{name} {number}" for name, number in (names - first).most_common(12)))


if __name__ == "__main__":
    main()
