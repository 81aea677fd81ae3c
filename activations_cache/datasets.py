"""Records of a dataset of the `datasets` library: from the hub as a stream, or from a directory.

A stream that breaks is opened again where it stopped, so faults of the network change no record.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from activations_cache.config import TextSource
from activations_cache.config_images import ImageSource
from activations_cache.loading import one_line
from activations_cache.locations import DATASET

ATTEMPTS = 5
"""How often a stream is opened without a new record before it is given up."""
PAUSE_S = 1.0
"""Before the second attempt; doubled after each."""


Source = TextSource | ImageSource

_log = logging.getLogger(__name__)


def dataset_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a dataset in their order.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it cannot be opened or lacks the split, or the stream breaks for good.
    """
    n_done, failures = 0, 0
    while True:
        try:
            for record in _open(source, streaming=True, start=n_done):
                yield record
                n_done, failures = n_done + 1, 0
        except (OSError, EOFError) as error:  # the network's errors, and aiohttp's, are OSErrors
            failures += 1
            _wait(source, n_done, failures, error)
        else:
            return


def dataset_table(source: Source) -> Any:
    """Return a dataset whose records can be read in any order; from the hub it is fetched whole.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it cannot be fetched or lacks the split.
    """
    failures = 0
    while True:
        try:
            return _open(source, streaming=False)
        except FileNotFoundError:
            raise
        except (OSError, EOFError) as error:
            failures += 1
            _wait(source, 0, failures, error)


def _wait(source: Source, n_done: int, failures: int, error: Exception) -> None:
    """Pause before the next attempt, or give up."""
    if failures >= ATTEMPTS:
        raise ValueError(
            f"{source.path} must be readable, got {one_line(error)} at record {n_done}, "
            f"{ATTEMPTS} times; check the name and the network, then run the same command again"
        ) from error
    pause = PAUSE_S * 2 ** (failures - 1)
    _log.warning("%s broke at record %d, again in %.0f s", source.path, n_done, pause)
    time.sleep(pause)


def _open(source: Source, *, streaming: bool, start: int = 0) -> Any:
    """Return the records from number `start` on."""
    import datasets  # takes seconds
    from datasets.exceptions import DatasetNotFoundError

    name = source.path.removeprefix(DATASET)
    try:
        if _is_saved(Path(name)):
            found = datasets.load_from_disk(name)
            records = found[source.part] if isinstance(found, dict) else found
        else:
            records = datasets.load_dataset(
                name,
                source.subset,
                split=source.part,
                streaming=streaming and not Path(name).is_dir(),
            )
    except DatasetNotFoundError as error:
        raise ValueError(f"{source.path} must be a dataset, got {one_line(error)}") from error
    except KeyError as error:
        raise ValueError(f"{source.path} must have the part {source.part!r}, got none") from error
    except ValueError as error:  # an unknown part or subset; the library lists those there are
        raise ValueError(
            f"{source.path} must have part {source.part!r} of subset {source.subset!r}, "
            f"got {one_line(error)}"
        ) from error
    return records.skip(start) if start else records


def _is_saved(path: Path) -> bool:
    """Say whether `save_to_disk` wrote this directory."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
