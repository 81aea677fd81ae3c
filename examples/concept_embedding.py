"""A concept embedding head beside a concept bottleneck, on the dot toy (arXiv 2209.09056).

The answer, whether two vectors have a positive product, is no function of the two concepts. A
bottleneck cannot tell it even from the true concepts; embeddings carry what the concepts leave out:
c_i = p_i * positive_i + (1 - p_i) * negative_i, with p_i the probability of concept i.
"""

# %%
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

torch.manual_seed(0)
N_CONCEPTS, WIDTH = 2, 16


def toy(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs v + w and v - w, concepts of v and of w alone, and the sign of their product."""
    v, w = torch.randn(2, n, 2) * 2
    concepts = torch.stack([v.sum(1) > 0, w.sum(1) < 0], 1).float()
    return torch.cat([v + w, v - w], 1), concepts, ((v * w).sum(1) > 0).float()


class ConceptEmbedding(nn.Module):
    """Probability and embedding of each concept, and the answer from the embeddings."""

    def __init__(self, embed: bool) -> None:
        """With `embed` false the head sees the probabilities alone: a bottleneck."""
        super().__init__()
        self.embed = embed
        self.body = nn.Sequential(
            nn.Linear(4, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU()
        )
        self.both = nn.Linear(64, N_CONCEPTS * 2 * WIDTH)
        self.concept = nn.Linear(2 * WIDTH, 1)
        width = N_CONCEPTS * WIDTH if embed else N_CONCEPTS
        self.head = nn.Sequential(nn.Linear(width, 64), nn.LeakyReLU(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> tuple:
        """Logits of the answer and of the concepts; `given` takes the concepts' place."""
        both = self.both(self.body(x)).view(len(x), N_CONCEPTS, 2, WIDTH)
        logits = self.concept(both.flatten(2))[..., 0]
        p = (logits.sigmoid() if given is None else given)[..., None]
        mixed = p * both[:, :, 0] + (1 - p) * both[:, :, 1]
        return self.head((mixed if self.embed else p).flatten(1))[:, 0], logits


# %%
x, concepts, y = toy(4000)
test_x, test_concepts, test_y = toy(2000)
for name, embed in (("bottleneck", False), ("embedding", True)):
    model = ConceptEmbedding(embed)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.randint(len(x), (256,))
        answer, logits = model(x[rows])
        loss = cross_entropy(answer, y[rows]) + cross_entropy(logits, concepts[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        own, given = model(test_x)[0], model(test_x, test_concepts)[0]
    right = [float(((logit > 0) == (test_y > 0)).float().mean()) for logit in (own, given)]
    print(f"{name}: {right[0]:.2f} of the answers recovered, {right[1]:.2f} with true concepts")
