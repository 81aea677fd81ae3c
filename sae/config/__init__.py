"""Configuration: a YAML file becomes a frozen dataclass, or one line says what is wrong with it."""

from sae.config.loading import digest, dump, from_dict, load, load_overrides, to_dict
from sae.config.recipes import config_file, is_config, recipes
from sae.config.schema import ConfigError, Key, describe

__all__ = [
    "ConfigError",
    "Key",
    "config_file",
    "describe",
    "digest",
    "dump",
    "from_dict",
    "is_config",
    "load",
    "load_overrides",
    "recipes",
    "to_dict",
]
