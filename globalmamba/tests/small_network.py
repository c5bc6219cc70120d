"""The network of ``small.py``: GlobalMamba's, two blocks of width 16 on 1 + 4 + 16 tokens."""

NETWORK = [
    "model=globalmamba-lite",
    "model.network.embed_dim=16",
    "model.network.depth=2",
    "model.network.state_dim=2",
    "model.tokens.patch_size=2",
    "model.tokens.levels=3",
]
