"""Addresses of the example's views, and the headings that they show."""

VIEWS = {
    "#overview": "An example",
    "#d0/table": "Latents of topk",
    "#d0/latent/12": "forest, window",
    "#d2/latent/12": "forest, window",
    "#d2/pictures": "Pictures of pictures",
    "#c0": "topk beside topk (small)",
    "#c0/pair/12": "forest, window",
}
