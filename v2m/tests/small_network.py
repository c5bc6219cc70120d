"""The network of ``small.py``: V2M's, two blocks of width 16 on 4 x 4 tokens."""

NETWORK = [
    "model=v2m-lite",
    "model.network.embed_dim=16",
    "model.network.depth=2",
    "model.network.patch_size=2",
    "model.network.mixer.state_dim=2",
]
