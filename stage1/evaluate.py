"""Measure a tokenizer on held-out images; the report says beside each figure how it was made.

python stage1/evaluate.py RUN_DIR [key=value ...]
python stage1/evaluate.py RUN_DIR --compare OTHER_RUN_DIR
"""

from pathlib import Path
from shlex import quote

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqgen.cli.program import run_program
from vqgen.cli.runs import run_images, run_tracking
from vqgen.data.images import some_rows
from vqgen.data.order import mixed_seed
from vqgen.distributed import all_reduce_sum, computed_by_main
from vqgen.errors import need, require, section
from vqgen.evaluation.features import FeatureCollector, cached_features, image_batches, load_feature_network
from vqgen.evaluation.metrics import CodeUsage, image_psnr, image_ssim, psnr
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.evaluation.report import (
    Report,
    cache_folder,
    check_varied,
    compare,
    distances,
    evaluation_device,
    writable_folder,
)
from vqgen.quantizers import Replacements
from vqgen.quantizers.common import MAX_SEARCHED
from vqgen.settings import DataConfig, Stage1EvaluateConfig, TrackingConfig
from vqgen.tokenizers.latents import draw_ranks
from vqgen.tokenizers.vqmodel import VQModel, from_uint8, load_tokenizer, to_uint8
from vqgen.training.tracking import image_grid, log_evaluation

NEAREST = 0.05  # share of the codebook that pFD takes near codes from
SYNOPSIS = "python stage1/evaluate.py RUN_DIR [key=value ...], or RUN_DIR --compare OTHER_RUN_DIR"


def main(run_dir: str | None, config: Stage1EvaluateConfig) -> None:
    require(run_dir is not None, f"usage: {SYNOPSIS}")
    run = Path(run_dir)
    if config.compare is not None:
        print(compare(run, Path(config.compare)))
        return
    need("torchmetrics", "evaluation", "stage1/evaluate.py")
    model, checkpoint = load_tokenizer(run)
    out, cache = writable_folder("out", Path(config.out or run / "evaluation")), cache_folder(config)
    tracking = run_tracking(run, config.tracking)
    accelerator = evaluation_device(config.tf32)
    device = accelerator.device
    others, images, _ = run_images(run, config.data, model.channels)  # training images, held-out images
    with section("data"):
        model.code_layout(images.image_size)  # raises if the stride does not divide the size
    rows = some_rows(len(images), config.num_images)
    network = load_feature_network(
        config.features, config.feature_weights, others, seed=config.seed, cache=cache, accelerator=accelerator
    )
    perceptual = None
    if config.perceptual != "none":
        keys = {"name": "perceptual", "weights": "perceptual_weights"}
        with section("perceptual", **keys), accelerator.local_main_process_first():  # which may have to fetch weights
            perceptual = PerceptualDistance(config.perceptual, config.perceptual_weights).to(device)
    model.to(device)

    def features_of(part, chosen, description):
        options = {"batch_size": config.batch_size, "cache": cache, "accelerator": accelerator}
        return cached_features(part, chosen, network, description=description, **options)

    reference = features_of(images, rows, "the reference")
    computed_by_main(lambda: check_varied(reference, f"the held-out images of {run}", images.channels))
    real = features_of(others, some_rows(len(others), len(rows)), "other real images")

    names = ["psnr_per_image", "ssim"] + (["perceptual"] if perceptual else [])
    per_image = torch.zeros(len(rows), len(names), dtype=torch.float64, device=device)
    squared_errors = torch.zeros(len(rows), dtype=torch.float64, device=device)
    usage = CodeUsage(model.code_layout(images.image_size), device)
    nearest = max(1, round(NEAREST * model.quantizer.codebook_size))
    kinds = "rp" if 1 < model.quantizer.codebook_size <= MAX_SEARCHED else "r"  # reconstructions, from perturbed codes
    collectors = {kind: FeatureCollector(len(rows), (images.channels, *images.size), network) for kind in kinds}
    for batch, x, class_ids in image_batches(images, rows, config.batch_size, "reconstructing"):
        x = x.to(device)  # uint8 (B, C, H, W)
        with torch.inference_mode():
            codes = model.encode(from_uint8(x))
            x_rec = to_uint8(model.decode(codes))  # rounded and clipped, as in a saved image
            usage.update(codes)
            columns = [image_psnr(x_rec, x), image_ssim(x_rec, x)]
            if perceptual:
                columns.append(perceptual(from_uint8(x_rec), from_uint8(x)))
            per_image[batch] = torch.stack(columns, dim=1).double()
            squared_errors[batch] = (from_uint8(x_rec) - from_uint8(x)).square().mean(dim=(1, 2, 3)).double()
            decoded = {"r": x_rec}
            if "p" in kinds:
                near = replaced(model, codes, config.perturbed, nearest, config.seed, rows[batch])
                decoded["p"] = to_uint8(model.decode(near))
        for kind, collector in collectors.items():
            collector.update(decoded[kind], class_ids, batch)
    features = {kind: collector.compute() for kind, collector in collectors.items()}
    all_reduce_sum(per_image)  # each process has filled in its own rows
    all_reduce_sum(squared_errors)
    codes_used = usage.compute()
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    report = Report("tokenizer", {"run": str(run), "checkpoint": checkpoint, "seed": config.seed})
    protocol = {"reference": images.fingerprint, "images": len(rows), **images.crop}
    protocol |= {"tf32": True} if config.tf32 else {}
    report.add("psnr", psnr(squared_errors.mean()).item(), protocol)
    for name, mean in zip(names, per_image.mean(dim=0).tolist(), strict=True):
        how = {"network": perceptual.name, "checksum": perceptual.checksum} if name == "perceptual" else {}
        report.add(name, mean, {**protocol, **how})
    distances(report, features["r"], reference, network, protocol, real, prefix="r")
    if "p" in features:
        replacing = {"codes_replaced": config.perturbed, "among_nearest": NEAREST}
        distances(report, features["p"], reference, network, protocol | replacing, real, prefix="p")
    else:
        size = model.quantizer.codebook_size
        report.warnings.append(f"no p{network.frechet_name}: neighbours are for 2 to {MAX_SEARCHED} codes, not {size}")
    report.add("usage", codes_used["usage"].item(), protocol)
    report.add("perplexity", codes_used["perplexity"].item(), protocol)
    report.add("code_entropy", codes_used["entropy"].item() / np.log(2), protocol)
    per_image = per_image.cpu()
    for class_id, class_name in enumerate(images.class_names):
        mine = torch.from_numpy(images.class_ids[rows] == class_id)
        if mine.any():
            means = per_image[mine].mean(dim=0).tolist()
            report.classes[class_name] = {"images": int(mine.sum()), **dict(zip(names, means, strict=True))}
    picture = extremes(images, rows, per_image[:, -1] if perceptual else -per_image[:, -1], model, device)
    picture.save(out / "extremes.png")
    path = report.save(out)
    print(report.table())
    print(f"{path}; the worst and the best reconstructions: {out / 'extremes.png'}")
    if (run / "config.yaml").is_file():
        log_evaluation(run, tracking, report.numbers(), {"extremes": picture})
    print(f"next: accelerate launch stage2/train.py stage1={quote(str(run))}")


def replaced(
    model: VQModel, codes: list[Tensor], share: float, nearest: int, seed: int, rows: np.ndarray
) -> list[Tensor]:
    """The code maps of images with a share of their codes replaced by near ones; each image by its row and the seed."""
    sources = [torch.Generator().manual_seed(mixed_seed(seed, int(row))) for row in rows]
    maps = []
    for part in codes:
        ranks = torch.stack([draw_ranks(part.shape[1:], share, nearest, generator=source) for source in sources])
        maps.append(model.quantizer.replace(part, Replacements(ranks.to(part.device), nearest)))
    return maps


@torch.no_grad()
def extremes(images, rows: np.ndarray, badness: Tensor, model, device: torch.device) -> Image.Image:
    """A picture of the worst-reconstructed images above their reconstructions, then the same for the best."""
    order = badness.argsort(descending=True).numpy()
    each = min(10, len(order))
    lines = []
    for chosen in (order[:each], order[-each:]):
        x = images.__getitems__(rows[chosen])[0]
        lines += [x, to_uint8(model.decode(model.encode(from_uint8(x.to(device))))).cpu()]
    return image_grid(rearrange(torch.cat(lines), "n c h w -> n h w c").numpy(), columns=each)


if __name__ == "__main__":
    run_program(
        main, Stage1EvaluateConfig, {"data": DataConfig, "tracking": TrackingConfig}, SYNOPSIS, run_dir="optional"
    )
