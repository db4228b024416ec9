"""The prior: the dependences of its logits, and its plain transformers checkpoint."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vqgen.codes import CodeLayout
from vqgen.errors import InputError
from vqgen.priors.prior import Prior

PLAIN = CodeLayout(((1, 2, 3),), (8,))
MANY = CodeLayout(((2, 2), (1, 2, 2)), (5, 7))  # 2 x 5 + 7 ids, 4 + 4 tokens
CLASSES = ["cat", "dog", "owl"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL_TYPES = ["llama", "gpt2", "qwen3", "mistral"]


def small(layout: CodeLayout = PLAIN, class_names=CLASSES, **options) -> Prior:
    torch.manual_seed(0)
    return Prior(layout, list(class_names), **{**SIZES, **options}).eval()


def random_tokens(layout: CodeLayout, batch: int = 3) -> torch.Tensor:
    ranges, generator = layout.token_ranges(), torch.Generator().manual_seed(0)
    share = torch.rand(batch, layout.num_tokens, generator=generator)
    return (ranges[:, 0] + share * (ranges[:, 1] - ranges[:, 0])).long()


# The logits


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("layout", [PLAIN, MANY], ids=["plain", "several codebooks"])
def test_logits_are_finite_exactly_where_a_token_is_legal(layout, model_type):
    logits = small(layout, model_type=model_type)(random_tokens(layout), torch.tensor([0, 2, -1]))
    assert logits.shape == (3, layout.num_tokens, layout.vocab_size)
    ids, ranges = torch.arange(layout.vocab_size), layout.token_ranges()
    legal = (ids >= ranges[:, :1]) & (ids < ranges[:, 1:])
    assert torch.equal(logits.isfinite(), legal.expand_as(logits))
    assert (logits[~legal.expand_as(logits)] == -torch.inf).all()


def test_the_legality_mask_has_a_row_for_each_codebook_not_for_each_position():
    side, levels, size = 8, 4, 512  # residual: four codebooks per position
    layout = CodeLayout(((levels, side, side),), (size,))
    prior = small(layout)
    buffers = dict(prior.named_buffers())
    assert buffers["illegal"].shape == (levels, levels * size)
    assert buffers["illegal_row"].shape == (layout.num_tokens,)
    own = sum(b.nbytes for name, b in buffers.items() if name.startswith("illegal"))
    assert own == levels * levels * size + 8 * layout.num_tokens
    assert not {"illegal", "illegal_row"} & prior.state_dict().keys()
    ranges, ids = layout.token_ranges(), torch.arange(layout.vocab_size)
    illegal = (ids < ranges[:, :1]) | (ids >= ranges[:, 1:])  # the definition, (N, vocab_size)
    logits = torch.randn(2, layout.num_tokens, layout.vocab_size + 4)
    expected = logits[..., : layout.vocab_size].masked_fill(illegal, -torch.inf)
    assert torch.equal(prior.legal(logits), expected)
    for start, end in ((5, 6), (7, 20), (255, 256)):
        assert torch.equal(prior.legal(logits[:, start:end], slice(start, end)), expected[:, start:end])


def test_a_single_codebook_needs_no_mask():
    assert not [name for name, _ in small().named_buffers() if name.startswith("illegal")]


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_depend_on_the_tokens_before_and_on_no_other(model_type):
    prior, class_ids = small(model_type=model_type), torch.tensor([1])
    tokens = random_tokens(PLAIN, batch=1)
    logits = prior(tokens, class_ids)
    for t in range(PLAIN.num_tokens):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 8
        same = torch.isclose(prior(changed, class_ids), logits, rtol=0, atol=1e-6).all(dim=2)[0]
        assert same.tolist() == [i <= t for i in range(PLAIN.num_tokens)]


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        *({"model_type": name} for name in (*MODEL_TYPES, "gemma2", "mamba")),
        {"model_type": "mistral", "sliding_window": 3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_logits_are_those_of_the_model_itself_without_its_search_for_packed_sequences(options):
    prior = small(**options)
    tokens, class_ids = random_tokens(PLAIN), torch.tensor([0, 2, -1])
    inputs = torch.cat([prior.class_tokens(class_ids), tokens[:, :-1]], dim=1)
    whole = prior.lm(input_ids=inputs, use_cache=False).logits[..., : PLAIN.vocab_size]
    assert torch.equal(prior(tokens, class_ids), whole)
    assert torch.equal(prior(tokens, class_ids), whole)  # nothing was kept of the pass before


@torch.no_grad()
def test_each_class_and_no_class_have_logits_of_their_own():
    logits = small()(random_tokens(PLAIN, 1).repeat(4, 1), torch.tensor([-1, 0, 1, 2]))
    differences = (logits[:, None] - logits[None]).abs().amax(dim=(2, 3))
    assert (differences + torch.eye(4) > 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_prior_of_any_order_adds_where_each_token_is_and_where_the_next_one_goes(model_type):
    prior, tokens, class_ids = small(MANY, model_type=model_type), random_tokens(MANY), torch.tensor([0, 2, -1])
    plain = prior(tokens, class_ids)
    prior.add_places(0.5)
    order = torch.stack([torch.randperm(8) for _ in range(3)])
    moved = tokens.gather(1, order)
    table, here, following = (part.weight for part in (prior.lm.get_input_embeddings(), *prior.places.children()))
    starts = torch.stack([table[MANY.vocab_size + 1 + c] for c in class_ids])
    rows = [starts + following[order[:, 0]]]
    rows += [table[moved[:, j]] + here[order[:, j]] + following[order[:, j + 1]] for j in range(7)]
    expected = prior.lm(inputs_embeds=torch.stack(rows, dim=1)).logits[..., : MANY.vocab_size]
    logits = prior(moved, class_ids, order)
    legal = plain.isfinite().gather(1, order[..., None].expand_as(logits))
    assert torch.equal(logits.isfinite(), legal)
    torch.testing.assert_close(logits[legal], expected[legal], rtol=0, atol=1e-5)
    in_turn = prior(tokens, class_ids, torch.arange(8).expand(3, -1))
    assert torch.equal(prior(tokens, class_ids), in_turn)
    assert not torch.allclose(in_turn, plain)


@torch.no_grad()
def test_a_prior_of_any_order_comes_back_from_its_files(tmp_path):
    prior, tokens, class_ids = small(MANY), random_tokens(MANY), torch.tensor([0, 2, -1])
    prior.add_places(0.25)
    prior.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path)
    assert again.random_orders == 0.25
    assert torch.equal(again(tokens, class_ids), prior(tokens, class_ids))
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.vqgen["random_orders"] == 0.25
    (tmp_path / "places.safetensors").unlink()
    with pytest.raises(InputError, match=r"does not load as a prior: .*places\.safetensors"):
        Prior.from_pretrained(tmp_path)
    assert small().random_orders is None


def test_gradient_is_finite_where_tokens_are_illegal():
    prior, tokens = small(MANY).train(), random_tokens(MANY)
    logits = prior(tokens, torch.tensor([0, 1, -1]))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert all(p.grad.isfinite().all() for p in prior.parameters())
    assert prior.lm.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "gemma2"])
def test_activations_that_are_computed_again_are_not_kept_and_change_no_bit(model_type, caplog):
    kept, gradients = [], []
    for again in (False, True):
        prior = small(model_type=model_type, num_hidden_layers=4).train()
        if again:
            prior.checkpoint_activations()
        size = 0

        def keep(x):
            nonlocal size
            size += x.numel()
            return x

        torch.manual_seed(1)  # for dropout
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = prior(random_tokens(PLAIN), torch.tensor([0, 2, -1])).square().mean()
        loss.backward()
        kept.append(size)
        gradients.append([p.grad for p in prior.parameters()])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert not caplog.records  # transformers warns of caches


def test_a_model_without_checkpointing_is_refused():
    with pytest.raises(InputError, match=r"^activation_checkpointing=true: transformers has none for ctrl"):
        small(model_type="ctrl").checkpoint_activations()


def test_an_unconditional_prior_works():
    prior = small(class_names=[])
    assert prior(random_tokens(PLAIN), torch.full((3,), -1)).shape == (3, 6, 8)
    assert prior.lm.config.vocab_size == 9


@torch.no_grad()
def test_compiles_without_a_graph_break():
    prior = small(MANY)
    tokens, class_ids = random_tokens(MANY), torch.tensor([0, 1, -1])
    compiled = torch.compile(prior, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, class_ids), prior(tokens, class_ids))


# The model inside


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("llama", {}),
        ("llama", {"intermediate_size": 40, "num_key_value_heads": 1, "attention_dropout": 0.1}),
        ("gpt2", {"n_inner": 40, "resid_pdrop": 0.3}),
        ("qwen3", {"head_dim": 8}),
    ],
)
def test_options_build_the_same_prior_again_and_are_the_given_ones(tmp_path, model_type, given):
    prior = small(model_type=model_type, **given)
    prior.save_pretrained(tmp_path)
    options = Prior.from_pretrained(tmp_path).options
    assert options == {"model_type": model_type, **SIZES, **given}
    again = Prior(prior.layout, prior.class_names, **options)
    again.load_state_dict(prior.state_dict())
    again.save_pretrained(tmp_path / "again")  # adds transformers' own items
    assert again.lm.config.to_dict() == prior.lm.config.to_dict()


def test_sizes_reach_the_model():
    config = small(intermediate_size=48, rms_norm_eps=0.5).lm.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)
    assert (config.intermediate_size, config.rms_norm_eps, config.num_key_value_heads) == (48, 0.5, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (8 + 1 + 3, 1 + 6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_width_and_depth_reach_every_model_type(model_type):
    prior = small(model_type=model_type)
    assert prior.lm.config.model_type == model_type
    assert prior.lm.get_input_embeddings().weight.shape[1] == 32
    assert prior.lm.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "lama"}, "^model_type=lama: .*the nearest is llama"),
        ({"model_type": "qqqqqqqq"}, "^model_type=qqqqqqqq"),
        ({"model_type": "vit"}, "vit"),
        ({"intermediat_size": 3}, "^intermediat_size.*did you mean intermediate_size"),
        ({"zzzz": 3}, "^zzzz"),
        ({"intermediate_size": "x"}, "intermediate_size"),
        ({"hidden_size": 33}, "^hidden_size=33 .* num_attention_heads=2"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "head"),  # rotary embeddings need an even head
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -8}, "hidden_size"),
    ],
    ids=str,
)
def test_what_transformers_cannot_build_is_an_input_error(options, message):
    with pytest.raises(InputError, match=message) as caught:
        small(**options)
    assert len(str(caught.value).splitlines()) == 1


# Saving and loading


@torch.no_grad()
def test_saved_prior_is_a_llama_of_transformers(tmp_path):
    prior, tokens = small(MANY), random_tokens(MANY)
    prior.save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    inputs = torch.cat([torch.full((3, 1), MANY.vocab_size + 1 + 2), tokens[:, :-1]], dim=1)
    logits = prior(tokens, torch.tensor([2, 2, 2]))
    legal = logits.isfinite()
    assert torch.equal(llama(inputs).logits[..., : MANY.vocab_size][legal], logits[legal])


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("resaved", [False, True], ids=["saved", "saved, loaded and saved again"])
def test_generate_of_transformers_draws_no_class_tokens(tmp_path, model_type, resaved):
    prior = small(model_type=model_type)
    inputs = torch.full((20, 1), PLAIN.vocab_size + 1)
    embeddings = prior.lm.get_output_embeddings().weight
    codes = PLAIN.vocab_size
    # These weights are aligned with the hidden state, so class tokens have by far the highest logits.
    embeddings[codes:] = 50 * prior.lm(inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    assert (prior.lm(inputs).logits[:, -1].argmax(dim=1) >= codes).all()
    prior.save_pretrained(tmp_path)
    if resaved:
        generation = json.loads((tmp_path / "generation_config.json").read_text())
        del generation["suppress_tokens"]  # as older versions wrote it
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        Prior.from_pretrained(tmp_path).save_pretrained(tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = lm.generate(inputs, max_new_tokens=PLAIN.num_tokens, do_sample=True)[:, 1:]
    assert tokens.shape == (20, PLAIN.num_tokens)
    assert (tokens < codes).all()
    assert len(tokens.unique()) > 1


@pytest.mark.parametrize("inside", ["", "prior", "model/prior"])
@pytest.mark.parametrize("as_type", [str, Path])
def test_a_prior_loads_from_a_run_its_model_or_its_own_folder(tmp_path, monkeypatch, inside, as_type):
    prior = small()
    prior.save_pretrained(tmp_path / inside)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for folder in (tmp_path, Path("~", tmp_path.name)):
        back = Prior.from_pretrained(as_type(folder))
        assert not back.training
        assert all(map(torch.equal, back.parameters(), prior.parameters()))


def test_a_home_that_nobody_has_is_an_input_error():
    with pytest.raises(InputError, match="~nobody-at-all/run"):
        Prior.from_pretrained("~nobody-at-all/run")


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_saved_prior_comes_back_whole(tmp_path, model_type):
    prior, tokens, class_ids = small(MANY, model_type=model_type), random_tokens(MANY), torch.tensor([0, 2, -1])
    prior.save_pretrained(tmp_path)
    back = Prior.from_pretrained(tmp_path)
    assert (back.layout, back.class_names) == (MANY, CLASSES)
    assert torch.equal(back(tokens, class_ids), prior(tokens, class_ids))
    assert back.state_dict().keys() == prior.state_dict().keys()


def test_folder_without_a_prior_is_refused(tmp_path):
    with pytest.raises(InputError, match="no prior there"):
        Prior.from_pretrained(tmp_path)


def test_another_language_model_is_refused(tmp_path):
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not one that vqgen trained"):
        Prior.from_pretrained(tmp_path)


@pytest.mark.parametrize("trap", ["pickled weights", "code beside the weights"])
def test_nothing_in_a_folder_is_run(tmp_path, trap):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "prior"
    small().save_pretrained(folder)
    if trap == "pickled weights":
        (folder / "model.safetensors").unlink()
        torch.save({"weight": Trap()}, folder / "pytorch_model.bin")
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(InputError, match="does not load as a prior"):
        Prior.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["no weights", "truncated weights", "broken config", "config of a tokenizer"])
def test_damaged_folder_is_refused(tmp_path, damage):
    small().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:500])
    else:
        config.write_text("{" if damage == "broken config" else json.dumps({"channels": 3}))
    with pytest.raises(InputError) as caught:
        Prior.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
