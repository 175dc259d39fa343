"""``python -m stable_diffusion`` is the command ``minisd``."""

from stable_diffusion.cli import main

main()
