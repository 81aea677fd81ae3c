"""A hyperdimensional probe: what a stream holds, read as one vector of bound pairs.

Concepts are random vectors of +1 and -1. A role is bound to its filler by their product, which
undoes itself; several pairs are bundled by their sum. A small net learns from rows of a stream to
the bundle, and questions ("what fills this role?") are answered by unbinding and looking in the
codebook. After the Hyperdimensional Probe of Bronzini et al. 2025, which sums clusters of layers
before the net. Unlike a sparse autoencoder it is supervised: it finds the roles that it was taught
and no others.
"""

# %%
import torch
from torch import nn

torch.manual_seed(0)
WIDTH, N_FILLERS, D_MODEL = 1024, 12, 64
ROLES = ("colour", "shape", "place")


def codebook(n: int) -> torch.Tensor:
    """Random vectors of +1 and -1: nearly orthogonal, the more so the wider."""
    return torch.randint(2, (n, WIDTH)) * 2.0 - 1


def bind(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pair two vectors; the same again takes the pair apart, as 1 * 1 and -1 * -1 are 1."""
    return a * b


def nearest(vectors: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """The entry of the codebook with the largest product."""
    return (vectors @ book.T).argmax(dim=-1)


# %% The algebra, before anything is learned.
roles, fillers = codebook(len(ROLES)), codebook(N_FILLERS)
assert torch.equal(bind(bind(roles[0], fillers[3]), roles[0]), fillers[3])
for n in (3, 30, 300):
    keys, said = codebook(n), torch.randint(N_FILLERS, (n,))
    bundle = bind(keys, fillers[said]).sum(dim=0)
    recall = float((nearest(bind(bundle, keys), fillers) == said).float().mean())
    print(f"{n} pairs in {WIDTH} dimensions: {recall:.0%} recalled")

# %% A stream that holds three roles at once, each filler of each role a direction of its own.
directions = torch.randn(len(ROLES), N_FILLERS, D_MODEL)


def stream(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and what fills each role."""
    said = torch.randint(N_FILLERS, (n, len(ROLES)))
    rows = sum(directions[role, said[:, role]] for role in range(len(ROLES)))
    return rows + 0.5 * torch.randn(n, D_MODEL), said


# %%
probe = nn.Sequential(nn.Linear(D_MODEL, 256), nn.ReLU(), nn.Linear(256, WIDTH), nn.Tanh())
adam = torch.optim.Adam(probe.parameters(), lr=2e-3)
for _ in range(300):
    x, said = stream(256)
    target = bind(roles, fillers[said]).sum(dim=1).sign()  # of three there is no tie
    loss = (probe(x) - target).square().mean()
    adam.zero_grad()
    loss.backward()
    adam.step()

# %%
x, said = stream(2000)
with torch.no_grad():
    answers = nearest(bind(probe(x)[:, None], roles), fillers)
for role, name in enumerate(ROLES):
    right = float((answers[:, role] == said[:, role]).float().mean())
    print(f"{name}: {right:.2f} recovered, chance {1 / N_FILLERS:.2f}")
