"""Measure a prior and its samples, or any images against others, with how each figure was made beside it.

python stage2/evaluate.py RUN_DIR [key=value ...]
python stage2/evaluate.py --images A --reference B [key=value ...]
python stage2/evaluate.py RUN_DIR --compare OTHER_RUN_DIR
"""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqgen.cli import run_program
from vqgen.config import DataConfig, Stage2EvaluateConfig, check_options, read_yaml, require
from vqgen.data.codes import encode_images
from vqgen.data.images import ImageSet, load_images, load_set, some_rows
from vqgen.distributed import all_reduce_sum
from vqgen.evaluation import (
    Report,
    cache_folder,
    check_varied,
    compare,
    exact_convolutions,
    network_protocol,
    output_folder,
    run_data,
    sample_figures,
)
from vqgen.features import Features, cached_features, collect_features, load_feature_network, my_batches
from vqgen.likelihood import CodeCounts, LogisticScales, prior_nll
from vqgen.metrics import nearest, share_closer
from vqgen.models.prior import Prior
from vqgen.models.vqmodel import VQModel, from_uint8, load_tokenizer, to_uint8
from vqgen.sampling import class_choices, classes_in_turn, sample_images
from vqgen.tracking import image_grid, log_evaluation

SYNOPSIS = (
    "python stage2/evaluate.py RUN_DIR [key=value ...], or --images A --reference B [key=value ...], "
    "or RUN_DIR --compare OTHER_RUN_DIR"
)
SCALE_IMAGES = 512  # training images that the decoder's scales are fitted to
MEMORISED_NLL = 0.8  # of the held-out NLL: where the training NLL is below, the prior knows its training images
MEMORISED_SHARE = 0.9  # of pairs of a sample and a held-out image: where more samples are nearer, they are copies


def main(run_dir: str | None, config: Stage2EvaluateConfig) -> None:
    if config.compare is not None:
        require(run_dir is not None, f"usage: {SYNOPSIS}")
        print(compare(Path(run_dir), Path(config.compare)))
    elif config.images is not None or config.reference is not None:
        both = config.images is not None and config.reference is not None and run_dir is None
        require(both, f"give both --images and --reference, and no run; usage: {SYNOPSIS}")
        evaluate_images(config)
    else:
        require(run_dir is not None, f"usage: {SYNOPSIS}")
        evaluate_run(Path(run_dir), config)


def evaluate_run(run: Path, config: Stage2EvaluateConfig) -> None:
    """Samples, likelihood and overfitting of a stage-2 run."""
    folder = run / "model"
    require(folder.is_dir(), f"{run}: no model there; give the folder of a stage-2 run, or train one first")
    prior = Prior.from_pretrained(folder / "prior").eval()
    tokenizer, tokenizer_hash = load_tokenizer(folder / "tokenizer")
    data, own = run_data(run, config.data, tokenizer.channels)
    require(own, "data.source: a prior is measured on its own data; for other images use --images and --reference")
    out = output_folder(Path(config.out or run / "evaluation"))

    accelerator = Accelerator()
    device = accelerator.device
    exact_convolutions()
    train, held_out = load_images(data)
    cache = cache_folder(config)
    network = load_feature_network(
        config.features, config.feature_weights, train, seed=config.seed, cache=cache, accelerator=accelerator
    )
    prior, tokenizer = prior.to(device), tokenizer.to(device)
    samples = Samples(prior, tokenizer, config, device)

    # Likelihood: of the codes under the prior and under mere counts, and of the images under prior and decoder.
    codes_dir = codes_folder(run) if os.access(codes_folder(run), os.W_OK) else cache / "codes"
    train_codes, held_out_codes = (
        encode_images(
            images, tokenizer, codes_dir, tokenizer_hash=tokenizer_hash, mirror=mirror, accelerator=accelerator
        )
        for images, mirror in ((train, data.flip), (held_out, False))
    )
    count = len(held_out_codes)
    nll, train_nll = (
        prior_nll(prior, codes, count, config.batch_size, device) for codes in (held_out_codes, train_codes)
    )
    unigram, bigram = CodeCounts(train_codes, prior.layout).nll(held_out_codes, count)
    code_nats = nll * prior.layout.num_tokens
    decoder_nats = decoder_nll(tokenizer, train, held_out, config.batch_size, device)

    # Samples, training and held-out images; and the latter two as the tokenizer reproduces them, among which copies are
    # looked for: what the tokenizer does to every image would else hide that two are the same.
    def features_of(images, rows, description):
        options = {"batch_size": config.batch_size, "cache": cache, "accelerator": accelerator}
        return cached_features(images, rows, network, description=description, **options)

    drawn = collect_features(samples, np.arange(config.num_images), network, config.batch_size, "sampling")
    reference_rows = some_rows(len(train), config.num_reference)
    held_out_rows = some_rows(len(held_out), config.num_images)
    reference = features_of(train, reference_rows, "the reference")
    check_varied(reference, f"data.source={data.source}", train.channels)
    real = features_of(held_out, held_out_rows, "held-out images") if len(held_out) > 1 else None
    known, control = (
        features_of(Reproduced(images, tokenizer, tokenizer_hash, device), rows, f"{name} images, reproduced")
        for images, rows, name in ((train, reference_rows, "training"), (held_out, held_out_rows, "held-out"))
    )
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    report = Report("samples", {"run": str(run), "checkpoint": hash_of(folder / "prior"), "tokenizer": tokenizer_hash,
                                **{name: getattr(config, name) for name in SAMPLING}})  # fmt: skip
    crop = train.crop
    protocol = {
        "reference": train.fingerprint,
        "reference_images": len(reference_rows),
        "images": config.num_images,
        **crop,
    }
    sample_figures(report, drawn, reference, network, protocol, train.class_names, real)

    likelihood = {"images": count, "of": held_out.fingerprint, **crop}
    dims = train.channels * train.image_size**2
    report.add("nll_held_out", nll, {**likelihood, "tokenizer": tokenizer_hash})
    report.add("nll_train", train_nll, {**likelihood, "of": train.fingerprint, "tokenizer": tokenizer_hash})
    report.add("unigram_entropy", unigram, {**likelihood, "tokenizer": tokenizer_hash})
    report.add("bigram_entropy", bigram, {**likelihood, "tokenizer": tokenizer_hash})
    report.add("code_bits_per_dim", code_nats / math.log(2) / dims, likelihood)
    report.add("bound_bits_per_dim", (code_nats + decoder_nats) / math.log(2) / dims, likelihood)

    near, centre = {}, known.kept.mean(dim=0)
    for space in ("pixels", "features"):
        queries, others, references = (
            # Features by their angle: by distance, a flat image of small features is everyone's neighbour.
            F.normalize(part.kept - centre) if space == "features" else part.thumbnails
            for part in (drawn, control, known)
        )
        near[space] = nearest(queries, references)
        share = share_closer(near[space][0], nearest(others, references)[0])
        how = {**protocol, "held_out": held_out.fingerprint, "held_out_images": len(held_out_rows)}
        how |= network_protocol(network) if space == "features" else {}
        report.add(f"closer_in_{space}", share, how)
    signs, share = [], max(report.figures[f"closer_in_{space}"].value for space in near)
    if train_nll < MEMORISED_NLL * nll:
        signs.append(f"NLL {train_nll:.3g} on training images, {nll:.3g} on held-out ones")
    if share > MEMORISED_SHARE:
        signs.append(f"samples are nearer to training images than held-out ones are, in {share:.0%} of pairs")
    if signs:
        report.warnings.append(f"the prior memorises: {'; '.join(signs)}; fewer steps or more images would help")
    picture = closest(samples, drawn, train, reference_rows[known.rows], near)
    picture.save(out / "closest.png")
    path = report.save(out)
    print(report.table())
    print(f"{path}; samples nearest to training images, which are below them: {out / 'closest.png'}")
    log_evaluation(run, config.tracking, report.numbers(), {"closest": picture})


def evaluate_images(config: Stage2EvaluateConfig) -> None:
    """Any images against a reference, whoever made them."""
    out = output_folder(Path(config.out or "evaluation"))
    accelerator = Accelerator()
    exact_convolutions()
    size = config.data.get("image_size")
    options = check_options(DataConfig, config.data, "data")
    data, reference_data = (DataConfig(**{**options, "source": source}) for source in (config.images, config.reference))
    images, _ = load_set("images", data, size)
    reference, held_out = load_set("reference", reference_data, size)
    for what in ("image_size", "channels"):
        a, b = getattr(images, what), getattr(reference, what)
        remedy = f"give data.{what}= to bring both to the same"
        require(a == b, f"images={config.images} has {what} {a}, reference={config.reference} {b}; {remedy}")
    cache = cache_folder(config)
    network = load_feature_network(
        config.features, config.feature_weights, reference, seed=config.seed, cache=cache, accelerator=accelerator
    )

    def features_of(part, rows, description):
        options = {"batch_size": config.batch_size, "cache": cache, "accelerator": accelerator}
        return cached_features(part, rows, network, description=description, **options)

    rows = some_rows(len(images), config.num_images)
    reference_rows = some_rows(len(reference), config.num_reference)
    measured, known = features_of(images, rows, "images"), features_of(reference, reference_rows, "the reference")
    check_varied(measured, f"images={config.images}", images.channels)
    check_varied(known, f"reference={config.reference}", images.channels)
    # Real images that are not in the reference: its held-out part, or what num_reference has left over.
    others = held_out or reference
    other_rows = np.arange(len(others)) if held_out else np.setdiff1d(np.arange(len(reference)), reference_rows)
    other_rows = other_rows[some_rows(len(other_rows), len(rows))]
    real = features_of(others, other_rows, "other real images") if len(other_rows) > 1 else None
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    subject = {"images": config.images, "fingerprint": images.fingerprint, "against": config.reference}
    report = Report("images", subject)
    protocol = {"reference": reference.fingerprint, "reference_images": len(reference_rows), "images": len(rows)}
    protocol |= reference.crop
    same_classes = images.class_names == reference.class_names
    sample_figures(report, measured, known, network, protocol, reference.class_names if same_classes else [], real)
    path = report.save(out)
    print(report.table())
    print(path)


SAMPLING = ("seed", "cfg_scale", "temperature", "top_k", "top_p", "class_ids")


class Samples:
    """A prior's samples as a set of images, drawn as they are asked for."""

    def __init__(self, prior: Prior, tokenizer: VQModel, config: Stage2EvaluateConfig, device: torch.device):
        self.prior, self.tokenizer, self.config = prior, tokenizer, config
        choices = class_choices(prior, config.class_ids)
        self.class_ids = classes_in_turn(config.num_images, choices).to(device)

    def __len__(self) -> int:
        return self.config.num_images

    def __getitems__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The samples of consecutive rows, uint8 (B, C, H, W), and their class ids."""
        first, class_ids = int(rows[0]), self.class_ids[rows[0] : rows[-1] + 1]
        options = {name: getattr(self.config, name) for name in ("temperature", "top_k", "top_p", "cfg_scale")}
        images = sample_images(self.prior, self.tokenizer, class_ids, seed=self.config.seed, first=first, **options)
        return images, class_ids


class Reproduced:
    """Images as a tokenizer reproduces them, otherwise like the `ImageSet` that they are from."""

    def __init__(self, images: ImageSet, tokenizer: VQModel, tokenizer_hash: str, device: torch.device):
        self.images, self.tokenizer, self.device = images, tokenizer, device
        self.crop = images.crop
        self.fingerprint = f"{images.fingerprint} reproduced by {tokenizer_hash}"

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def __getitems__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x, class_ids = self.images.__getitems__(rows)
        return to_uint8(self.tokenizer.decode(self.tokenizer.encode(from_uint8(x.to(self.device))))), class_ids


@torch.no_grad()
def decoder_nll(
    tokenizer: VQModel, train: ImageSet, held_out: ImageSet, batch_size: int, device: torch.device
) -> float:
    """-log p(x | z) of held-out images given their codes, in nats an image, with scales fitted to training images."""
    scales, nats = LogisticScales(tokenizer.channels, device), torch.zeros((), dtype=torch.float64, device=device)
    for images, rows in ((train, some_rows(len(train), SCALE_IMAGES)), (held_out, np.arange(len(held_out)))):
        for batch in my_batches(len(rows), batch_size, "decoder's likelihood"):
            x = images.__getitems__(rows[batch])[0].to(device)
            means = (tokenizer.decode(tokenizer.encode(from_uint8(x))).double() + 1) * 127.5
            if images is train:
                scales.update(x, means)
            else:
                nats += scales.nll(x, means).sum()
        if images is train:
            scales.fit()
    return all_reduce_sum(nats).item() / len(held_out)


def closest(
    samples: Samples, drawn: Features, train: ImageSet, train_rows: np.ndarray, near: dict[str, tuple[Tensor, Tensor]]
) -> Image.Image:
    """The samples nearest to a training image in feature space; below each, that in pixels and that in features."""
    order = near["features"][0].argsort()[:10].numpy()
    lines = [torch.cat([samples.__getitems__(drawn.rows[i : i + 1].numpy())[0].cpu() for i in order])]
    for space in ("pixels", "features"):
        lines.append(train.__getitems__(train_rows[near[space][1][order].numpy()])[0])
    return image_grid(rearrange(torch.cat(lines), "n c h w -> n h w c").numpy(), columns=len(order))


def codes_folder(run: Path) -> Path:
    """Where the run has its encoded data, if it is still there."""
    settings = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    return Path(settings.get("codes_dir") or Path(settings.get("stage1", run)) / "codes")


def hash_of(folder: Path) -> str:
    """SHA-256 of a model's files."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


if __name__ == "__main__":
    run_program(main, Stage2EvaluateConfig, {"data": DataConfig}, SYNOPSIS, run_dir="optional")
