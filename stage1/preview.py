"""Say and show what a source of images holds, as training would read it.

python stage1/preview.py [CONFIG.yaml] data.source=PATH [data.*=... out=DIR]
"""

import sys
from pathlib import Path
from shlex import quote

from vqgen.cli.program import run_program
from vqgen.cli.sections import STAGE1_SECTIONS
from vqgen.data.contact_sheet import contact_sheet
from vqgen.data.describe import describe
from vqgen.data.images import load_images
from vqgen.data.stream import ImageStream
from vqgen.errors import InputError, require, section
from vqgen.settings import PreviewConfig


def main(config: PreviewConfig) -> None:
    out, source = Path(config.out), Path(config.data.source)
    inside = source.is_dir() and out.resolve().is_relative_to(source.resolve())
    require(not inside, f"out={out} lies in data.source={source}, and would add an image to it; name another: out=")
    config.data.channels = config.data.channels or config.model.get("channels")
    with section("data"):
        train_set, held_out = load_images(config.data)
    found = describe(train_set, held_out, config.train.batch_size)
    print(*found.lines(), sep="\n")
    shown = train_set.sample if isinstance(train_set, ImageStream) else train_set
    picture, notes = contact_sheet(shown, found)
    try:
        out.mkdir(parents=True, exist_ok=True)
        picture.save(out / "preview.png")
        (out / "preview.json").write_text(found.as_json(), "utf-8")
    except OSError as error:
        raise InputError(f"out={out} cannot be written ({error.strerror}); name another folder") from error
    print(*notes, f"as the model will see them: {out / 'preview.png'}; the numbers: {out / 'preview.json'}", sep="\n")
    given = [quote(argument) for argument in sys.argv[1:] if not argument.removeprefix("--").startswith("out=")]
    print(f"next: accelerate launch stage1/train.py {' '.join(given)}".rstrip())


if __name__ == "__main__":
    run_program(
        main, PreviewConfig, STAGE1_SECTIONS, "python stage1/preview.py [CONFIG.yaml] data.source=PATH [key=value ...]"
    )
