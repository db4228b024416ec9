"""What a prior's training step costs, against formulas. Stage 1's costs are compared in tests/test_cost.py."""

import importlib.util

import pytest
import torch
from programs import ROOT
from torch import nn

from vqgen.codes import CodeLayout
from vqgen.planning.cost import prior_cost, without_memory
from vqgen.priors.prior import Prior
from vqgen.settings import Stage2Config
from vqgen.tokenizers import build_tokenizer
from vqgen.training.schedule import num_parameters

CLASSES = ["a", "b"]


def cost(**train):
    spec = importlib.util.spec_from_file_location("stage2_train", ROOT / "stage2/train.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    config = Stage2Config(context_noise=0)
    config.data["image_size"], config.optim.name = 32, "adamw"
    for key, value in train.items():
        setattr(config.train, key, value)
    with without_memory(torch.float32):
        tokenizer = build_tokenizer(channels=1, quantizer={"codebook_size": 32})
    return prior_cost(program, config, tokenizer, CLASSES)


@pytest.fixture(scope="module")
def prior():
    """The same prior, with memory: 128 wide, 4 layers, 16 tokens of 32."""
    return Prior(CodeLayout(((1, 4, 4),), (32,)), CLASSES)


def test_the_products_of_a_step_are_those_of_the_weights_and_of_the_attention(prior):
    weights = sum(layer.weight.numel() for layer in prior.lm.modules() if isinstance(layer, nn.Linear))
    tokens, width, layers = 16, 128, 4
    # Two products forward in the attention; five backward, as a fused kernel computes the scores again.
    attention = layers * (2 + 5) * 2 * tokens**2 * width
    assert cost().flops == 3 * 2 * tokens * weights + attention
    assert cost().parameters == num_parameters(prior)


def test_the_memory_of_weights_is_that_of_four_copies_and_the_gradients(prior):
    # float32: weights, gradients, two moments, average; and at most 10 % for what does not grow with the batch
    assert 1.0 <= cost().fixed / (5 * 4 * num_parameters(prior)) < 1.1


def test_activations_are_smaller_in_bf16_and_still_smaller_if_computed_again():
    plain, bf16, again = cost(), cost(mixed_precision="bf16"), cost(activation_checkpointing=True)
    assert 0.5 < bf16.each / plain.each < 0.9
    assert again.each < 0.5 * plain.each
    assert 1.2 < again.flops / plain.flops < 4 / 3
    assert again.memory(10) - again.memory(4) == pytest.approx(6 * again.each)
