"""Which latents fire on a text that is pasted into the browser."""

import torch

from activations_cache.hooks import capture
from sae.browser.server import Reading
from sae.cli.chain import Run

MAX_TOKENS = 512
PER_TOKEN = 16


class PromptReader:
    """Reads texts with a run's model and dictionaries, which are loaded for the first text."""

    def __init__(self, run: Run) -> None:
        """Take the run; nothing is loaded yet."""
        self._run = run

    @torch.no_grad()
    def __call__(self, name: str, text: str) -> Reading:
        """The strongest latents of each token.

        Raises:
            ValueError: If the text has too many tokens, or none.
        """
        run, dictionary = self._run, self._run.dictionaries[name]
        text = text.encode(errors="replace").decode()  # a tokenizer takes no lone surrogate
        ids = torch.tensor([run.loaded.tokenizer(text)["input_ids"]])
        n = ids.shape[1]
        if not 0 < n <= MAX_TOKENS:
            raise ValueError(f"text must have 1 to {MAX_TOKENS} tokens, got {n}; shorten it")
        points, _ = dictionary.config.sites(run.hook_point)
        with capture(run.loaded.model, list(points)) as forward:
            found = forward(ids)
        latents = dictionary.encode(torch.cat([found[point][0].float() for point in points], dim=1))
        skipped = min(run.config.cache.skip_positions, n)
        values, order = latents.values.sort(dim=1, descending=True)
        numbers = latents.indices.gather(1, order)
        fires = [
            tuple((j, v) for j, v in zip(row, known, strict=True) if v > 0)[:PER_TOKEN]
            for row, known in zip(numbers.tolist(), values.tolist(), strict=True)
        ]
        fires[:skipped] = [()] * skipped
        strings = tuple(run.token_strings[token] for token in ids[0].tolist())
        return Reading(strings, tuple(fires), skipped)
