"""Campaign of kills, damaged inputs, flipped bits and full disks: `python -m reliability --help`."""
