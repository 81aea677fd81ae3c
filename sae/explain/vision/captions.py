"""Windows of paired texts: an image latent is explained by the captions of its images."""

from collections.abc import Sequence

from sae.explain.windows import LatentWindows, Window


def caption_windows(latent: LatentWindows, captions: Sequence[str]) -> LatentWindows:
    """The latent with each image replaced by its caption or report, and all of it marked.

    This is the idea of SAE-Rad (Abdulaal et al. 2024, arXiv 2410.03334): explainers and the
    detection scorer then work on images as they do on text. The activation of a caption is the
    image's peak.

    Args:
        latent: Windows that are whole images.
        captions: One text per example of the cache.
    """

    def captioned(window: Window) -> Window:
        return Window(
            window.example, 0, (captions[window.example],), (window.peak,), window.source,
            window.bucket, window.inclusion,
        )  # fmt: skip

    explain, score = (tuple(map(captioned, part)) for part in (latent.explain, latent.score))
    return LatentWindows(latent.latent, latent.max_activation, latent.density, explain, score)
