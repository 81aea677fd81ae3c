"""Activations of a model, streamed to Zarr shards and read back as shuffled batches.

Nothing heavy is imported until a name is used: configurations are checked without torch.
"""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

if TYPE_CHECKING:
    from activations_cache.builder import build as build
    from activations_cache.checks import CacheFormatError as CacheFormatError
    from activations_cache.config import CacheConfig as CacheConfig
    from activations_cache.config import ImagePreprocessing as ImagePreprocessing
    from activations_cache.config import ImagesConfig as ImagesConfig
    from activations_cache.config import ImageSource as ImageSource
    from activations_cache.config import ModelConfig as ModelConfig
    from activations_cache.config import TextConfig as TextConfig
    from activations_cache.config import TextSource as TextSource
    from activations_cache.hooks import capture as capture
    from activations_cache.hooks import edit as edit
    from activations_cache.images import read_images as read_images
    from activations_cache.images import read_skipped as read_skipped
    from activations_cache.models import load_model as load_model
    from activations_cache.reader import ActivationCache as ActivationCache
    from activations_cache.reader import open_cache
    from activations_cache.summary import RowDataset as RowDataset
    from activations_cache.summary import as_dataset as as_dataset
    from activations_cache.tokens import Pieces as Pieces

    open = open_cache
    from activations_cache.live import ActivationStream as ActivationStream
    from activations_cache.live import stream as stream
    from activations_cache.vision import load_vision_model as load_vision_model

__getattr__, __dir__ = on_first_use(__name__, __file__)
