"""What tests/benchmarks/ says a configuration costs, and its script for a GPU at a tiny size on the CPU."""

import sys

import pytest
import torch
import torch.nn.functional as F
from programs import ROOT
from torch.utils.flop_counter import FlopCounterMode

from vqgen.planning.cost import phases, tokenizer_cost
from vqgen.tokenizers import build_tokenizer
from vqgen.training.schedule import num_parameters

sys.path.append(BENCHMARKS := str(ROOT / "tests/benchmarks"))
import cost
import gpu
from step import configuration, stage1

sys.path.remove(BENCHMARKS)  # its data.py would hide tests/data

TINY = {"data__image_size": 16, "model__widths": [16, 32], "train__mixed_precision": "no"}
VQGAN = {"loss__adversarial__name": "hinge", "loss__perceptual__name": "alex", "loss__perceptual__every": 2}
VQGAN |= {
    "loss__adversarial__every": 1,
    "loss__adversarial__adaptive": False,
    "discriminator__width": 8,
    "discriminator__layers": 1,
}
DEBUG = ROOT / "configs/debug/stage1.yaml"


def test_the_cost_of_a_step_is_what_the_same_step_counts_on_real_tensors():
    config = configuration(DEBUG, **TINY)
    costs = tokenizer_cost(stage1, config)
    model = build_tokenizer(**config.model).train()
    x = torch.rand(4, 3, 16, 16)
    model(x)  # initialises the codebook
    with FlopCounterMode(display=False) as counted:
        x_rec, (q,) = model(x)
        (F.mse_loss(x_rec, x) + q.loss).backward()
    assert costs.flops == counted.get_total_flops() / 4
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.decoder(model.from_code(torch.rand(1, 8, *[16 // model.stride] * 2)))
    assert costs.parts["decoder"][1] == counted.get_total_flops()
    assert sum(count for count, _ in costs.parts.values()) == num_parameters(model)


def test_each_loss_costs_what_it_does_in_the_phases_in_which_it_counts():
    always = {"loss__perceptual__start": 0, "loss__adversarial__start": 0, "loss__adversarial__r1": 0}
    config = configuration(DEBUG, **TINY, **VQGAN, **always)
    early = tokenizer_cost(stage1, config)
    with_name = configuration(DEBUG, **TINY, **{**VQGAN, **always, "loss__adversarial__name": "none"})
    without = tokenizer_cost(stage1, with_name)
    disc, perceptual = (early.parts[name][1] for name in ("discriminator", "perceptual"))
    # D: forward and backward to the image for the tokenizer; forward and backward to its weights on two images.
    assert 7 * disc < early.flops - without.flops <= 8 * disc
    # The perceptual distance: two forward passes (its figure has both) and a backward pass, on each second image.
    plain = tokenizer_cost(stage1, configuration(DEBUG, **TINY))
    assert 1.2 * perceptual / 2 < without.flops - plain.flops < 1.6 * perceptual / 2
    config.loss.adversarial.start, config.loss.adversarial.lead = 0.8, 0.0
    assert tokenizer_cost(stage1, config).flops == pytest.approx(0.8 * without.flops + 0.2 * early.flops)
    config.loss.adversarial.lead = 0.3
    assert [round(part, 3) for _, part in phases(config)] == [0.5, 0.3, 0.2]


def test_checkpointing_costs_products_and_saves_memory():
    deep = {**TINY, "model__widths": [16], "model__decoder_blocks": 4, "model__head_width": 0}  # most of it is blocks
    plain, again = (
        tokenizer_cost(stage1, configuration(DEBUG, **deep, train__activation_checkpointing=on)) for on in (False, True)
    )
    assert plain.flops < again.flops < 4 / 3 * plain.flops
    assert again.each < 0.7 * plain.each
    assert again.parts == plain.parts


def test_the_table_of_a_configuration(capsys, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {image_size: 16}\nmodel: {widths: [16]}\ntrain: {batch_size: 64, max_steps: 1000}\n")
    cost.main(path, 8, 0.35)
    table = capsys.readouterr().out
    for row in ("| encoder | 0.0", "| memory at 8 images a pass, GB |", "| hours on 8 A100, at 35% of 312 TFLOP/s | 0"):
        assert row in table


@pytest.mark.parametrize("prepare", [gpu.as_it_is, gpu.contiguous, gpu.norms_in_float32, gpu.compiled])
def test_the_script_for_a_gpu_measures_each_kind_of_case(prepare, monkeypatch):
    monkeypatch.setattr(gpu, "TINY", True)
    monkeypatch.setattr(gpu, "WARMUP", 1)
    monkeypatch.setattr(gpu, "TIMED", 1)
    case = ("how", gpu.F16, 16, gpu.AGAIN, prepare)
    flops: dict[str, int] = {}
    row = gpu.measure(case, flops)
    assert row.startswith(f"| {gpu.F16} | how | 16 | ")
    assert float(row.split("|")[4]) > 0
    assert flops[gpu.F16] > 0


def test_the_script_for_a_gpu_prints_one_table_and_ends_in_time(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TINY", True)
    monkeypatch.setattr(gpu, "CASES", [gpu.CASES[-2], gpu.CASES[-1]])
    monkeypatch.setattr(gpu, "measure", lambda case, flops: "| a row |" if case is gpu.CASES[0] else gpu.too_late())
    gpu.main(100)
    table = capsys.readouterr().out
    assert "host syncs in a step: not on a CPU" in table
    assert "convolutions and products" in table
    assert table.count("| a row |") == table.count("| no time left |") == 1
