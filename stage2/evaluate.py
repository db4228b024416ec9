"""Measure a prior and its samples, or any images against others; the report says how each figure was made.

python stage2/evaluate.py RUN_DIR [key=value ...]
python stage2/evaluate.py --images A --reference B [key=value ...]
python stage2/evaluate.py RUN_DIR --compare OTHER_RUN_DIR
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqgen.cli.program import run_program
from vqgen.cli.reflect import check_options
from vqgen.cli.runs import run_images, run_tracking, writable_codes_folder
from vqgen.codes import shown
from vqgen.data.codes import TokenStore, encode_images
from vqgen.data.crops import Versions
from vqgen.data.describe import describe
from vqgen.data.images import ImageSet, load_set, some_rows
from vqgen.distributed import all_reduce_sum, computed_by_main, reduce_to_main
from vqgen.errors import need, require, section
from vqgen.evaluation.features import (
    Features,
    cached_features,
    collect_features,
    image_batches,
    load_feature_network,
    my_batches,
    thumbnails,
)
from vqgen.evaluation.likelihood import CodeCounts, LogisticScales, prior_nll
from vqgen.evaluation.metrics import nearest, nearest_pixels, share_closer
from vqgen.evaluation.report import (
    Report,
    cache_folder,
    check_varied,
    compare,
    evaluation_device,
    network_protocol,
    sample_figures,
    writable_folder,
)
from vqgen.generator import PRIOR_OPTIONS, Generator, Samples
from vqgen.priors.prior import Prior
from vqgen.settings import DataConfig, Stage2EvaluateConfig, TrackingConfig
from vqgen.tokenizers.vqmodel import VQModel, from_uint8, to_uint8
from vqgen.training.tracking import image_grid, log_evaluation
from vqgen.yaml_file import read_yaml

SYNOPSIS = (
    "python stage2/evaluate.py RUN_DIR [key=value ...], or --images A --reference B [key=value ...], "
    "or RUN_DIR --compare OTHER_RUN_DIR"
)
SCALE_IMAGES = 512  # training images that the decoder's scales are fitted to
# Three signs that a prior memorises its training images:
MEMORISED_NLL = 0.8  # the training NLL is below this share of the held-out NLL
COPY_QUANTILE, MEMORISED_COPIES = 0.01, 0.1  # over 10 % of samples are nearer than the nearest 1 % of held-out images
MEMORISED_SHARE = 0.9  # in more than this share of (sample, held-out image) pairs the sample is nearer


def main(run_dir: str | None, config: Stage2EvaluateConfig) -> None:
    if config.compare is not None:
        require(run_dir is not None, f"usage: {SYNOPSIS}")
        print(compare(Path(run_dir), Path(config.compare)))
        return
    need("torchmetrics", "evaluation", "stage2/evaluate.py")
    if config.images is not None or config.reference is not None:
        both = config.images is not None and config.reference is not None and run_dir is None
        require(both, f"give both --images and --reference, and no run; usage: {SYNOPSIS}")
        evaluate_images(config)
    else:
        require(run_dir is not None, f"usage: {SYNOPSIS}")
        evaluate_run(Path(run_dir), config)


def evaluate_run(run: Path, config: Stage2EvaluateConfig) -> None:
    """Samples, likelihood and overfitting of a stage-2 run."""
    generator = Generator.from_pretrained(run)
    prior, tokenizer, tokenizer_hash = generator.model, generator.tokenizer, generator.tokenizer_hash
    remedy = "draw with stage2/sample.py, and measure with --images"
    require(not generator.is_gan, f"{run} is a GAN's run, without codes: {remedy}")
    out, cache = writable_folder("out", Path(config.out or run / "evaluation")), cache_folder(config)
    tracking = run_tracking(run, config.tracking)
    accelerator = evaluation_device(config.tf32)
    device = accelerator.device
    train, held_out, own = run_images(run, config.data, tokenizer.channels)
    require(own, "data.source: not the images that the prior was trained on; for others use --images and --reference")
    with section("data"):
        fits = tokenizer.code_layout(train.image_size).shapes == prior.layout.shapes
    require(fits, f"data.image_size={shown(train.image_size)}: is not what the prior was trained on")
    settings = read_yaml(run / "config.yaml")["data"] if (run / "config.yaml").is_file() else {}
    flip, crops = settings.get("flip", False), settings.get("crops", 1)
    network = load_feature_network(
        config.features, config.feature_weights, train, seed=config.seed, cache=cache, accelerator=accelerator
    )
    generator.to(device)
    samples = Samples(generator, config)

    # Likelihood of the codes under the prior and under code counts, and of the images under prior and decoder.
    codes_dir = writable_codes_folder(run, cache)

    def codes_of(images, mirror, versions=1):
        return encode_images(
            images, tokenizer, codes_dir, tokenizer_hash=tokenizer_hash, mirror=mirror, accelerator=accelerator,
            order=prior.layout.order, crops=versions,
        )  # fmt: skip

    # The likelihood is that of whole images, for any number of crops; copies are searched among the crops as well.
    train_codes, held_out_codes = codes_of(train, flip), codes_of(held_out, False)
    stored = codes_of(train, flip, crops) if config.search != 0 else train_codes
    searched = some_rows(len(stored), config.search)
    if accelerator.is_main_process and len(searched) < len(stored):
        among = f"{len(searched):,} of the {len(stored):,} training images, mirror images and crops, chosen at random"
        none = "no figures of copies in pixels"
        print(f"search={config.search}: {f'copies are searched among {among}' if config.search else none}", flush=True)
    count = len(held_out_codes)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        nll, train_nll = (
            prior_nll(prior, codes, count, config.batch_size, device) for codes in (held_out_codes, train_codes)
        )
    unigram, bigram = CodeCounts(train_codes, prior.layout).nll(held_out_codes, count)
    code_nats = nll * prior.layout.num_tokens
    decoder_nats = decoder_nll(tokenizer, train, held_out, config.batch_size, device)

    # Features of samples, training images and held-out images. Samples are compared with reconstructions of the real
    # images, because the tokenizer's own errors would otherwise make a copy look unlike its original.
    def features_of(images, rows, description, folder=cache, **more):
        options = {"batch_size": config.batch_size, "cache": folder, "accelerator": accelerator, **more}
        return cached_features(images, rows, network, description=description, **options)

    @torch.no_grad()
    def reproduce(x: Tensor) -> Tensor:
        return to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(x.to(device)))))

    drawn = collect_features(samples, np.arange(config.num_images), network, config.batch_size, "sampling")
    reference_rows = some_rows(len(train), config.num_reference)
    held_out_rows = some_rows(len(held_out), config.num_images)
    reference = features_of(train, reference_rows, "the reference")
    computed_by_main(lambda: check_varied(reference, f"the training images of {run}", train.channels))
    real = features_of(held_out, held_out_rows, "held-out images") if len(held_out) > 1 else None
    reproduced = {"change": reproduce, "changed": f" reproduced by {tokenizer_hash}"}
    known, control = (
        features_of(images, rows, f"{name} images, reproduced", out, **reproduced)
        for images, rows, name in ((train, reference_rows, "training"), (held_out, held_out_rows, "held-out"))
    )
    in_pixels = []
    if config.search != 0:
        queries = computed_by_main(lambda: [drawn.thumbnails, control.thumbnails])
        in_pixels = nearest_training_image(queries, stored, searched, prior, tokenizer, config.batch_size, device)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    report = Report("samples", {"run": str(run), "checkpoint": generator.checkpoint, "tokenizer": tokenizer_hash,
                                **{name: getattr(config, name) for name in SAMPLING}})  # fmt: skip
    crop = train.crop | ({"tf32": True} if config.tf32 else {})
    protocol = {
        "reference": train.fingerprint,
        "reference_images": len(reference_rows),
        "images": config.num_images,
        **crop,
    }
    sample_figures(report, drawn, reference, network, protocol, train.class_names, real)

    likelihood = {"images": count, "of": held_out.fingerprint, **crop}
    tokens = {**likelihood, "tokenizer": tokenizer_hash}
    by_prior = {"precision": config.precision} if config.precision != "no" else {}
    fitted = {"fitted_to": train.fingerprint, "mirrored": flip}
    dims = train.channels * math.prod(train.size)
    report.add("nll_held_out", nll, {**tokens, **by_prior})
    report.add("nll_train", train_nll, {**tokens, "of": train.fingerprint, "mirrored": flip, **by_prior})
    report.add("unigram_entropy", unigram, {**tokens, **fitted})
    report.add("bigram_entropy", bigram, {**tokens, **fitted})
    report.add("code_bits_per_dim", code_nats / math.log(2) / dims, {**likelihood, **by_prior})
    report.add(
        "bound_bits_per_dim", (code_nats + decoder_nats) / math.log(2) / dims, {**likelihood, **fitted, **by_prior}
    )

    # Features are compared by angle, because a flat image has small features, which are at a small distance from all.
    centre = known.kept.mean(dim=0)
    directions = [F.normalize(part.kept - centre) for part in (drawn, control, known)]
    in_features = [nearest(queries, directions[2]) for queries in directions[:2]]
    how = {**protocol, "held_out": held_out.fingerprint, "held_out_images": len(held_out_rows), "mirrored": flip}
    in_reference = {**how, "searched": len(known.kept), **network_protocol(network)}
    spaces = {"pixels": (in_pixels, {**how, "searched": len(searched)})} if in_pixels else {}
    signs = copy_figures(report, {**spaces, "features": (in_features, in_reference)})
    if train_nll < MEMORISED_NLL * nll:
        signs.insert(0, f"NLL {train_nll:.3g} on training images, {nll:.3g} on held-out ones")
    if signs:
        report.warnings.append(f"the prior memorises: {'; '.join(signs)}; fewer steps or more images would help")
    copied = stored.rows[searched[in_pixels[0][1].numpy()]] if in_pixels else None
    alike = reference_rows[known.rows[in_features[0][1]]]
    nearness = (in_pixels or in_features)[0][0]
    picture = closest(samples, drawn, Versions(train, crops, flip), nearness, copied, alike)
    picture.save(out / "closest.png")
    path = report.save(out)
    print(report.table())
    print(f"{path}; samples nearest to training images, which are below them: {out / 'closest.png'}")
    log_evaluation(run, tracking, report.numbers(), {"closest": picture})
    print(f"next: python stage2/evaluate.py {quote(str(out))} --compare OTHER_RUN_DIR")


def copy_figures(
    report: Report, spaces: Mapping[str, tuple[Sequence[tuple[Tensor, Tensor]], Mapping[str, Any]]]
) -> list[str]:
    """Adds the figures of copies, and returns the signs of a prior that copies, in words.

    Args:
        report: the report to add them to.
        spaces: by the space that is searched, `pixels` or `features`: what `nearest` has found for the samples and for
            held-out images, and the figures' protocol.
    """
    shares, signs = {}, []
    for space, (((distance, _), (held_out_distance, _)), protocol) in spaces.items():
        shares[space] = share_closer(distance, held_out_distance)
        report.add(f"closer_in_{space}", shares[space], protocol)
    if (share := max(shares.values())) > MEMORISED_SHARE:
        signs.append(f"samples are nearer to training images than held-out ones are, in {share:.0%} of pairs")
    if "pixels" in spaces:
        ((distance, _), (held_out_distance, _)), protocol = spaces["pixels"]
        near_copies = (distance < held_out_distance.quantile(COPY_QUANTILE)).double().mean().item()
        report.add("near_copies", near_copies, protocol)
        if near_copies > MEMORISED_COPIES:
            signs.append(f"{near_copies:.0%} of samples are nearer to a training image than 1 % of held-out ones are")
    return signs


def evaluate_images(config: Stage2EvaluateConfig) -> None:
    """Compares any images with reference images."""
    out, cache = writable_folder("out", Path(config.out or "evaluation")), cache_folder(config)
    accelerator = evaluation_device(config.tf32)
    size = config.data.get("image_size")
    options = check_options(DataConfig, config.data, "data")
    data, reference_data = (DataConfig(**{**options, "source": source}) for source in (config.images, config.reference))
    with section("data", images="images", reference="reference"):
        images, _ = load_set("images", data, size)
        reference, held_out = load_set("reference", reference_data, size)
    for what in ("image_size", "channels"):
        a, b = getattr(images, what), getattr(reference, what)
        remedy = f"give data.{what}= to bring both to the same"
        require(a == b, f"images={config.images} has {what} {a}, reference={config.reference} {b}; {remedy}")
    if accelerator.is_main_process:
        print(*describe(images, None).short_lines("images"), sep="\n")
        print(*describe(reference, held_out).short_lines("reference"), sep="\n", flush=True)
    network = load_feature_network(
        config.features, config.feature_weights, reference, seed=config.seed, cache=cache, accelerator=accelerator
    )

    def features_of(part, rows, description):
        options = {"batch_size": config.batch_size, "cache": cache, "accelerator": accelerator}
        return cached_features(part, rows, network, description=description, **options)

    rows = some_rows(len(images), config.num_images)
    reference_rows = some_rows(len(reference), config.num_reference)
    measured, known = features_of(images, rows, "images"), features_of(reference, reference_rows, "the reference")
    computed_by_main(lambda: check_varied(measured, f"images={config.images}", images.channels))
    computed_by_main(lambda: check_varied(known, f"reference={config.reference}", images.channels))
    # Other real images: the held-out part of the reference, or its images beyond num_reference.
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
    protocol |= reference.crop | ({"tf32": True} if config.tf32 else {})
    if images.class_names and reference.class_names:  # maps ids by name; the last entry maps -1 (no class) to itself
        ids = {name: i for i, name in enumerate(reference.class_names)}
        measured.class_ids = torch.tensor([*(ids.get(name, -1) for name in images.class_names), -1])[measured.class_ids]
        if (measured.class_ids < 0).all():
            report.warnings.append("no class of the images has the name of a class of the reference")
    sample_figures(report, measured, known, network, protocol, reference.class_names, real)
    path = report.save(out)
    print(report.table())
    print(path)
    print(f"next: python stage2/evaluate.py {quote(str(out))} --compare OTHER_EVALUATION")


SAMPLING = ("seed", *PRIOR_OPTIONS, "class_ids")


@torch.no_grad()
def decoder_nll(
    tokenizer: VQModel, train: ImageSet, held_out: ImageSet, batch_size: int, device: torch.device
) -> float:
    """-log p(x | z) of held-out images given their codes, in nats per image, with scales from training images."""
    scales, nats = LogisticScales(tokenizer.channels, device), torch.zeros((), dtype=torch.float64, device=device)
    for images, rows in ((train, some_rows(len(train), SCALE_IMAGES)), (held_out, np.arange(len(held_out)))):
        for _, x, _ in image_batches(images, rows, batch_size, "decoder's likelihood"):
            x = x.to(device)
            means = (tokenizer.decode(tokenizer.encode(from_uint8(x))).double() + 1) * 127.5
            if images is train:
                scales.update(x, means)
            else:
                nats += scales.nll(x, means).sum()
        if images is train:
            scales.fit()
    return all_reduce_sum(nats).item() / len(held_out)


@torch.no_grad()
def nearest_training_image(
    queries: list[Tensor],
    codes: TokenStore,
    rows: np.ndarray,
    prior: Prior,
    tokenizer: VQModel,
    batch_size: int,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """The nearest of the stored training images `rows` for each set of thumbnails, on the main process.

    The training images are reconstructed from their codes. Of several at the same distance, the first is taken.

    Args:
        queries: sets of thumbnails, uint8 (n, P).
        codes: the store.
        rows: the places in the store that are searched; the processes share them.
        prior: the prior, whose layout the codes have.
        tokenizer: their tokenizer.
        batch_size: images that are decoded at a time.
        device: the tokenizer's device, where the thumbnails are compared.

    Returns:
        For each set, the distances (n,) float64 and the places in `rows` (n,), on the CPU.
    """
    queries = [part.to(device) for part in queries]
    best = [torch.full((len(part),), torch.iinfo(torch.int64).max, device=device) for part in queries]
    for batch in my_batches(len(rows), batch_size, "searching training images"):
        tokens = codes.__getitems__(rows[batch])[0].to(device)
        references = thumbnails(to_uint8(tokenizer.decode(prior.layout.unflatten(tokens))))
        for i, part in enumerate(queries):
            squares, index = nearest_pixels(part, references)
            best[i] = torch.minimum(best[i], squares << 32 | index + int(batch[0]))  # the lower bits are the place
    found = [reduce_to_main(part, dist.ReduceOp.MIN).cpu() for part in best]
    return [((part >> 32).double().sqrt(), part & 0xFFFFFFFF) for part in found]


def closest(
    samples: Samples,
    drawn: Features,
    versions: Versions,
    nearness: Tensor,
    copied: np.ndarray | None,
    alike: np.ndarray,
) -> Image.Image:
    """The samples nearest to a training image; below each, that image in pixels, and the nearest one by features.

    Args:
        samples: the samples.
        drawn: their features.
        versions: the stored versions of the training images.
        nearness: the distance (n,) of each sample.
        copied: the place in the store (n,) of the image nearest in pixels; None if none was searched.
        alike: the training image (n,) nearest by features.
    """
    train, order = versions.images, nearness.argsort()[:10].numpy()
    lines = [torch.cat([samples.__getitems__(drawn.rows[i : i + 1].numpy())[0].cpu() for i in order])]
    if copied is not None:
        pixels = [versions.read(place % len(train))[place // len(train)] for place in copied[order]]
        lines.append(torch.from_numpy(np.stack(pixels)))
    lines.append(train.__getitems__(alike[order])[0])
    return image_grid(rearrange(torch.cat(lines), "n c h w -> n h w c").numpy(), columns=len(order))


if __name__ == "__main__":
    run_program(
        main, Stage2EvaluateConfig, {"data": DataConfig, "tracking": TrackingConfig}, SYNOPSIS, run_dir="optional"
    )
