"""The decoder with a cache against transformers' own forward pass."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from vqgen.codes import CodeLayout
from vqgen.priors.decoder import AnyDecoder, LlamaDecoder, decoder_of
from vqgen.priors.prior import Prior

LAYOUT = CodeLayout(((1, 5, 5),), (40,))
PLAIN = {
    "llama": {},
    "llama, grouped queries": {"num_key_value_heads": 2},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 32},
    "llama, another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "qwen3": {},
    "mistral": {},  # whose window of 4,096 tokens covers all
    "mistral without a window": {"sliding_window": None},
}
OTHERS = {
    "gpt2": {},
    "gpt_neox": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, stretched": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama, another activation": {"hidden_act": "gelu"},
    "mistral": {"sliding_window": 5},
    "mamba": {},
}


def trained(model: str, **options) -> Prior:
    """A prior none of whose weights is one or zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    prior = Prior(LAYOUT, ["a", "b"], model.split(",")[0].split()[0], **{**sizes, **options}).eval()
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return prior


def passes(prior: Prior, decoder, rows: slice, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The logits after parts of these lengths, (R, parts, V)."""
    found, start = [], 0
    for n in lengths:
        found.append(decoder(tokens[:, start : start + n], rows, slice(start, start + n)))
        start += n
    return torch.stack(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("model", "options"), PLAIN.items(), ids=PLAIN)
def test_logits_are_those_of_transformers_at_every_place(model, options):
    prior = trained(model, **options)
    decoder = decoder_of(prior.lm, 6, 26)
    assert isinstance(decoder, LlamaDecoder)
    tokens = torch.randint(0, 43, (6, 26))
    expected = prior.lm(input_ids=tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(passes(prior, decoder, slice(0, 6), tokens, [1] * 26), expected, rtol=0, atol=1e-4)
    in_parts = passes(prior, decoder_of(prior.lm, 6, 26), slice(0, 6), tokens, [7, 1, 5, 13])
    torch.testing.assert_close(in_parts, expected[:, [6, 7, 12, 25]], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("model", "options"), OTHERS.items(), ids=OTHERS)
def test_other_models_take_their_own_pass(model, options):
    prior = trained(model, **options)
    decoder = decoder_of(prior.lm, 6, 26)
    assert isinstance(decoder, AnyDecoder)
    tokens = torch.randint(0, 43, (6, 26))
    expected = prior.lm(input_ids=tokens).logits
    torch.testing.assert_close(passes(prior, decoder, slice(0, 6), tokens, [1] * 26), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox"])
def test_a_sequence_does_not_depend_on_its_company(model):
    """To the last bit, with several threads and many rows. Few rows are multiplied otherwise, and are padded."""
    prior, before = trained(model), torch.get_num_threads()
    tokens, parts = torch.randint(0, 43, (96, 26)), []
    torch.set_num_threads(2)
    for count in (96, 32):
        rows = slice(0, count)
        parts.append(passes(prior, decoder_of(prior.lm, count, 26), rows, tokens[rows], [1] * 26))
    torch.set_num_threads(before)
    assert torch.equal(parts[0][:32], parts[1])


@torch.no_grad()
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_groups_of_sequences_grow_apart_and_together(model):
    prior = trained(model)
    decoder, tokens = decoder_of(prior.lm, 3, 26, groups=2), torch.randint(0, 43, (6, 8))
    expected = prior.lm(input_ids=tokens).logits
    first, second, both = slice(0, 3), slice(3, 6), slice(0, 6)
    decoder(tokens[:3, :5], first, slice(0, 5))
    logits = decoder(tokens[3:, :5], second, slice(0, 5))
    torch.testing.assert_close(logits, expected[3:, 4], rtol=0, atol=1e-4)
    logits = decoder(tokens[:, 5:6], both, slice(5, 6))
    torch.testing.assert_close(logits, expected[:, 5], rtol=0, atol=1e-4)
    logits = decoder(tokens[:3, 6:7], first, slice(6, 7))
    torch.testing.assert_close(logits, expected[:3, 6], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_place_may_be_a_tensor():
    prior = trained("llama")
    decoder, tokens = decoder_of(prior.lm, 4, 26), torch.randint(0, 43, (4, 26))
    expected = prior.lm(input_ids=tokens).logits
    for place in range(26):
        logits = decoder(tokens[:, place, None], slice(0, 4), torch.tensor([place]))
        torch.testing.assert_close(logits, expected[:, place], rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_pass_compiles_as_one_graph_for_all_places():
    prior = trained("qwen3")
    decoder, tokens, counter = decoder_of(prior.lm, 4, 26), torch.randint(0, 43, (4, 26)), CompileCounter()
    compiled = torch.compile(decoder.__call__, fullgraph=True, dynamic=False, backend=counter)
    expected = prior.lm(input_ids=tokens).logits
    for place in range(26):
        logits = compiled(tokens[:, place, None], slice(0, 4), torch.tensor([place]))
        torch.testing.assert_close(logits, expected[:, place], rtol=0, atol=1e-4)
    assert counter.frame_count == 1
    torch.compiler.reset()


@torch.no_grad()
def test_a_step_waits_for_no_device():
    """On the meta device, what needs a value fails."""
    prior = trained("llama").to("meta")
    decoder, tokens = decoder_of(prior.lm, 4, 26), torch.zeros(4, 1, dtype=torch.int64, device="meta")
    assert decoder(tokens, slice(0, 4), slice(7, 8)).shape == (4, 43)
    assert decoder(tokens, slice(0, 4), torch.zeros(1, dtype=torch.int64, device="meta")).shape == (4, 43)
