"""Networks of integers as folders of C: see ``export_c``."""

from jadder.integer.c.export import export_c

__all__ = ["export_c"]
