"""How rows are stored, by name: `mixkv.registry.FORMATS`. A file adds its format; it is imported here."""

# ruff: noqa: F401, I001 (a format adds itself when it is imported, in the order of tables)
from . import full
from . import int8
from . import int4
