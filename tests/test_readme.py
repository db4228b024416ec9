"""The README and the pages in docs/: their commands run, with few steps; their links, quotes and map are right."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from programs import ROOT, own_messages, shell

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
README_BYTES = 9000
INSTALLING = ["python3 -m venv .venv", ". .venv/bin/activate", "pip install -c constraints.txt -e '.[dev]'"]
ELSEWHERE = ["make demo", "make test", "python stage2/compare.py"]  # run below, never, and in test_gan.py
FEW_STEPS = "train.max_steps=2 train.batch_size=32 train.log_every=1 train.eval_images=32 tracking.wandb=disabled"
FEW_DIGITS = "data.source=digits.npz"
FEW_IMAGES = "num_images=20 tracking.wandb=disabled"
VENV = Path(sys.executable).parents[1]


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.S)


def commands(name: str) -> list[str]:
    """The commands of a page, one per line."""
    return [line.partition("  #")[0].strip() for block in blocks(name, "bash") for line in block.splitlines()]


def runnable(name: str) -> list[str]:
    """The commands of a page that no other test runs."""
    on_shared_data = r"configs/stage\d"  # test_configs.py runs these
    return [c for c in commands(name) if c not in [*INSTALLING, *ELSEWHERE] and not re.search(on_shared_data, c)]


class Project:
    """A copy of the project to run commands in, nearly all in this process, because importing torch takes seconds.

    Only the first command with options of `accelerate launch` is launched. The programs without such options are
    launched by `make demo` here, by conftest.py and by test_gan.py.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.launched = False

    def run(self, command: str) -> None:
        """Runs a command with few steps or few images."""
        if "evaluate.py" in command and "--compare" not in command:
            command += f" {FEW_IMAGES}" + (" num_reference=60" if "stage2" in command else "")
        if "plan.py" in command:
            command += " gpus=1 gpu_memory=80 tflops=400"  # this machine would be timed
        if re.search(r"train(_gan)?\.py", command) and "--help" not in command:
            command += f" {FEW_STEPS}" + (f" {FEW_DIGITS}" if "stage1/" in command and "data." not in command else "")
        if command.startswith("accelerate launch --") and not self.launched:
            self.launched = True
            shell(command.replace("--num_processes 8", "--num_processes 2"), self.folder)
        else:
            words = shlex.split(command)
            self.run_here(words[[word.endswith(".py") for word in words].index(True) :])

    def run_here(self, words: list[str]) -> None:
        """Runs a program's file in this process with these arguments."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", words)
            AcceleratorState._reset_state(reset_partial_state=True)  # a new process would start without state
            code = 0
            try:
                with own_messages():
                    runpy.run_path(str(self.folder / words[0]), run_name="__main__")
            except SystemExit as stop:
                code = stop.code
        assert not code, shlex.join(words)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the project with a folder of photos, and with few digits for commands that read all of their data."""
    folder = tmp_path_factory.mktemp("readme") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "tests", ".*_cache"))
    rng = np.random.default_rng(0)
    for i in range(60):
        photo = folder / "photos" / ("cats" if i % 2 else "dogs") / f"{i}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(photo)
    with np.load(folder / "vqgen/data/embedded/digits.npz") as digits:
        few = {name: array[: 300 if name.startswith("train") else 60] for name, array in digits.items()}
    np.savez(folder / "digits.npz", **few)
    return folder


@pytest.fixture(scope="module")
def project(copy) -> Project:
    """The copy after the README's commands; the other pages use the runs that these made."""
    project = Project(copy)
    for command in runnable("README.md"):
        project.run(command)
    return project


def test_make_demo_leaves_its_runs_and_its_picture(copy):
    make = f"make --assume-old={VENV}/installed demo VENV={VENV}"
    printed = shell(f"{make} STAGE1='{FEW_STEPS}' STAGE2='{FEW_STEPS}' SAMPLE=num_images=20", copy)
    assert "runs/demo/grid.png" in printed
    assert Image.open(copy / "runs/demo/grid.png").size[0] > 320
    for stage in ("stage1", "stage2"):
        assert (copy / "runs/demo" / stage / "model").is_dir()


def test_the_commands_of_the_readme_run(project):
    for run, number in {"runs/stage2/samples": 64, "runs/first/threes": 64, "runs/photos/stage2/samples": 64}.items():
        assert len(np.load(project.folder / run / "samples.npz")["images"]) == number
    assert len(commands("README.md")) >= 15


@pytest.mark.parametrize("name", [name for name in NAMES[1:] if runnable(name)])
def test_the_commands_of_a_page_run(project, name):
    for command in runnable(name):
        project.run(command)


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_the_python_of_a_page_runs(project, name, monkeypatch):
    monkeypatch.chdir(project.folder)
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec"), {})


def test_what_the_readme_installs_is_what_make_installs():
    assert commands("README.md")[2:5] == INSTALLING
    assert "--constraint constraints.txt --editable '.[dev]'" in (ROOT / "Makefile").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_every_link_to_a_file_leads_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    assert name == "README.md" or "../README.md" in links
    for link in links:
        if not link.startswith("https://"):
            file, _, section = link.partition("#")
            target = ROOT / name if not file else (ROOT / name).parent / file
            assert target.is_file(), link
            assert not section or section in sections(target), link


def sections(page: Path) -> list[str]:
    """The headings of a page, in the form of GitHub's links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_readme_links_to_every_page():
    assert {name for name in NAMES[1:] if f"({name})" not in (ROOT / "README.md").read_text()} == set()


def test_the_code_beside_an_equation_is_in_the_code():
    quoted = re.findall(r"\| `(.+)` \| `(.+)` \|\n", (ROOT / "docs/from-gan-to-vqvae.md").read_text())
    assert len(quoted) >= 12
    for code, file in quoted:
        assert code in (ROOT / file).read_text(), code


def test_the_loop_in_the_design_is_the_loop_of_stage_2():
    (quoted,) = [block for block in blocks("docs/design.md", "text") if "run.steps()" in block]
    program = [line.strip() for line in (ROOT / "stage2/train.py").read_text().splitlines()]
    assert {line.strip() for line in quoted.splitlines()} - {"..."} - set(program) == set()


def test_the_map_of_the_code_names_every_module_and_no_other():
    folder, mapped = "", set()
    for line in blocks("docs/design.md", "text")[0].splitlines():
        words = line.split()
        folder = words.pop(0) if words[0].endswith("/") else folder
        mapped.add(folder + words[0])
    modules = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("vqgen/**/*.py"), *ROOT.glob("stage?/*.py")]}
    assert mapped - modules == set()
    assert {path for path in modules - mapped if not path.endswith("/__init__.py")} == set()
