"""How alike two sets of rows of the same examples are, and what the shape of one set is.

Every function takes plain float tensors with one row per example, computes in float64 and stands in
the file that is named after its method: rows of a model's stream, activations of latents or
embeddings of two modalities all will do. `docs/evaluation.md` has formula, source and caution.
"""
