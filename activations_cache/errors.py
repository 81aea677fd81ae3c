"""What can go wrong with a cache on disk, each as its own class."""


class CacheFormatError(ValueError):
    """A directory is not a cache, is unfinished, is damaged, or was made from something else."""


class CacheBusyError(RuntimeError):
    """Another live process is writing what this one wants to write."""


class DiskFullError(OSError):
    """There is not enough space; the message names the path, the need and what is free."""


class NonFiniteError(ValueError):
    """The model gives too many rows that are not finite, or that the cache's dtype cannot hold."""
