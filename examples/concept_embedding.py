"""A concept embedding head beside a concept bottleneck, on two toys of arXiv 2209.09056.

The answer (dot: whether two vectors have a positive product; trigonometry: whether three numbers
sum to more than 1) is no function of the concepts, which are signs. A bottleneck cannot tell it
even from the true concepts; embeddings carry what the concepts leave out:
c_i = p_i * positive_i + (1 - p_i) * negative_i, with p_i the probability of concept i.
"""

# %%
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

torch.manual_seed(0)
WIDTH = 16


def dot(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs v + w and v - w, concepts of v and of w alone, and the sign of their product."""
    v, w = torch.randn(2, n, 2) * 2
    concepts = torch.stack([v.sum(1) > 0, w.sum(1) < 0], 1).float()
    return torch.cat([v + w, v - w], 1), concepts, ((v * w).sum(1) > 0).float()


def trigonometry(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Waves of three numbers and their square sum, the signs, and whether they sum to above 1."""
    h = torch.randn(n, 3) * 2
    x = torch.cat([h.sin() + h, h.cos() + h, h.square().sum(1, keepdim=True)], 1)
    return x, (h > 0).float(), (h.sum(1) > 1).float()


class ConceptEmbedding(nn.Module):
    """Probability and embedding of each concept, and the answer from the embeddings."""

    def __init__(self, d_in: int, n_concepts: int, embed: bool) -> None:
        """With `embed` false the head sees the probabilities alone: a bottleneck."""
        super().__init__()
        self.embed, self.n_concepts = embed, n_concepts
        self.body = nn.Sequential(
            nn.Linear(d_in, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU()
        )
        self.both = nn.Linear(64, n_concepts * 2 * WIDTH)
        self.concept = nn.Linear(2 * WIDTH, 1)
        width = n_concepts * WIDTH if embed else n_concepts
        self.head = nn.Sequential(nn.Linear(width, 64), nn.LeakyReLU(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> tuple:
        """Logits of the answer and of the concepts; `given` takes the concepts' place."""
        both = self.both(self.body(x)).view(len(x), self.n_concepts, 2, WIDTH)
        logits = self.concept(both.flatten(2))[..., 0]
        p = (logits.sigmoid() if given is None else given)[..., None]
        mixed = p * both[:, :, 0] + (1 - p) * both[:, :, 1]
        return self.head((mixed if self.embed else p).flatten(1))[:, 0], logits


# %%
for toy in (dot, trigonometry):
    x, concepts, y = toy(4000)
    test_x, test_concepts, test_y = toy(2000)
    for name, embed in (("bottleneck", False), ("embedding", True)):
        model = ConceptEmbedding(x.shape[1], concepts.shape[1], embed)
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
        print(
            f"{toy.__name__}, {name}: {right[0]:.2f} of the answers recovered, "
            f"{right[1]:.2f} with true concepts"
        )
