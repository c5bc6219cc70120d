"""V2M's network with its four corners joined once, in front of the blocks, as the authors' framework figure draws it.

framework.png of github.com/wangck20/V2M joins four grids, one for each corner, behind the patch embedding
("Concatenation", its result B x H x W x D), and the K blocks after it show one row pass and one column pass. The
release joins the corners anew in every block, which is what ``v2m.mixer`` has. The figure does not say what is
concatenated, so both readings are here: images, or channels brought back to their number by a linear map.
"""

import torch
from torch import Tensor, nn

from shared.errors import UserError
from v2m.mixer import require_choice
from v2m.vim import Vim

JOINS = ("images", "channels")
TURNS = range(4)  # quarter turns that bring each corner to the top left


class JoinedVim(Vim):
    """``Vim`` whose tokens are joined with their three turned copies in front of the blocks; the grid is a square.

    join: "images": the copies are images of their own in every block, turned back and averaged behind the last norm;
    "channels": they are stacked along the channels and mapped linearly from 4 E to E, and one image passes the blocks.
    The other arguments are those of ``Vim``. Raises UserError for an unknown choice, class tokens, a mixer that has
    corners of its own, and grids that are not square.
    """

    def __init__(self, *, join: str, **arguments):
        require_choice("join", join, JOINS)
        super().__init__(**arguments)
        if self.class_token != "mean" or getattr(self.layers[0].mixer, "corners", None) != 1:
            raise UserError(
                "corners joined in front of the blocks leave one to each block and no place for class tokens: set "
                "class_token mean and, of V2M's mixer, corners 1"
            )
        self.join = join
        width = self.num_features
        self.corner_proj = nn.Linear(len(TURNS) * width, width, bias=False) if join == "channels" else None

    def encode(self, tokens: Tensor) -> Tensor:
        """Return tokens with their positions, (B, H, W, E), after the blocks, every token at its place."""
        if tokens.shape[1] != tokens.shape[2]:
            raise UserError(
                f"corners joined in front of the blocks take square grids only, got {tokens.shape[1]} x "
                f"{tokens.shape[2]}: choose square images, or v2m.vim.Vim"
            )
        turned = [tokens.rot90(turn, (1, 2)) for turn in TURNS]
        if self.join == "channels":
            return super().encode(self.corner_proj(torch.cat(turned, -1)))
        copies = super().encode(torch.cat(turned)).chunk(len(TURNS))
        return sum(copy.rot90(-turn, (1, 2)) for copy, turn in zip(copies, TURNS, strict=True)) / len(TURNS)
