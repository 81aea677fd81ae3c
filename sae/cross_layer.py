"""A cross-layer transcoder: one autoencoder per source layer, whose outputs add up."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from monosema.checks import MonosemaError
from sae.autoencoder import Latents, SparseAutoencoder


class CrossLayerTranscoder(nn.Module):
    """x_hat of place l is the sum of what all sources up to l decode for it.

    Source s reads one hook point and predicts the places s, s + 1, ... up to the last, side by
    side (Lindsey et al. 2025, Circuit Tracing).
    """

    def __init__(self, sources: Sequence[SparseAutoencoder]) -> None:
        """Take the sources in the order of their layers.

        Raises:
            ValueError: If there is none, or they do not predict the places from their own on, each
                in the same width and scale.
        """
        super().__init__()
        if not sources:
            raise MonosemaError("sources must be at least one, got none")
        places = [_places(source) for source in sources]
        for layer, result in enumerate(places):
            if result != places[0][layer:]:
                raise MonosemaError(
                    f"source {layer} must predict the places {places[0][layer:]} "
                    f"(hook point, width, scale), got {result}"
                )
        if len(places[0]) != len(sources):
            n = len(places[0])
            raise MonosemaError(f"sources must be one for each of {n} places, got {len(sources)}")
        self.sources = nn.ModuleList(sources)
        self.widths = [width for _, width, _ in places[0]]

    @property
    def autoencoders(self) -> list[SparseAutoencoder]:
        """The sources in the order of their layers."""
        return [source for source in self.sources if isinstance(source, SparseAutoencoder)]

    def encode(self, x: Sequence[Float[Tensor, "batch _"]]) -> list[Latents]:
        """The latents of each source, from the rows that each reads."""
        return [source.encode(rows) for source, rows in zip(self.autoencoders, x, strict=True)]

    def forward(self, x: Sequence[Float[Tensor, "batch _"]]) -> list[Float[Tensor, "batch _"]]:
        """The rows of every place, in the model's units."""
        return self.total([source(rows) for source, rows in zip(self.autoencoders, x, strict=True)])

    def total(self, outputs: Sequence[Float[Tensor, "batch _"]]) -> list[Float[Tensor, "batch _"]]:
        """Add up, place by place, what the sources give."""
        parts = [out.split(self.widths[layer:], dim=1) for layer, out in enumerate(outputs)]
        totals = []
        for place in range(len(self.widths)):
            x_hat = parts[0][place]
            for source in range(1, place + 1):
                x_hat = x_hat + parts[source][place - source]
            totals.append(x_hat)
        return totals


def _places(source: SparseAutoencoder) -> list[tuple[str, int, float]]:
    """Each place's hook point, width and scale."""
    config = source.config
    return [(p.hook_point, p.width, p.scale * config.scale_out) for p in config.slices_out]
