"""Configuration: a YAML file becomes a frozen dataclass, or one line says what is wrong with it."""

from sae.config.loading import digest, dump, from_dict, load, load_overrides, to_dict
from sae.config.schema import ConfigError, Key, describe

__all__ = [
    "ConfigError",
    "Key",
    "describe",
    "digest",
    "dump",
    "from_dict",
    "load",
    "load_overrides",
    "to_dict",
]
