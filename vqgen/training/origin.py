"""The weights that a run without a checkpoint starts from, if `init_from` names some.

A run starts from its own newest checkpoint, else from `init_from`, else from scratch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vqgen.errors import InputError, require
from vqgen.quantizers.codebook import CodebookQuantizer
from vqgen.training.checkpoints import STATE, damage, load_state, newest_checkpoint, with_tensors

NAMED = 5  # new classes that the line on the screen names
WHAT = "give a run, its model/ or one of its checkpoints/step_*; stage1/convert.py converts other projects' checkpoints"


class Origin:
    """A trained model, and what else its checkpoint holds, as the start of a new run.

    Its weights are those that evaluations use: a run's `model/`, which is the average in its newest checkpoint, or the
    average in the checkpoint that the user names.

    Args:
        path: the setting `init_from`: a run, a model's own folder, or a checkpoint inside its run.
        load: returns the model in a run's folder, or in a model's own folder.

    Attributes:
        model: the model.
        kept: what the run takes from here, in words.
        fresh: what starts anew, in words.

    Raises:
        InputError: there is no such model, or it does not load.
    """

    def __init__(self, path: str, load: Callable[[Path], Any]):
        self.path, folder = path, Path(path)
        require(folder.is_dir(), f"init_from={path}: is not a folder; {WHAT}")
        is_checkpoint = (folder / STATE).is_file()
        fault = damage(folder) if is_checkpoint else None
        require(fault is None, f"init_from={path}: is damaged ({fault}); give another checkpoint")
        run = folder.absolute().parents[1] if is_checkpoint else folder
        try:
            self.model = load(run)
        except InputError as error:
            in_run = (
                "; a checkpoint must stay in its run, beside model/, which has the options" if is_checkpoint else ""
            )
            raise InputError(f"init_from={path}: {error}{in_run}") from error
        self.state = self._of_checkpoint(folder if is_checkpoint else self._newest(run), named=is_checkpoint)
        self.kept = ["its averaged weights" if self.state else "its weights"]
        self.fresh = ["optimizer", "schedule"]

    def _newest(self, run: Path) -> Path | None:
        try:
            return newest_checkpoint(run)
        except InputError as error:
            remedy = f"give {self.path}/model"
            raise InputError(f"init_from={self.path}: all its checkpoints are damaged; {remedy}") from error

    def _of_checkpoint(self, checkpoint: Path | None, *, named: bool) -> dict[str, Any]:
        """Loads a checkpoint's average into the model, and returns its state; {} if it is of another model."""
        if checkpoint is None:
            return {}
        state = load_state(checkpoint)
        if state.get("ema", {}).keys() != self.model.state_dict().keys():  # of a prior, where its tokenizer is taken
            remedy = "give one of a run of the same program"
            require(not named, f"init_from={self.path}: is a checkpoint of another kind of model; {remedy}")
            return {}
        needed = {key: x for key, x in state.items() if not isinstance(x, dict) or key in ("ema", "disc", "lecam")}
        state = with_tensors(checkpoint, needed)
        self.model.load_state_dict(state["ema"])
        return state

    def __str__(self) -> str:
        """What the run starts from, what it keeps and what is new, in one line."""
        return f"{self.path}{self.at}: keeps {', '.join(self.kept)}; new: {', '.join(self.fresh)}"

    @property
    def at(self) -> str:
        """The step of the checkpoint, in words; empty if it is not known."""
        return f", step {self.state['step']}" if self.state else ""

    def check(self, key: str, given: Mapping[str, Any], own: Mapping[str, Any], free: Collection[str] = ()) -> None:
        """Checks that the options given for a new run are those of the model here.

        Args:
            key: the options' section, as in `model`.
            given: the given options.
            own: the options of the model here.
            free: options that may differ, because they only say how the model learns.

        Raises:
            InputError: some differ; the message names all of them.
        """
        differ = [f"{option}={value}, but it has {its}" for option, value, its in differing(key, given, own, free)]
        remedy = "leave these out, or train from scratch"
        require(not differ, f"init_from={self.path}: another model than asked for: {'; '.join(differ)}; {remedy}")

    def fill(self, model: nn.Module) -> None:
        """Copies the weights into a model with the same options; its codebook then counts as trained: no k-means."""
        model.load_state_dict(self.model.state_dict())
        codebooks = [module for module in model.modules() if isinstance(module, CodebookQuantizer)]
        for codebook in codebooks:
            codebook.adopt()
        self.kept += ["its codebook"] if codebooks else []

    def fill_by_class(
        self,
        model: nn.Module,
        tables: Collection[str],
        shared: Sequence[tuple[int, int]],
        first: int,
        own: Sequence[str],
    ) -> None:
        """Copies the weights into a model whose classes may be others; classes of the same name keep their rows.

        Args:
            model: the model.
            tables: names of its tensors that have a row for each class.
            shared: (row, row here) of what is no class.
            first: row of the first class.
            own: the model's classes.
        """
        rows = [*shared, *class_rows(own, self.model.class_names, first)]
        model.load_state_dict(by_rows(self.model.state_dict(), model.state_dict(), tables, rows))
        theirs = set(self.model.class_names)
        new = [name for name in own if name not in theirs]
        if set(own) == theirs:
            return
        self.kept.append(f"{len(theirs & set(own))} of its {len(theirs)} classes by name")
        if new:
            others = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
            self.fresh.append(f"the class{'es' * (len(new) > 1)} {', '.join(new[:NAMED])}{others}")

    def fill_part(
        self, name: str, part: nn.Module, what: str, tables: Collection[str] = (), rows: Sequence[tuple[int, int]] = ()
    ) -> bool:
        """Loads another part of the checkpoint, if there is one and it fits; returns whether it does.

        Args:
            name: the part's name in the checkpoint.
            part: the part.
            what: the part in words.
            tables: names of its tensors that have a row for each class.
            rows: (row, row here) of the rows that they have in common.
        """
        theirs, own = self.state.get(name), part.state_dict()
        shapes = {key: x.shape[1:] if key in tables else x.shape for key, x in own.items()}
        if theirs is None:
            self.fresh.append(f"{what} (there is none)")
            return False
        if shapes != {key: x.shape[1:] if key in tables else x.shape for key, x in theirs.items()}:
            self.fresh.append(f"{what} (there is one of another shape)")
            return False
        part.load_state_dict(by_rows(theirs, own, tables, rows))
        self.kept.append(what)
        return True


def differing(
    key: str, given: Mapping[str, Any], own: Mapping[str, Any], free: Collection[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, given value, own value) of each given option that differs; those in `free` may.

    If the name of a constructor differs, it stands for all options of its section.
    """
    if "name" in given and given["name"] != own.get("name"):
        yield f"{key}.name", given["name"], own.get("name")
        return
    for option, value in given.items():
        its = own.get(option)
        if isinstance(its, Mapping):
            yield from differing(f"{key}.{option}", value or {}, its, free)
        elif value != its and option not in free:
            yield f"{key}.{option}", value, its


def merged(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options, with the given ones in place of its own, in all their sections."""
    both = {**own, **given}
    inside = {key: x for key, x in own.items() if isinstance(x, Mapping)}
    return {**both, **{key: merged(x, given.get(key) or {}) for key, x in inside.items()}}


def class_rows(own: Sequence[str], theirs: Sequence[str], first: int = 0) -> list[tuple[int, int]]:
    """(row, row there) of each class that both have, in tables whose first class has the row `first`."""
    place = {name: i for i, name in enumerate(theirs)}
    return [(first + i, first + place[name]) for i, name in enumerate(own) if name in place]


def by_rows(
    theirs: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    tables: Collection[str],
    rows: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    """Another model's state; of its tables only the rows (row, row there), and this model's own for the rest."""
    state = dict(theirs)
    for name in tables:
        to, of = (list(column) for column in zip(*rows, strict=True))
        state[name] = own[name].clone()
        state[name][to] = theirs[name][of].to(own[name])
    return state
