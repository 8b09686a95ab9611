"""Runs on disks that are too small: the message says so, and with more room they end like any other."""

from __future__ import annotations

import ctypes
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

from reliability.campaign import Failure
from reliability.kills import Kills
from reliability.workshop import Workshop, check_equal, pick, recover, use_cache
from unziplora.errors import MachineError
from unziplora.runs.folder import RunFolder

LARGE = 256 << 20
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # of unshare(2)
REMOUNT, PRIVATE_BELOW = 32, (1 << 18) | 16384  # of mount(2)


class Fills:
    """Short runs of every method that fill a disk of a few kilobytes to megabytes, then continue on a larger one.

    The disk is a tmpfs in a mount namespace of its own, which needs no rights where users may make namespaces.
    Elsewhere the size of each file is limited.
    """

    name = "fills"
    seconds = 60.0

    def __init__(self, shop: Workshop, kills: Kills) -> None:
        self.shop, self.references = shop, kills.references
        uninterrupted = shop.folder / "uninterrupted"
        self.sizes = {
            method: sum(file.stat().st_size for file in (uninterrupted / method).rglob("*") if file.is_file())
            for method in self.references
        }

    def run(self, number: int, draw: random.Random, folder: Path) -> list[str]:
        """Fill a disk, enlarge it, and recover the run."""
        method = pick(draw)
        disk = folder / "disk"
        disk.mkdir()
        enlarge, sort = small_disk(disk, draw.randrange(4096, 3 * self.sizes[method.name]))
        use_cache(disk / "cache")
        config = self.shop.config(method, disk / "run")
        counts = []
        try:
            self.shop.train(method, config)
        except MachineError as error:
            if "disk is full" not in str(error):
                raise Failure("fault", f"a message without the full disk: {error}") from None
            counts.append(f"disks filled ({sort})")
        enlarge()
        how = recover(self.shop, method, config)
        check_equal(RunFolder(config.out), self.references[method.name])
        return [*counts, f"{method.name}: {how}"]


def small_disk(folder: Path, size: int) -> tuple[Callable[[], None], str]:
    """Limit what this process can write into a folder; return a function that lifts the limit, and the sort."""
    try:
        mount_tmpfs(folder, size)
    except OSError:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 3, most))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)), "limit per file"
    return lambda: mount(folder, REMOUNT, f"size={LARGE}"), "tmpfs"


def mount_tmpfs(folder: Path, size: int) -> None:
    """Mount a tmpfs that only this process and its children see.

    Raises:
        OSError: it is not permitted here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS | (NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text, encoding="ascii")
    mount(Path("/"), PRIVATE_BELOW, "")
    mount(folder, 0, f"size={size}")


def mount(folder: Path, flags: int, options: str) -> None:
    """Call mount(2) for a tmpfs.

    Raises:
        OSError: it fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), "mount", str(folder))
