"""The checker behind every shape and type annotation of the package while tests run (pyproject.toml)."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is said, as typing has it
