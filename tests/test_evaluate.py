"""The two evaluations on tiny runs: their reports, the refusal of unlike comparisons, and bad input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import launch_two, shell

from vqgen.data.images import load_images
from vqgen.data.order import mixed_seed
from vqgen.errors import InputError
from vqgen.evaluation.features import EfficientNetLite0, collect_features
from vqgen.evaluation.metrics import frechet_distance, psnr
from vqgen.evaluation.report import Report, compare
from vqgen.settings import DataConfig
from vqgen.tokenizers.vqmodel import from_uint8, load_tokenizer, to_uint8

FEW = ["num_images=60", "num_reference=80", "tracking.wandb=disabled"]  # of stage 2; [::2] of stage 1
NETWORK = {"features": "efficientnet-lite0", "preprocessing": "bicubic with antialiasing to 96x96, (x - 127) / 128"}


def evaluated(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def values(folder: Path) -> dict[str, float]:
    return {name: figure["value"] for name, figure in evaluated(folder)["figures"].items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return f"cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def digits():
    return load_images(DataConfig())


@pytest.fixture(scope="module")
def evaluations(runs, cache, tmp_path_factory) -> Path:
    """A folder with stage1/ and stage2/, the evaluations of `runs` by one process."""
    folder = tmp_path_factory.mktemp("evaluations")
    for stage in ("stage1", "stage2"):
        few = FEW[::2] if stage == "stage1" else FEW
        shell(f"python {stage}/evaluate.py {runs}/{stage} {' '.join(few)} {cache} out={folder}/{stage}")
    return folder


def test_a_tokenizers_figures_are_those_of_its_held_out_images(evaluations, runs, digits):
    report = evaluated(evaluations / "stage1")
    assert list(report["figures"]) == [
        *("psnr", "psnr_per_image", "ssim", "perceptual", "rFD-EffLite0", "rKD-EffLite0"),
        *("pFD-EffLite0", "pKD-EffLite0"),
        *("usage", "perplexity", "code_entropy"),
    ]
    model, checkpoint = load_tokenizer(runs / "stage1")
    assert report["subject"]["checkpoint"] == checkpoint
    _, held_out = digits
    rows = np.sort(np.random.default_rng(0).choice(len(held_out), 60, replace=False))
    x, class_ids = held_out.__getitems__(rows)
    with torch.no_grad():
        codes = model.encode(from_uint8(x))
        x_rec = to_uint8(model.decode(codes))
    expected = psnr((from_uint8(x) - from_uint8(x_rec)).square().mean()).item()
    found = values(evaluations / "stage1")
    assert found["psnr"] == pytest.approx(expected, rel=1e-5)
    assert found["usage"] == pytest.approx(len(codes[0].unique()) / 64)
    assert found["code_entropy"] == pytest.approx(math.log2(found["perplexity"]), rel=1e-5)
    assert found["psnr_per_image"] > found["psnr"]
    classes = report["classes"]
    assert {name: figures["images"] for name, figures in classes.items()} == {
        str(i): int((class_ids == i).sum()) for i in range(10)
    }
    weighted = sum(figures["images"] * figures["ssim"] for figures in classes.values()) / 60
    assert weighted == pytest.approx(found["ssim"])
    picture = Image.open(evaluations / "stage1/extremes.png")
    assert picture.width > 10 * 32
    assert picture.height > 4 * 32


class Decoded:
    """Images with the part of ImageSet's interface that features are taken by."""

    def __init__(self, x: torch.Tensor, class_ids: torch.Tensor):
        self.x, self.class_ids = x, class_ids

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[rows], self.class_ids[rows]


def test_pfd_is_the_distance_of_images_from_perturbed_codes(evaluations, runs, digits):
    """The neighbours by distances written out here, from the draws of each image's own seed."""
    model, _ = load_tokenizer(runs / "stage1")
    rows = np.sort(np.random.default_rng(0).choice(len(digits[1]), 60, replace=False))
    x, class_ids = digits[1].__getitems__(rows)
    codes = model.encode(from_uint8(x))[0]  # (60, 1, H, W)
    shape = codes.shape[1:]
    order = torch.cdist(model.quantizer.codebook, model.quantizer.codebook).argsort(dim=1, stable=True)
    perturbed = codes.clone()
    for i, row in enumerate(rows):
        source = torch.Generator().manual_seed(mixed_seed(0, int(row)))
        chosen = torch.rand(shape, generator=source) < 0.5
        rank = torch.randint(1, 3 + 1, shape, generator=source)  # of 64 codes, 5 % are 3
        perturbed[i] = torch.where(chosen, order[codes[i], rank], codes[i])
    assert 0.35 < (perturbed != codes).float().mean() < 0.65
    x_rec, x_near = (to_uint8(model.decode([part])) for part in (codes, perturbed))
    assert psnr((from_uint8(x) - from_uint8(x_near)).square().mean()) < psnr(
        (from_uint8(x) - from_uint8(x_rec)).square().mean()
    )
    network, every = EfficientNetLite0(), np.arange(60)
    reference, reconstructed, near = (
        collect_features(Decoded(part, class_ids), every, network, 128, "") for part in (x, x_rec, x_near)
    )
    figures = evaluated(evaluations / "stage1")["figures"]
    for kind, features in (("r", reconstructed), ("p", near)):
        found = figures[f"{kind}FD-EffLite0"]
        assert found["value"] == pytest.approx(frechet_distance(features, reference), rel=1e-4)
        assert found["floor"] == figures["rFD-EffLite0"]["floor"]
        replacing = {"codes_replaced": 0.5, "among_nearest": 0.05} if kind == "p" else {}
        assert found["protocol"].items() >= replacing.items()
        assert ("codes_replaced" in found["protocol"]) == (kind == "p")
    assert figures["pFD-EffLite0"]["value"] != pytest.approx(figures["rFD-EffLite0"]["value"], rel=1e-3)


def test_pfd_of_no_perturbed_code_is_rfd(runs, program, cache, tmp_path, evaluations):
    options = ["perturbed=0", FEW[0], "perceptual=none", cache, "tracking.wandb=disabled", f"out={tmp_path}"]
    code, _, errors = program("stage1/evaluate.py", runs / "stage1", *options)
    assert code == 0, errors
    found = values(tmp_path)
    assert found["pFD-EffLite0"] == found["rFD-EffLite0"]
    assert found["pKD-EffLite0"] == found["rKD-EffLite0"]
    with pytest.raises(InputError, match=r"for pFD-EffLite0, codes_replaced is 0\.0 in one and 0\.5 in the other"):
        compare(tmp_path, evaluations / "stage1")


def test_a_tokenizer_whose_codes_have_no_neighbours_has_no_pfd(program, cache, tmp_path):
    settings = ["train.max_steps=1", "model.quantizer.codebook_size=1", "tracking.wandb=disabled"]
    code, _, errors = program("stage1/train.py", "configs/debug/stage1.yaml", f"run_dir={tmp_path}", *settings)
    assert code == 0, errors
    options = ["num_images=20", "perceptual=none", cache, "tracking.wandb=disabled"]
    code, printed, errors = program("stage1/evaluate.py", tmp_path, *options)
    assert code == 0, errors
    assert "warning: no pFD-EffLite0: neighbours are for 2 to 262144 codes, not 1" in printed
    assert not any(name.startswith("p") and "D-" in name for name in values(tmp_path / "evaluation"))


def test_every_figure_says_how_it_was_made(evaluations, digits):
    train, held_out = digits
    crop = {"image_size": 32, "channels": 1, "resize": "crop", "background": "white"}
    for stage, reference in (("stage1", held_out), ("stage2", train)):
        report = evaluated(evaluations / stage)
        for name, figure in report["figures"].items():
            assert figure["protocol"].items() >= crop.items(), name
            assert math.isfinite(figure["value"])
        figure = next(figure for name, figure in report["figures"].items() if "FD-" in name)
        assert figure["protocol"].items() >= {**NETWORK, "reference": reference.fingerprint, "images": 60}.items()
        assert figure["protocol"]["checksum"].startswith("57934424")
        assert figure["biased"]  # 60 images, 1280 features
        assert figure["floor_images"] == 60
        assert report["versions"].keys() >= {"vqgen", "torch", "torchmetrics"}
    subject = evaluated(evaluations / "stage2")["subject"]
    assert subject.items() >= {"seed": 0, "cfg_scale": 1.5, "top_p": 0.95, "temperature": 1.0, "top_k": 0}.items()
    assert len(subject["checkpoint"]) == len(subject["tokenizer"]) == 64


def test_a_priors_figures_hang_together(evaluations, runs):
    found = values(evaluations / "stage2")
    assert list(found) == [
        *("FD-EffLite0", "KD-EffLite0", "confidence-EffLite0", "precision", "recall", "density", "coverage"),
        *("recognised", "nll_held_out", "nll_train", "unigram_entropy", "bigram_entropy", "code_bits_per_dim"),
        *("bound_bits_per_dim", "closer_in_pixels", "closer_in_features", "near_copies"),
    ]
    assert found["nll_held_out"] < found["unigram_entropy"]
    assert found["code_bits_per_dim"] == pytest.approx(found["nll_held_out"] / math.log(2) * 16 / 32**2)
    assert found["code_bits_per_dim"] < found["bound_bits_per_dim"] < 8  # 8 bits would need no model
    trained = [json.loads(line) for line in (runs / "stage2/metrics.jsonl").read_text().splitlines()][-1]
    assert found["nll_held_out"] == pytest.approx(trained["val/nll"], abs=0.1)  # measured on 128 other images
    assert not evaluated(evaluations / "stage2")["warnings"]
    assert Image.open(evaluations / "stage2/closest.png").width > 10 * 32


@pytest.fixture(scope="module")
def searches(runs, cache, tmp_path_factory) -> dict[int, tuple[Path, str]]:
    """Evaluations whose search for copies is bounded, or off, and what they printed."""
    found = {}
    for search in (0, 90):
        out = tmp_path_factory.mktemp(f"search{search}")
        options = f"{' '.join(FEW)} {cache} search={search} out={out}"
        found[search] = out, shell(f"python stage2/evaluate.py {runs}/stage2 {options}")
    return found


def test_the_search_for_copies_is_among_all_training_images_or_as_many_as_it_says(evaluations, searches, digits):
    whole = evaluated(evaluations / "stage2")["figures"]
    count = whole["near_copies"]["protocol"]["searched"]
    assert count == len(digits[0])
    out, printed = searches[90]
    assert f"search=90: copies are searched among 90 of the {count:,} training images" in printed
    figures = evaluated(out)["figures"]
    assert figures["closer_in_pixels"]["protocol"]["searched"] == 90
    assert figures.keys() == whole.keys()
    assert figures["closer_in_features"] == whole["closer_in_features"]
    with pytest.raises(InputError, match=rf"for closer_in_pixels, searched is 90 in one and {count} in the other"):
        compare(out, evaluations / "stage2")


def test_without_the_search_for_copies_its_figures_and_its_row_are_left_out(evaluations, searches):
    out, printed = searches[0]
    assert "search=0: no figures of copies in pixels" in printed
    whole, figures = (evaluated(folder)["figures"] for folder in (evaluations / "stage2", out))
    assert whole.keys() - figures.keys() == {"closer_in_pixels", "near_copies"}
    assert figures == {name: whole[name] for name in figures}
    three, two = (Image.open(folder / "closest.png").height for folder in (evaluations / "stage2", out))
    assert two == pytest.approx(three * 2 / 3, abs=4)
    assert "near_copies               only in B" in compare(out, evaluations / "stage2")


def test_bf16_computes_the_prior_and_says_so_where_it_does(evaluations, runs, program, cache, tmp_path):
    code, _, errors = program("stage2/evaluate.py", runs / "stage2", *FEW, "precision=bf16", cache, f"out={tmp_path}")
    assert code == 0, errors
    whole, figures = (evaluated(folder)["figures"] for folder in (evaluations / "stage2", tmp_path))
    by_prior = {"nll_held_out", "nll_train", "code_bits_per_dim", "bound_bits_per_dim"}
    assert {name for name in figures if figures[name]["protocol"] != whole[name]["protocol"]} == by_prior
    for name in by_prior:
        assert figures[name]["protocol"] == {**whole[name]["protocol"], "precision": "bf16"}
        assert figures[name]["value"] != whole[name]["value"]
        assert figures[name]["value"] == pytest.approx(whole[name]["value"], abs=0.01)
    assert figures["bigram_entropy"] == whole["bigram_entropy"]
    with pytest.raises(InputError, match=r"for nll_held_out, precision is bf16 in one and None in the other"):
        compare(tmp_path, evaluations / "stage2")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_measure_what_one_does(runs, evaluations, cache, tmp_path, stage):
    few = FEW[::2] if stage == "stage1" else FEW
    command = f"{stage}/evaluate.py {runs}/{stage} {' '.join(few)} batch_size=16 out={tmp_path}"
    shell(f"{launch_two()} {command} cache_dir={tmp_path}/cache")
    assert values(tmp_path) == pytest.approx(values(evaluations / stage), rel=1e-5, abs=1e-7)


def test_figures_go_to_the_runs_wandb(runs, program, cache, tmp_path):
    before = len(list((runs / "stage1/wandb").glob("offline-run-*")))
    options = [FEW[0], "tracking.wandb=offline", "perceptual=none", cache, f"out={tmp_path}"]
    assert program("stage1/evaluate.py", runs / "stage1", *options)[0] == 0
    assert len(list((runs / "stage1/wandb").glob("offline-run-*"))) == before + 1
    assert "perceptual" not in values(tmp_path)


def test_a_tokenizer_is_measured_on_other_images_too(runs, program, cache, tmp_path, digits):
    pixels = digits[1].__getitems__(np.arange(30))[0][:, 0].numpy()
    np.savez(tmp_path / "others.npz", images=pixels)
    options = [f"data.source={tmp_path}/others.npz", "data.val_fraction=0.5", *FEW[::2], cache, f"out={tmp_path}/out"]
    code, printed, errors = program("stage1/evaluate.py", runs / "stage1", *options)
    assert code == 0, errors
    assert printed.splitlines()[-1] == f"next: accelerate launch stage2/train.py stage1={runs}/stage1"
    figure = evaluated(tmp_path / "out")["figures"]["rFD-EffLite0"]
    assert 5 < figure["protocol"]["images"] < 25
    assert figure["floor_images"] == min(figure["protocol"]["images"], 30 - figure["protocol"]["images"])


def test_a_run_whose_data_have_moved_is_measured_on_them_still(program, cache, tmp_path, digits):
    """The same images under another path, and settings that must match the model."""
    pixels, class_ids = (part.numpy() for part in digits[0].__getitems__(np.arange(100)))
    held_out = digits[1].__getitems__(np.arange(40))
    arrays = {"train_images": pixels[:, 0], "train_labels": class_ids}
    arrays |= {"test_images": held_out[0][:, 0].numpy(), "test_labels": held_out[1].numpy()}
    np.savez(tmp_path / "data.npz", **arrays)
    quick = ["tracking.wandb=disabled", "train.max_steps=4", "train.eval_images=16"]
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    data = f"data.source={tmp_path}/data.npz"
    assert program("stage1/train.py", "configs/debug/stage1.yaml", f"run_dir={stage1}", data, *quick)[0] == 0
    more = [f"run_dir={stage2}", f"stage1={stage1}", *quick]
    assert program("stage2/train.py", "configs/debug/stage2.yaml", *more)[0] == 0
    (tmp_path / "data.npz").rename(tmp_path / "moved.npz")
    moved = f"data.source={tmp_path}/moved.npz"
    code, _, errors = program("stage1/evaluate.py", stage1, moved, *FEW[::2], cache)
    assert code == 0, errors
    assert values(stage1 / "evaluation")["usage"] > 0
    code, _, errors = program("stage2/evaluate.py", stage2, moved, *FEW, cache)
    assert code == 0, errors
    for setting, message in {
        "data.source=digits": "not the images that the prior was trained on",
        "data.image_size=64": "data.image_size=64: is not what the prior was trained on",
    }.items():
        given = [setting] if "source" in setting else [moved, setting]
        code, _, errors = program("stage2/evaluate.py", stage2, *given, *FEW, cache)
        assert (code, errors.count("\n")) == (2, 1)
        assert message in errors


def save_folder(folder: Path, pixels: np.ndarray, class_ids: np.ndarray) -> None:
    for i, (image, class_id) in enumerate(zip(pixels, class_ids, strict=True)):
        (folder / str(class_id)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(class_id) / f"{i:03d}.png")


def test_any_two_sets_are_measured_the_same_way(program, cache, tmp_path, digits):
    pixels, class_ids = digits[1].__getitems__(np.arange(80))
    pixels, class_ids = pixels[:, 0].numpy(), class_ids.numpy()
    save_folder(tmp_path / "folder", pixels, class_ids)
    np.savez(tmp_path / "same.npz", images=pixels, class_ids=class_ids)
    noise = np.random.default_rng(0).normal(0, 30, pixels.shape)
    np.savez(tmp_path / "noisy.npz", images=np.clip(pixels + noise, 0, 255).astype(np.uint8), class_ids=class_ids)
    for name in ("same", "noisy"):
        arguments = ["--images", f"{tmp_path}/{name}.npz", f"--reference={tmp_path}/folder", f"out={tmp_path}/{name}"]
        code, printed, errors = program("stage2/evaluate.py", *arguments, cache)
        assert code == 0, errors
        line = f"next: python stage2/evaluate.py {tmp_path}/{name} --compare OTHER_EVALUATION"
        assert printed.splitlines()[-1] == line
    same, noisy = values(tmp_path / "same"), values(tmp_path / "noisy")
    assert same["FD-EffLite0"] == pytest.approx(0, abs=0.01)
    assert same["KD-EffLite0"] == pytest.approx(0, abs=0.1)  # of 80 images
    assert [same[name] for name in ("precision", "recall", "coverage", "recognised")] == [1, 1, 1, 1]
    assert noisy["FD-EffLite0"] > 1
    assert noisy["precision"] < 1
    code, printed, _ = program("stage2/evaluate.py", tmp_path / "same", f"compare={tmp_path}/noisy")
    assert code == 0
    line = next(line for line in printed.splitlines() if "FD-EffLite0" in line)
    assert float(line.split()[3].replace(",", "")) == pytest.approx(
        noisy["FD-EffLite0"] - same["FD-EffLite0"], rel=1e-3
    )


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_figures_of_files_are_the_same_for_any_number_of_workers(program, cache, tmp_path, digits, runs, stage):
    pixels, class_ids = (part.numpy() for part in digits[1].__getitems__(np.arange(150)))
    save_folder(tmp_path / "folder", pixels[:, 0], class_ids)
    if stage == "stage1":
        arguments = ["stage1/evaluate.py", runs / "stage1", f"data.source={tmp_path}/folder", "data.val_fraction=0.4"]
    else:
        arguments = ["stage2/evaluate.py", f"images={tmp_path}/folder", "reference=digits", "num_reference=100"]
    found = {}
    for how in ("cache_gb=1", "cache_gb=0 workers=0", "cache_gb=0 workers=2"):
        own = [f"data.{setting}" for setting in how.split()] + [f"cache_dir={tmp_path}/{how}", f"out={tmp_path}/{how}"]
        code, _, errors = program(*arguments, "batch_size=16", *own)
        assert code == 0, errors
        found[how] = evaluated(tmp_path / how)["figures"]
    first, *others = found.values()
    assert others == [first, first]


def test_a_prior_that_has_learned_its_images_by_heart_is_told_on(program, cache, tmp_path, digits):
    pixels, class_ids = (part.numpy() for part in digits[0].__getitems__(np.arange(60)))
    held_out = digits[1].__getitems__(np.arange(40))
    np.savez(tmp_path / "few.npz", train_images=pixels[:, 0], train_labels=class_ids,
             test_images=held_out[0][:, 0].numpy(), test_labels=held_out[1].numpy())  # fmt: skip
    options = ["tracking.wandb=disabled", "train.eval_images=16"]
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    data = f"data.source={tmp_path}/few.npz"
    debug = "configs/debug/stage{}.yaml"
    assert program("stage1/train.py", debug.format(1), f"run_dir={stage1}", data, *options)[0] == 0
    more = ["train.max_steps=400", "optim.lr=1e-2", "model.hidden_size=64", f"stage1={stage1}"]
    assert program("stage2/train.py", debug.format(2), f"run_dir={stage2}", *more, *options)[0] == 0
    code, printed, errors = program("stage2/evaluate.py", stage2, *FEW, cache)
    assert code == 0, errors
    assert "warning: the prior memorises: NLL" in printed
    line = f"next: python stage2/evaluate.py {stage2}/evaluation --compare OTHER_RUN_DIR"
    assert printed.splitlines()[-1] == line
    assert values(stage2 / "evaluation")["closer_in_pixels"] > 0.8
    assert values(stage2 / "evaluation")["closer_in_features"] > 0.8
    assert values(stage2 / "evaluation")["near_copies"] > 0.5
    assert evaluated(stage2 / "evaluation")["warnings"]


# Comparing


def changed(evaluation: Path, folder: Path, change) -> Path:
    content = evaluated(evaluation)
    change(content)
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_evaluations_of_different_subjects_made_alike_compare(evaluations, tmp_path):
    def change(content):
        content["subject"]["seed"] = 1
        content["figures"]["precision"]["value"] += 0.25
        content["versions"]["torch"] = "1.0"
        del content["figures"]["recall"]
        content["figures"]["nll_train"]["protocol"]["tokenizer"] = "0" * 64

    other = changed(evaluations / "stage2", tmp_path / "other", change)
    table = compare(evaluations / "stage2", other)
    assert "+0.25" in next(line for line in table.splitlines() if line.strip().startswith("precision"))
    assert "only in A" in next(line for line in table.splitlines() if line.strip().startswith("recall"))
    assert "different versions: torch" in table
    assert "does not compare" in next(line for line in table.splitlines() if line.strip().startswith("nll_train"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("reference", "f" * 64), ("images", 50000), ("image_size", 64), ("resize", "pad"), ("checksum", "0" * 64),
     ("features", "inception"), ("reference_images", 7)],
)  # fmt: skip
def test_evaluations_made_otherwise_refuse_to_compare_and_name_the_field(evaluations, tmp_path, program, key, value):
    def change(content):
        content["figures"]["FD-EffLite0"]["protocol"][key] = value

    other = changed(evaluations / "stage2", tmp_path / "other", change)
    code, printed, errors = program("stage2/evaluate.py", evaluations / "stage2", "--compare", other)
    assert (code, printed) == (2, "")
    assert f"not made alike: for FD-EffLite0, {key} is" in errors
    assert errors.count("\n") == 1


def test_evaluations_that_cannot_be_read(evaluations, tmp_path, program):
    older = changed(evaluations / "stage1", tmp_path / "older", lambda content: content.update(format=0))
    nameless = changed(evaluations / "stage1", tmp_path / "nameless", lambda content: content.pop("figures"))
    (tmp_path / "text.json").write_text("not json")
    for path, message in {
        older: "has format 0, but this version reads 1; evaluate again",
        nameless: "is not an evaluation",
        tmp_path / "text.json": "is not an evaluation",
        tmp_path / "none": "no evaluation.json there",
        evaluations / "stage2": "of tokenizer, ",
    }.items():
        code, _, errors = program("stage1/evaluate.py", evaluations / "stage1", f"--compare={path}")
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1


def test_a_report_comes_back_as_it_was_saved(tmp_path):
    report = Report("images", {"images": "a", "seed": None})
    report.add("frechet", 1.5, {"images": 3}, "FD", floor=0.5, floor_images=2, biased=True)
    report.classes["cat"] = {"ssim": 0.5}
    report.warnings.append("beware")
    report.save(tmp_path)
    assert Report.load(tmp_path / "evaluation.json") == report
    table = report.table()
    assert "BIASED" in table
    assert "2 real images reach 0.5" in table
    assert "warning: beware" in table


def test_a_report_takes_no_figure_that_is_not_a_number():
    with pytest.raises(InputError, match=r"^FD is nan: the images or the model hold something that is not a number$"):
        Report("images", {}).add("frechet", math.nan, {}, "FD")


# Bad input


@pytest.fixture(scope="module")
def sets(tmp_path_factory, digits) -> Path:
    """A folder of image sets that do not match each other, or cannot be measured at all."""
    folder = tmp_path_factory.mktemp("sets")
    pixels = digits[1].__getitems__(np.arange(20))[0].numpy()
    grey = pixels[:, 0]
    colour = np.stack([grey, 255 - grey, grey], axis=-1)
    mixed = folder / "mixed"
    mixed.mkdir()
    Image.fromarray(grey[0]).save(mixed / "a.png")
    Image.fromarray(grey[0][:20]).save(mixed / "b.png")
    for name, images in {
        "good": grey, "colour": colour, "small": grey[:, 2:-2, 2:-2], "one": grey[:1], "same": grey[:1].repeat(20, 0),
        "flat": np.arange(20, dtype=np.uint8)[:, None, None] * np.ones((1, 32, 32), np.uint8),
        "nan": np.full((20, 32, 32), np.nan, np.float32),
    }.items():  # fmt: skip
        np.savez(folder / f"{name}.npz", images=images)
    return folder


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("colour.npz", "has channels 3, reference={sets}/good.npz 1; give data.channels= to bring both to the same"),
        ("small.npz", "has image_size 28, reference={sets}/good.npz 32; give data.image_size="),
        ("one.npz", "only 1 image to measure with; give at least 2"),
        ("same.npz", "all 20 images are the same"),
        ("flat.npz", "each of the 20 images has one flat colour"),
        ("nan.npz", "each of the 20 images has one flat colour"),
        ("mixed", "not one size; set data.image_size="),
        ("none", "no such file or folder"),
    ],
)
def test_images_that_cannot_be_measured_are_one_line(program, sets, cache, tmp_path, images, message):
    arguments = [f"images={sets}/{images}", f"reference={sets}/good.npz", cache, f"out={tmp_path}"]
    code, printed, errors = program("stage2/evaluate.py", *arguments)
    assert code == 2
    assert all(line.startswith(("images: ", "reference: ", "classes: ", "note: ")) for line in printed.splitlines())
    assert message.format(sets=sets) in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "evaluation.json").exists()


def test_sets_of_other_sizes_and_channels_are_measured_when_told_how(program, sets, cache, tmp_path):
    arguments = [f"images={sets}/small.npz", f"reference={sets}/colour.npz", "data.image_size=24", "data.channels=1"]
    code, _, errors = program("stage2/evaluate.py", *arguments, cache, f"out={tmp_path}")
    assert code == 0, errors
    protocol = evaluated(tmp_path)["figures"]["FD-EffLite0"]["protocol"]
    assert protocol.items() >= {"image_size": 24, "channels": 1}.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("stage1/evaluate.py", "usage: python stage1/evaluate.py RUN_DIR"),
        ("stage2/evaluate.py", "usage: python stage2/evaluate.py RUN_DIR"),
        ("stage2/evaluate.py --images {runs}", "give both --images and --reference"),
        ("stage2/evaluate.py {runs}/stage2 --images a --reference b", "give both --images and --reference, and no run"),
        ("stage1/evaluate.py {runs}/none", "{runs}/none is not a tokenizer"),
        ("stage2/evaluate.py {runs}/stage1", "{runs}/stage1: no model there to sample"),
        ("stage1/evaluate.py {runs}/stage1 features=resnet", "features=resnet is not known; use efficientnet-lite0"),
        ("stage1/evaluate.py {runs}/stage1 perceptual=resnet", "perceptual=resnet is not known"),
        ("stage1/evaluate.py {runs}/stage1 feature_weights={runs}/x.pth", "no such file of weights"),
        ("stage1/evaluate.py {runs}/stage1 num_images=1", "num_images=1: must be 2 or more"),
        ("stage2/evaluate.py {runs}/stage2 num_reference=1", "num_reference=1: must be 2 or more"),
        *(
            []
            if torch.cuda.is_available()
            else [
                (
                    f"{stage}/evaluate.py {{runs}}/{stage} tf32=true",
                    "tf32=true: only a CUDA GPU has it, and none is here",
                )
                for stage in ("stage1", "stage2")
            ]
        ),
        ("stage2/evaluate.py {runs}/stage2 search=-1", "search=-1: must be 0 (off) or more, or null"),
        ("stage2/evaluate.py {runs}/stage2 cfg_skale=2", "did you mean cfg_scale?"),
        ("stage2/evaluate.py {runs}/stage2 'class_ids=[12]'", "class_ids: 12 is not a class of this model"),
        ("stage2/evaluate.py {runs}/stage2 {runs}/stage1", "usage: python stage2/evaluate.py"),
        ("stage2/evaluate.py num_reference=2 {runs}/none", "{runs}/none: no model there"),
        ("stage2/evaluate.py {runs}/stage2 data.source=other", "no such file or folder"),
        ("stage1/evaluate.py {runs}/stage1 data.image_size=30", "not divisible by the model's stride"),
        ("stage1/evaluate.py {runs}/stage1 out={runs}/stage1/config.yaml", "cannot be written"),
    ],
)
def test_settings_that_cannot_be_are_one_line(program, runs, cache, arguments, message):
    script, *rest = arguments.format(runs=runs).replace("'", "").split()
    code, printed, errors = program(script, *rest, cache, "tracking.wandb=disabled")
    assert (code, printed) == (2, "")
    assert message.format(runs=runs) in errors
    assert errors.count("\n") == 1


def test_a_flag_without_a_value_is_one_line(program):
    for arguments in (["--images"], ["--reference", "digits", "--images"]):
        assert program("stage2/evaluate.py", *arguments) == (
            2,
            "",
            "error: --images has no value; write --images VALUE\n",
        )
