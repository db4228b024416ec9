"""Convert another project's VQGAN to a model of vqgen, or a model of vqgen to another project's.

python stage1/convert.py CHECKPOINT OUT --from taming|llamagen|diffusers
python stage1/convert.py RUN_DIR OUT --to diffusers
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from safetensors import SafetensorError
from safetensors.torch import save_file

from vqgen.cli.program import run_program
from vqgen.errors import InputError, require, require_choice
from vqgen.settings import ConvertConfig
from vqgen.tokenizers.files import DIFFUSERS_FILES
from vqgen.tokenizers.interop import FAMILIES, from_checkpoint, to_diffusers
from vqgen.tokenizers.vqmodel import load_tokenizer
from vqgen.training.files import written_whole
from vqgen.training.schedule import num_parameters

SYNOPSIS = "python stage1/convert.py CHECKPOINT OUT --from taming|llamagen|diffusers, or RUN_DIR OUT --to diffusers"
CARD = """---
library_name: vqgen
---

# An image tokenizer, converted from {name} of {project}

{notes}

```python
from vqgen import VQModel
tokenizer = VQModel.from_pretrained(".")  # the path of this folder
```
"""


def main(checkpoint: str, out: str, config: ConvertConfig) -> None:
    require((config.from_ is None) != (config.to is None), f"give one of --from and --to; usage: {SYNOPSIS}")
    if config.from_ is not None:
        require_choice("from", config.from_, FAMILIES, "project")
    else:
        require_choice("to", config.to, ("diffusers",), "project")
    source, target = Path(checkpoint), Path(out)
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(free, f"{out} exists already; name a new folder, or an empty one")
    if config.from_ is None:
        tokenizer = load_tokenizer(source)[0]
        try:
            settings, weights = to_diffusers(tokenizer)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        with written(target) as folder:
            (folder / "config.json").write_text(json.dumps(settings, indent=2), "utf-8")
            save_file(weights, folder / DIFFUSERS_FILES[0], {"format": "pt"})
        print(f"{out}: for diffusers, VQModel.from_pretrained({out!r})")
        return
    model, notes = from_checkpoint(source, config.from_)
    print(*notes, sep="\n")
    with written(target) as folder:
        model.save_pretrained(folder)
        listed = "\n".join(f"- {note}" for note in notes)
        card = CARD.format(name=source.name, project=FAMILIES[config.from_].project, notes=listed)
        (folder / "README.md").write_text(card, "utf-8")
    print(f"{out}: a tokenizer of {num_parameters(model) / 1e6:.2f} M parameters")
    images = f"data.source=PATH data.image_size={16 * model.stride}"
    print(f"next: python stage1/evaluate.py {quote(out)} {images}")
    print(f"or: accelerate launch stage2/train.py stage1={quote(out)} {images}")


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes the target once it is whole.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with written_whole(target.resolve()) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target} cannot be written ({reason}); name another folder") from error


if __name__ == "__main__":
    run_program(main, ConvertConfig, {}, SYNOPSIS, paths=("CHECKPOINT", "OUT"))
