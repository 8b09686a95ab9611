"""Split one picture into a content LoRA and a style LoRA for SDXL, in files that every tool loads.

    from unziplora.config.split import SplitConfig
    from unziplora.methods.unziplora.split import split

    run = split(SplitConfig(images=["cat.jpg"], content="cat", style="pencil sketch", out="runs/cat"))
    print(run.content, run.style)

Nothing is imported here: torch and diffusers take seconds, and `unziplora --help` needs neither.
"""

from importlib.metadata import version

__version__ = version("unziplora")
