"""One streaming pass over a cache: windows of every latent, stratified, with verified negatives."""
