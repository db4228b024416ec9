"""The tokenizer: images to codes and back, and to disk and back."""

import copy
import hashlib
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vqgen.codes import CodeLayout
from vqgen.errors import InputError
from vqgen.priors.prior import Prior
from vqgen.quantizers import QUANTIZERS, quantizer_options
from vqgen.tokenizers import ARCHITECTURES, Light, build_tokenizer
from vqgen.tokenizers.vqmodel import VQModel, from_uint8, load_tokenizer, to_uint8

OPTIONS = {
    "channels": 1,
    "patch_size": 2,
    "widths": [8, 16],
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "quantizer": {"name": "ema", "codebook_size": 16, "code_dim": 4},
}


def small(**changes) -> VQModel:
    """A tokenizer of stride 4 that tells images apart: its codes differ, and its blocks are not the identity."""
    torch.manual_seed(0)
    model = Light(**{**OPTIONS, **changes}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():  # codes where the vectors are
        z = model.to_code(model.encoder(images(16, model.channels, size=32)))
    vectors = z.movedim(1, -1).flatten(0, -2)  # (N, D)
    model.quantizer.codebook.data.copy_(vectors[torch.arange(len(model.quantizer.codebook)) * 7 % len(vectors)])
    return model


def images(batch: int = 2, channels: int = 1, size: int = 16) -> torch.Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# Shapes and values


@pytest.mark.parametrize(
    ("changes", "stride"),
    [({}, 4), ({"channels": 3, "widths": [8]}, 2), ({"patch_size": 4, "widths": [8, 8, 24], "encoder_blocks": 0}, 16)],
)
def test_shapes_follow_the_stride(changes, stride):
    model = small(**changes)
    x = images(channels=model.channels, size=32)
    x_rec, q = model(x)
    assert x_rec.shape == x.shape
    assert [out.codes.shape for out in q] == [(2, 1, 32 // stride, 32 // stride)]
    assert model.stride == stride
    layout = model.code_layout(32)
    assert layout == CodeLayout(((1, 32 // stride, 32 // stride),), (16,))
    assert layout.flatten(model.encode(x)).shape == (2, layout.num_tokens)


def test_images_need_not_be_square():
    x_rec, q = small()(images()[..., :8])
    assert (x_rec.shape, q[0].codes.shape) == ((2, 1, 16, 8), (2, 1, 4, 2))


@torch.no_grad()
def test_decode_of_encode_is_the_reconstruction_bit_for_bit():
    model, x = small(), images()
    codes = model.encode(x)
    x_rec, q = model(x)
    assert len(codes[0].unique()) > 3  # otherwise equality would prove little
    assert torch.equal(codes[0], q[0].codes)
    assert torch.equal(model.decode(codes), x_rec)


def test_gradient_reaches_every_parameter_on_both_sides_of_the_codes():
    model = small().train()
    x = images()
    x_rec, q = model(x)
    ((x_rec - x).square().mean() + q[0].loss).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("size", "near"), [(18, (16, 20)), (3, (4, 8)), (0, (4, 8)), (-4, (4, 8))])
def test_size_off_the_stride_is_refused_with_two_that_work(size, near):
    with pytest.raises(InputError) as caught:
        small().code_layout(size)
    message = str(caught.value)
    assert message == (f"image_size={size} is not divisible by the model's stride 4; use {near[0]} or {near[1]}")
    assert all(small().code_layout(n).num_tokens for n in near)


REFUSED = {
    "a quantizer that does not exist": ({"quantizer": {"name": "emma"}}, "quantizer.name=emma: no such quantizer; "),
    "a quantizer's option": (
        {"quantizer": {"codebok_size": 3}},
        "quantizer.codebok_size: ema has no such option; did you mean quantizer.codebook_size?",
    ),
    "a quantizer's value": (
        {"quantizer": {"name": "lfq", "codebook_size": 500}},
        "quantizer.codebook_size=500: lfq needs a power of two; use 256 or 512",
    ),
    "a level's value": ({"quantizer": {"name": "residual", "base": {"decay": 2.0}}}, "quantizer.base.decay=2.0: must"),
    "an architecture that does not exist": (
        {"name": "heavy"},
        "name=heavy: no such architecture; there is light, vqgan",
    ),
    "a mistyped option": ({"width": [8]}, "width: light has no such option; did you mean widths?"),
    "an unknown option": ({"zzzz": 1}, "zzzz: light has no such option; it takes channels, patch_size, widths, "),
    "two channels": ({"channels": 2}, "channels=2: must be 1 or 3"),
    "no pixel": ({"patch_size": 0}, "patch_size=0: must be at least 1"),
    "half a pixel": ({"patch_size": 0.5}, "patch_size=0.5: must be a whole number"),
    "no resolution": ({"widths": []}, "widths=[]: must be 1 to 16 numbers of channels"),
    "too many blocks": ({"encoder_blocks": 1001}, "encoder_blocks=1001: must be at most 1000"),
    "fewer than no blocks": ({"decoder_blocks": -1}, "decoder_blocks=-1: must be at least 0"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_options_are_named_as_the_constructor_names_them(options, message):
    with pytest.raises(InputError) as caught:
        build_tokenizer(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_all_256_values_survive_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(values)
    assert (x.min(), x.max(), x.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(x), values)


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-9.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(torch.tensor([1.0], dtype=torch.bfloat16)).tolist() == [255]


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training):
    model, compiled = small().train(training), small().train(training)
    x = images()
    (x_rec, q), (x_rec_c, q_c) = model(x), torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(q[0].codes, q_c[0].codes)
    torch.testing.assert_close(x_rec, x_rec_c)
    if training:
        x_rec_c.square().mean().backward()
        assert compiled.encoder[0].weight.grad.abs().sum() > 0


# Saving and loading


def test_saved_model_comes_back_bit_for_bit(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    back = VQModel.from_pretrained(tmp_path)
    assert not back.training
    assert model.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(back(images())[0], model(images())[0])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_config_json_is_the_architecture_s_name_and_all_of_its_options(tmp_path, name):
    Light(widths=(8, 16), quantizer={"name": name}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("name") == "light"
    assert saved.keys() == inspect.signature(Light).parameters.keys()
    assert (saved["patch_size"], saved["widths"]) == (
        inspect.signature(Light).parameters["patch_size"].default,
        [8, 16],
    )
    assert saved["quantizer"] == json.loads(json.dumps(quantizer_options(name=name)))


def test_an_architecture_without_a_name_is_not_saved(tmp_path):
    class Nameless(Light):
        pass

    with pytest.raises(InputError, match="Nameless cannot be saved: it has no name in"):
        Nameless(**OPTIONS).save_pretrained(tmp_path)


def test_a_further_architecture_is_a_dict_entry(tmp_path, monkeypatch):
    class Flat(VQModel):
        def __init__(self, channels: int = 1, side: int = 4, quantizer: dict | None = None):
            super().__init__(channels, side, quantizer)
            dim = self.quantizer.code_dim
            self.encoder = torch.nn.Conv2d(channels, 8, side, stride=side)
            self.to_code, self.from_code = torch.nn.Conv2d(8, dim, 1), torch.nn.Conv2d(dim, 8, 1)
            self.decoder = torch.nn.ConvTranspose2d(8, channels, side, stride=side)

        @property
        def last_layer(self) -> torch.nn.Parameter:
            return self.decoder.weight

    monkeypatch.setitem(ARCHITECTURES, "flat", Flat)
    model = build_tokenizer("flat", side=8, quantizer={"name": "fsq"}).eval()
    model.save_pretrained(tmp_path)
    back = VQModel.from_pretrained(tmp_path)
    assert type(back) is Flat
    assert back.code_layout(16) == CodeLayout(((1, 2, 2),), (512,))
    assert torch.equal(back(images())[0], model(images())[0])
    with pytest.raises(InputError, match="its tokenizer is not a Light but a Flat"):
        Light.from_pretrained(tmp_path)
    monkeypatch.undo()
    assert "its architecture 'flat' is not in this version of vqgen, which has light, vqgan; use" in error_of(tmp_path)


def test_config_json_of_a_version_that_had_no_names_is_light_with_its_first_blocks(tmp_path):
    model = small(block="residual", head_width=0)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OPTIONS))
    assert torch.equal(VQModel.from_pretrained(tmp_path)(images())[0], model(images())[0])


@pytest.mark.parametrize(
    ("inside", "given"),
    [(inside, given) for inside in ("", "model", "model/tokenizer") for given in ("", "model", "model/tokenizer")
     if inside.startswith(given)],
)  # fmt: skip
def test_from_pretrained_takes_a_run_and_the_folders_in_it(tmp_path, monkeypatch, inside, given):
    model = small()
    model.save_pretrained(tmp_path / "run" / inside)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path / "run" / given, str(tmp_path / "run" / given), f"~/run/{given}"):
        back = VQModel.from_pretrained(folder)
        assert torch.equal(back(images())[0], model(images())[0])
        assert not back.training
        assert all(p.requires_grad for p in back.parameters())


def test_from_pretrained_of_what_is_no_tokenizer_is_one_line(tmp_path):
    for folder, said in (
        (tmp_path, "is not a tokenizer: it has no config.json"),
        ("~nobody-at-all/x", "home directory"),
    ):
        with pytest.raises(InputError, match=said):
            VQModel.from_pretrained(folder)


@pytest.mark.parametrize("inside", ["", "model"])
def test_tokenizer_loads_from_a_run_and_from_its_own_folder(tmp_path, inside):
    model = small()
    model.save_pretrained(tmp_path / inside)
    tokenizer, digest = load_tokenizer(tmp_path)
    content = [(tmp_path / inside / name).read_bytes() for name in ("config.json", "model.safetensors")]
    assert digest == hashlib.sha256(b"".join(content)).hexdigest()
    assert not tokenizer.training
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert torch.equal(tokenizer.encode(images())[0], model.encode(images())[0])


def error_of(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    return message


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_with_a_file_missing_is_no_tokenizer(tmp_path, missing):
    small().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    assert f"it has no {missing}" in error_of(tmp_path)


def test_folder_that_is_not_there_is_no_tokenizer(tmp_path):
    assert "give a stage-1 run, such as runs/stage1" in error_of(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "3",
        "{}",
        '{"architectures": ["Other"], "hidden_size": 3}',
        json.dumps({**OPTIONS, "widths": [8, 8]}),
        json.dumps({**OPTIONS, "channels": "x"}),
        json.dumps({**OPTIONS, "quantizer": {"name": "other"}}),
        json.dumps({**OPTIONS, "quantizer": {"option": 3}}),
    ],
)
def test_config_json_of_something_else_is_an_input_error(tmp_path, config):
    small().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    error_of(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 500, -1])
def test_truncated_weights_are_an_input_error(tmp_path, size):
    small().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    error_of(tmp_path)


def test_weights_of_another_model_are_an_input_error(tmp_path):
    small().save_pretrained(tmp_path / "a")
    small(quantizer={"name": "ema", "codebook_size": 8, "code_dim": 4}).save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    assert "does not load as a tokenizer" in error_of(tmp_path / "a")


@pytest.mark.parametrize("change", ["one missing", "one too many"])
def test_weights_must_be_all_of_the_model_s_and_no_others(tmp_path, change):
    small().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "one missing":
        del weights["to_code.bias"]
    else:
        weights["further.bias"] = torch.zeros(4)
    save_file(weights, tmp_path / "model.safetensors")
    assert "does not load as a tokenizer" in error_of(tmp_path)


def test_a_prior_is_no_tokenizer(tmp_path):
    Prior(CodeLayout(((1, 2),), (4,)), [], hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path
    )
    error_of(tmp_path)


def test_everything_that_decides_the_codes_is_in_the_weights_file(tmp_path):
    small().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == small().state_dict().keys()


# Frozen parts


def named(part: str) -> tuple[str, ...]:
    return {"encoder": ("encoder.", "to_code."), "decoder": ("decoder.", "from_code.")}.get(part, ("quantizer.",))


@pytest.mark.parametrize("quantizer", ["ema", "vq", "simvq", "fsq", "lfq", "ibq", "residual"])
@pytest.mark.parametrize("frozen", ["encoder", "quantizer", "decoder", "encoder quantizer", "quantizer decoder"])
def test_what_is_frozen_does_not_learn_and_the_rest_has_the_gradient_it_had(frozen, quantizer):
    options = {} if quantizer in ("fsq", "lfq", "residual") else {"codebook_size": 16, "code_dim": 4}
    options |= {"levels": [4, 4]} if quantizer == "fsq" else {}
    options |= {"base": {"name": "vq", "codebook_size": 8, "code_dim": 4}} if quantizer == "residual" else {}
    torch.manual_seed(0)
    free = build_tokenizer(channels=1, widths=[8, 16], quantizer={"name": quantizer, **options}).train()
    x = images(16)
    free(x)  # starts the codebook
    frozen_one = copy.deepcopy(free)
    frozen_one.freeze(frozen.split())
    before = {name: value.clone() for name, value in frozen_one.state_dict().items()}
    for model in (frozen_one.train(), free):
        x_rec, (q,) = model(x)
        (F.mse_loss(x_rec, x) + q.loss).backward()
    stays = tuple(prefix for part in frozen.split() for prefix in named(part))
    for name, value in frozen_one.state_dict().items():
        assert torch.equal(value, before[name]) or not name.startswith(stays), name
    fresh = free.zero_grad() or copy.deepcopy(free)
    fresh.load_state_dict(before)
    for part in frozen.split():  # as evaluations do it
        getattr(fresh, part).eval()
    x_rec, (q,) = fresh(x)
    (F.mse_loss(x_rec, x) + q.loss).backward()
    for (name, p), other in zip(frozen_one.named_parameters(), fresh.parameters(), strict=True):
        if name.startswith(stays):
            assert p.grad is None, name
            assert not p.requires_grad, name
        else:
            torch.testing.assert_close(p.grad, other.grad, msg=name)


def test_codes_that_stay_cost_no_gradient_and_no_loss():
    for name in ("ema", "vq", "ibq"):
        model = small(quantizer={"name": name, "codebook_size": 16, "code_dim": 4})
        model.freeze(["encoder", "quantizer"])
        codes = model.encode(images())[0]
        recorded = []  # ibq's softmax over all codes, say, serves only a gradient
        model.quantizer.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))  # noqa: B023
        x_rec, (q,) = model.train()(images())
        assert recorded == [False]
        assert torch.equal(q.codes, codes)
        assert q.loss == 0
        assert not q.loss.requires_grad
        assert not q.z_q.requires_grad
        assert x_rec.requires_grad
        assert not any(module.training for module in (*model.encoder.modules(), *model.quantizer.modules()))
        assert model.decoder.training
        assert model.from_code.training


def test_with_a_frozen_encoder_the_loss_is_the_codebook_s_alone():
    model = small(quantizer={"name": "vq", "codebook_size": 16, "code_dim": 4, "revive_below": 0.0}).train()
    model.quantizer.initialised = True
    with torch.no_grad():
        z = model.to_code(model.encoder(images()))
        mse = F.mse_loss(z, model.eval().quantizer(z).z_q).item()
    assert model(images())[1][0].loss.item() == pytest.approx(1.5 * mse)  # eq. 3 with beta = 0.5
    model.freeze(["encoder"])
    assert model(images())[1][0].loss.item() == pytest.approx(mse)


def test_a_frozen_tokenizer_compiles_whole():
    model = small()
    expected = model(images())[0]
    model.freeze(["encoder", "quantizer"])
    x_rec, (q,) = torch.compile(model.train(), fullgraph=True, backend="eager")(images())
    torch.testing.assert_close(x_rec, expected)
    assert q.loss == 0
    assert x_rec.requires_grad


def test_parts_that_are_none_or_all_are_refused():
    with pytest.raises(InputError, match=r"freeze=head: no such part; there is encoder, quantizer, decoder"):
        small().freeze(["encoder", "head"])
    with pytest.raises(InputError, match=r"freeze=\[encoder,decoder\]: leaves no weights that a gradient trains"):
        small().freeze(["encoder", "decoder"])  # an ema codebook has no gradient
    small(quantizer={"name": "vq", "codebook_size": 16, "code_dim": 4}).freeze(["encoder", "decoder"])
