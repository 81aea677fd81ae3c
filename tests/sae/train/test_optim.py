import torch

from sae.train import config
from sae.train.optim import LatentAdam


def test_latent_adam_equals_projection_adam_normalisation():
    generator = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(23, 7, generator=generator), dim=1)
    bias = torch.randn(23, generator=generator)
    settings = config.Adam(lr=0.02, beta2=0.99)
    ours = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(bias.clone())]
    optimizer = LatentAdam(ours, settings, ours[0])
    plain = [start.double(), bias.double()]
    m, v = [torch.zeros_like(p) for p in plain], [torch.zeros_like(p) for p in plain]
    for t in range(1, 4):
        for i, (p, q) in enumerate(zip(ours, plain, strict=True)):
            g = torch.randn(p.shape, generator=generator)
            p.grad = g.clone()
            g = g.double()
            if i == 0:
                g = g - (g * q).sum(1, keepdim=True) * q
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.99 * v[i] + 0.01 * g * g
            q -= 0.02 * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.99**t)).sqrt() + 1e-8)
            if i == 0:
                q /= q.norm(dim=1, keepdim=True)
        optimizer.step()
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p.detach().double(), q, rtol=1e-5, atol=1e-6)
