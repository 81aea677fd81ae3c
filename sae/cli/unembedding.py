"""What turns a model's stream into logits, for the logit lens."""

from jaxtyping import Float
from torch import Tensor, nn

from sae.steer.directions import FINAL_NORMS


def unembedding(
    model: nn.Module,
) -> tuple[Float[Tensor, "vocab d_model"], Float[Tensor, " d_model"] | None]:
    """Return the output embedding and the weight of the norm before it, float32.

    Raises:
        ValueError: If the model has no output embedding.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"model must have an output embedding, got {type(model).__name__}")
    norms = (getattr(model.base_model, name, None) for name in FINAL_NORMS)
    weight = next((norm.weight.float() for norm in norms if norm is not None), None)
    return head.weight.float(), weight
