"""Every command in the README runs, from a copy of the project, on few steps."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import ROOT, shell

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
INSTALLING = ["python3 -m venv .venv", ". .venv/bin/activate", "pip install -c constraints.txt -e '.[dev]'"]
ON_SHARED_DATA = [c for c in COMMANDS if re.search(r"configs/stage\d", c)]  # test_configs.py runs these
COMPARING = ["python stage2/compare.py"]  # and test_gan.py this
FEW_STEPS = "train.max_steps=4 train.log_every=2 train.eval_images=32 tracking.wandb=disabled"
FEW_IMAGES = "num_images=40 tracking.wandb=disabled"
VENV = Path(sys.executable).parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project, with a folder of photos."""
    copy = tmp_path_factory.mktemp("readme") / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "tests", ".*_cache"))
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = copy / "photos" / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return copy


def test_make_demo_leaves_its_runs_and_its_picture(project):
    make = f"make --assume-old={VENV}/installed demo VENV={VENV}"
    printed = shell(f"{make} STAGE1='{FEW_STEPS}' STAGE2='{FEW_STEPS}' SAMPLE=num_images=20", project)
    assert "runs/demo/grid.png" in printed
    assert Image.open(project / "runs/demo/grid.png").size[0] > 320
    for stage in ("stage1", "stage2"):
        assert (project / "runs/demo" / stage / "model").is_dir()


def test_every_other_command_runs(project):
    left = [c for c in COMMANDS if c not in [*INSTALLING, *ON_SHARED_DATA, *COMPARING, "make demo", "make test"]]
    assert len(left) >= 10
    launched: set[str] = set()
    for command in left:
        plain = command.removeprefix("accelerate launch ")
        if plain.split()[0] in launched:  # once is enough for the launcher, which takes a third of the time
            command = f"python {plain}"
        elif plain.startswith("stage"):
            launched.add(plain.split()[0])
        few = FEW_STEPS if re.search(r"train(_gan)?\.py", command) and "--help" not in command else ""
        few = FEW_IMAGES if "evaluate.py" in command and "--compare" not in command else few
        few += " num_reference=60" if few == FEW_IMAGES and "stage2" in command else ""
        shell(f"{command} {few}".replace("--num_processes 8", "--num_processes 2"), project)
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        (project / "example.py").write_text(block)
        shell("python example.py", project)


def test_what_the_readme_installs_is_what_make_installs():
    assert "-c constraints.txt -e '.[dev]'" in COMMANDS[COMMANDS.index(". .venv/bin/activate") + 1]
    assert "--constraint constraints.txt --editable '.[dev]'" in (ROOT / "Makefile").read_text()


def test_the_code_beside_an_equation_is_in_the_code():
    section = README[README.index("## From GANs to VQ-VAEs") :].partition("\n## ")[0]
    quoted = re.findall(r"\| `(.+)` \| `(.+)` \|\n", section)
    assert len(quoted) >= 12
    for code, file in quoted:
        assert code in (ROOT / file).read_text(), code


def test_the_map_of_the_code_names_every_module():
    layout = README[README.index("## How the code is laid out") :]
    for path in [*ROOT.glob("vqgen/**/*.py"), *ROOT.glob("stage?/*.py")]:
        assert path.name == "__init__.py" or path.name in layout, path
