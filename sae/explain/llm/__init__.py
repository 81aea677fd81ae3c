"""The one way to a language model: cached, replayable, within a budget, with typed failures."""
