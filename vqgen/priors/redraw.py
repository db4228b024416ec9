"""Codes as a prior would have written them, of which a decoder learns to make the image all the same."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqgen.codes import CodeLayout
from vqgen.errors import InputError, require
from vqgen.tokenizers.vqmodel import PARTS, VQModel, load_tokenizer

if TYPE_CHECKING:
    from vqgen.priors.prior import Prior


def prior_of(run: Path, tokenizer: VQModel, layout: CodeLayout, class_names: list[str]) -> "Prior":
    """The frozen prior of a stage-2 run, if its codes are those of this tokenizer.

    Args:
        run: the stage-2 run; the option `stage2` in messages.
        tokenizer: the tokenizer whose decoder learns.
        layout: layout of its codes at the size of the images.
        class_names: the classes of the images, in the order of their ids.

    Raises:
        InputError: there is no prior, or it is for other codes, other sizes or other classes.
    """
    from vqgen.priors.prior import Prior  # imported here, because it imports transformers, which takes seconds

    try:
        prior, own = Prior.from_pretrained(run).requires_grad_(False), load_tokenizer(run)[0]
    except InputError as error:
        raise InputError(f"stage2={run}: {error}") from error
    names = [name for part in ("encoder", "quantizer") for name in PARTS[part]]
    mine, theirs = (
        {key: value for key, value in model.state_dict().items() if key.partition(".")[0] in names}
        for model in (tokenizer, own)
    )
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key].to(mine[key])) for key in mine)
    require(
        same, f"stage2={run}: its prior is for the codes of another tokenizer than init_from; give that as init_from"
    )
    require(
        prior.layout.shapes == layout.shapes,
        f"stage2={run}: its prior writes maps of {prior.layout.shapes}, not {layout.shapes}; use its data.image_size",
    )
    known = prior.class_names == list(class_names)
    require(known, f"stage2={run}: its prior has other classes than the images; use the data that it was trained on")
    return prior


@torch.no_grad()
def redraw_codes(prior: "Prior", tokenizer: VQModel, x: Tensor, class_ids: Tensor, *, keep: float) -> Tensor:
    """Codes (B, Q, *S) of images x (B, C, H, W) in which a share is drawn from the prior, given the true codes before.

    RobusTok (Qiu et al. 2025, post_train_data.py) draws the codes one after the other, so that errors add up, keeps
    each with the probability `keep`, and encodes the decoded images again. This draws all at once, in one pass of the
    prior, which is cheap enough for every step, and decodes just these codes.
    """
    tokens = prior.layout.flatten(tokenizer.encode(x))  # (B, N)
    logits = prior(tokens, class_ids).float()
    drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)  # the Gumbel-max trick
    kept = torch.rand(tokens.shape, device=tokens.device) < keep
    return prior.layout.unflatten(torch.where(kept, tokens, drawn))[0]
