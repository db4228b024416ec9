"""What a user asks of the samples: completions, masks, variations, the best of several, batches that fit in memory."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vqgen.adversarial.dcgan import DCGANGenerator
from vqgen.cli.runs import run_images
from vqgen.codes import CodeLayout
from vqgen.errors import InputError
from vqgen.evaluation import features
from vqgen.evaluation.features import load_feature_network
from vqgen.evaluation.report import evaluation_device
from vqgen.generator import Generator
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import (
    ROWS,
    image_generators,
    log_likelihood,
    sample_images,
    sample_maps,
    sample_tokens,
    steps,
)
from vqgen.tokenizers.vqmodel import from_uint8, load_tokenizer, to_uint8

CLASSES = ["cat", "dog"]


@pytest.fixture(scope="module")
def small(runs) -> Generator:
    """An untrained prior of named classes on a trained tokenizer."""
    tokenizer, _ = load_tokenizer(runs / "stage1")
    torch.manual_seed(0)
    prior = Prior(tokenizer.code_layout(32), CLASSES, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        for p in prior.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return Generator(prior.eval(), tokenizer)


@pytest.fixture(scope="module")
def digit() -> Image.Image:
    """A grey image of the model's size."""
    array = np.zeros((32, 32), np.uint8)
    array[4:28, 12:18] = 255
    return Image.fromarray(array)


def codes_of(generator: Generator, images: list[Image.Image]) -> torch.Tensor:
    """The codes of images of the model's size, (B, H, W)."""
    x = np.stack([np.asarray(image.convert("L")) for image in images])[:, None].repeat(generator.channels, axis=1)
    return generator.tokenizer.encode(from_uint8(torch.from_numpy(x)))[0][:, 0]


def drawn_tokens(generator: Generator, monkeypatch, **options) -> torch.Tensor:
    """The tokens (B, N) that `sample` decodes."""
    seen, decode = [], generator.tokenizer.decode
    monkeypatch.setattr(generator.tokenizer, "decode", lambda codes: seen.append(codes) or decode(codes))
    count = len(generator.sample(**options))
    return torch.cat([generator.model.layout.flatten(codes) for codes in seen])[:count]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_a_completion_keeps_the_first_rows_and_draws_the_others(small, digit, monkeypatch, cfg_scale):
    original = codes_of(small, [digit])[0].flatten()
    tokens = drawn_tokens(small, monkeypatch, num_images=9, image=digit, keep_rows=0.5, cfg_scale=cfg_scale)
    half = len(original) // 2
    assert (tokens[:, :half] == original[:half]).all()
    assert len(tokens[:, half:].unique(dim=0)) > 1
    assert (tokens[:, half:] != original[half:]).any()


def test_a_mask_says_what_is_drawn(small, digit, monkeypatch):
    original = codes_of(small, [digit])[0]
    mask = np.zeros((32, 32), np.uint8)
    mask[20, 9] = 200
    tokens = drawn_tokens(small, monkeypatch, num_images=40, image=digit, mask=mask)
    changed = (tokens.view(-1, *original.shape) != original).any(dim=0)
    stride = 32 // original.shape[0]
    assert changed.nonzero().tolist() == [[20 // stride, 9 // stride]]


def test_a_variation_changes_a_share_of_the_codes_and_each_image_others(small, digit, monkeypatch):
    known = small.known_tokens(digit, 6, seed=3, vary=0.25)
    assert ((known < 0).sum(dim=1) == round(0.25 * known.shape[1])).all()
    assert len((known < 0).unique(dim=0)) > 1
    assert torch.equal(known[:4], small.known_tokens(digit, 4, seed=3, vary=0.25))
    tokens = drawn_tokens(small, monkeypatch, num_images=6, seed=3, image=digit, vary=0.25)
    assert torch.equal(tokens[known >= 0], known[known >= 0])


def test_an_image_of_another_size_comes_to_the_model_s_and_that_is_said(small, digit, caplog):
    same = small.known_tokens(digit, 1, seed=0, keep_rows=0.5)
    assert not caplog.messages
    large = small.known_tokens(digit.resize((64, 64), Image.Resampling.NEAREST), 1, seed=0, keep_rows=0.5)
    assert torch.equal(large, same)
    assert "image of 64 x 64 pixels comes to the model's 32 x 32" in caplog.text


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((32, 32), np.uint8), "nothing is lighter than middle grey"),
        (np.full((32, 31), 255, np.uint8), "mask: has 32 x 31 pixels, the image has 32 x 32"),
        (np.zeros((3, 32, 32, 3), np.float32), "is not an image"),
        (np.zeros((2, 32, 32, 3), np.uint8), "mask: 2 images were given; give one"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(small, digit, mask, message):
    with pytest.raises(InputError, match=message):
        small.sample(image=digit, mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "digit"}, "give one of keep_rows"),
        ({"image": "digit", "keep_rows": 0.5, "vary": 0.5}, "give one of keep_rows"),
        ({"keep_rows": 0.5}, "give image="),
        ({"image": "digit", "keep_rows": 1.0}, "from 0 to below 1"),
        ({"image": "digit", "vary": 0.0}, "above 0"),
        ({"image": "digit", "keep_rows": 0.99}, "keeps all 32 rows"),
        ({"best_of": 2, "toward": "dog"}, "the best for one class says nothing of two"),
        ({"precision": "fp16"}, "precision=fp16"),
        ({"best_of": 0}, "best_of=0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"cfg_start": 2.0}, "cfg_start=2.0"),
        ({"cfg_power": -1.0}, "cfg_power=-1.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(small, digit, options, message):
    with pytest.raises(InputError, match=message):
        small.sample(**{name: digit if value == "digit" else value for name, value in options.items()})


def test_sample_py_completes_an_image_as_the_generator_does(runs, program, tmp_path, digit):
    digit.save(tmp_path / "image.png")
    arguments = ["stage2/sample.py", runs / "stage2", "num_images=5", f"out={tmp_path}/out", "class_ids=[7]"]
    code, printed, errors = program(*arguments, f"image={tmp_path}/image.png", "keep_rows=0.5")
    assert code == 0, errors
    assert "codes are drawn, each from those before it\n" in printed
    drawn = np.load(tmp_path / "out/samples.npz")["images"]
    images = Generator.from_pretrained(runs / "stage2").sample(7, 5, image=digit, keep_rows=0.5)
    assert np.array_equal(
        drawn.squeeze(-1) if drawn.shape[-1] == 1 else drawn, np.stack([np.asarray(i) for i in images])
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("image={folder}/none.png keep_rows=0.5", "none.png: No such file or directory; give an image file"),
        ("image={folder}/text.png keep_rows=0.5", "text.png: is no image that Pillow knows; give an image file"),
        ("image={folder}/image.png", "give one of keep_rows"),
        ("image={folder}/image.png mask={folder}/text.png", "mask="),
    ],
)
def test_sample_py_refuses_what_it_cannot_start_from(runs, program, tmp_path, digit, given, message):
    digit.save(tmp_path / "image.png")
    (tmp_path / "text.png").write_text("no image")
    words = given.format(folder=tmp_path).split()
    code, _, errors = program("stage2/sample.py", runs / "stage2", *words, f"out={tmp_path}/out")
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_guidance_needs_a_prior_that_has_seen_images_without_a_class(runs, program, tmp_path):
    settings = [f"stage1={runs}/stage1", f"run_dir={tmp_path}/2", f"codes_dir={tmp_path}/codes", "class_dropout=0"]
    settings += ["train.max_steps=2", "tracking.wandb=disabled"]
    code, _, errors = program("stage2/train.py", "configs/debug/stage2.yaml", *settings)
    assert code == 0, errors
    code, _, errors = program("stage2/sample.py", tmp_path / "2", "num_images=2")
    assert code == 2
    assert errors == (
        "error: cfg_scale=1.5: the prior was trained with class_dropout=0, so it knows no images without a class; "
        "use cfg_scale=1\n"
    )
    code, _, errors = program("stage2/sample.py", tmp_path / "2", "num_images=2", "cfg_scale=1")
    assert code == 0, errors
    assert Generator.from_pretrained(runs / "stage2").model.class_dropout == 0.05


def test_a_cuda_graph_needs_a_cuda_device(small):
    with pytest.raises(InputError, match="cuda_graph=true: needs a GPU, and not the cpu"):
        small.sample(num_images=2, cuda_graph=True)


def test_a_gan_completes_and_mixes_nothing(digit):
    gan = Generator(DCGANGenerator(16, 1, ["a", "b"], width=4).eval())
    with pytest.raises(InputError, match="a GAN starts from noise"):
        gan.sample(image=digit, keep_rows=0.5)
    with pytest.raises(InputError, match="only a prior mixes classes"):
        gan.sample(toward="b")


def test_images_turn_into_another_class(small, monkeypatch):
    """The first is that of the one class, and the last that of the other, with the noise of their numbers."""
    turning = drawn_tokens(small, monkeypatch, class_ids="cat", toward="dog", num_images=5)
    cats, dogs = (drawn_tokens(small, monkeypatch, class_ids=name, num_images=5) for name in CLASSES)
    assert torch.equal(turning[0], cats[0])
    assert torch.equal(turning[4], dogs[4])
    assert not torch.equal(turning[2], cats[2])
    assert not torch.equal(turning[2], dogs[2])
    with pytest.raises(InputError, match="class_ids: bird is not a class"):
        small.sample("cat", toward="bird")


def test_the_best_of_several_is_the_likeliest_and_the_first_is_the_one_without_others(small):
    class_ids = torch.tensor([0, 1, -1, 1])
    prior, tokenizer, kept = small.model, small.tokenizer, {}

    def tokens_of(best_of: int) -> torch.Tensor:
        codes = []
        decode = tokenizer.decode
        tokenizer.decode = lambda given: codes.append(given) or decode(given)
        try:
            sample_images(prior, tokenizer, class_ids, seed=5, best_of=best_of, cfg_scale=2.0)
        finally:
            del tokenizer.decode
        return torch.cat([prior.layout.flatten(part) for part in codes])[: len(class_ids)]

    kept = {count: tokens_of(count) for count in (1, 2, 8)}
    likelihoods = {count: log_likelihood(prior, tokens, class_ids) for count, tokens in kept.items()}
    assert (likelihoods[1] <= likelihoods[2]).all()
    assert (likelihoods[2] <= likelihoods[8]).all()
    assert (likelihoods[1] < likelihoods[8]).any()
    # log p(tokens) is the sum of what the prior says of each token, given those before it
    log_p = prior(kept[8], class_ids).log_softmax(dim=-1)
    expected = sum(log_p[:, t].gather(1, kept[8][:, t, None])[:, 0] for t in range(kept[8].shape[1]))
    torch.testing.assert_close(likelihoods[8], expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_does_not_fit_in_memory_is_drawn_in_parts(small, digit, monkeypatch, caplog, error):
    options = {"num_images": 5 * ROWS, "image": digit, "vary": 0.5}
    expected = small.sample(**options)
    sizes = []

    def limited(prior, tokenizer, class_ids, **options):
        sizes.append(len(class_ids))
        if len(class_ids) > 2 * ROWS:
            raise error
        return sample_images(prior, tokenizer, class_ids, **options)

    monkeypatch.setattr("vqgen.generator.sample_images", limited)
    images = small.sample(**options)
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))
    assert sizes == [5 * ROWS, 3 * ROWS, 2 * ROWS, ROWS, 2 * ROWS]
    assert f"{5 * ROWS} images at a time do not fit in memory; drawing {3 * ROWS} at a time" in caplog.text


def test_another_error_is_no_lack_of_memory(small, monkeypatch):
    def broken(*given, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr("vqgen.generator.sample_images", broken)
    with pytest.raises(RuntimeError, match="broken"):
        small.sample(num_images=100)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_draws_what_the_step_draws(small):
    prior, class_ids = copy.deepcopy(small.model).cuda(), (torch.arange(64) % 2).cuda()
    for precision in ("no", "bf16"):
        options = {"cfg_scale": 2.0, "cfg_start": 0.5, "top_p": 0.9, "precision": precision}
        plain, graph = (
            sample_tokens(prior, class_ids, generator=image_generators(0, 0, 64), cuda_graph=on, **options)
            for on in (False, True)
        )
        assert (plain == graph).double().mean() > 0.99  # other kernels may round otherwise


def test_what_a_mask_covers_is_seen_upright_and_without_what_is_transparent(small, digit):
    mask = np.zeros((32, 32), np.uint8)
    mask[:4, 20:] = 255
    expected = small.known_tokens(digit, 1, seed=0, mask=mask)
    clear = np.dstack([np.full((32, 32, 3), 255, np.uint8), mask])  # white everywhere, transparent where it is black
    assert torch.equal(small.known_tokens(digit, 1, seed=0, mask=clear), expected)
    turned = Image.fromarray(mask).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned clockwise
    assert torch.equal(small.known_tokens(digit, 1, seed=0, mask=turned), expected)


# Larger images


def test_a_larger_image_is_drawn_in_windows_that_overlap_by_half(small):
    prior, layout = small.model, small.model.layout
    side = layout.shapes[0][-1]
    half, ids = side // 2, torch.tensor([0, 1, -1])
    grid = (side + 1, 2 * side)
    options = {"cfg_scale": 2.0, "top_p": 0.9}
    generators = image_generators(3, 0, 3)
    [codes] = sample_maps(prior, ids, grid, generator=generators, **options)
    expected, generators = torch.full((3, *grid), -1), image_generators(3, 0, 3)
    for top in [0, 1]:
        for left in [0, half, 2 * half]:
            known = expected[:, top : top + side, left : left + side].flatten(1).clone()
            tokens = sample_tokens(prior, ids, known=known, generator=generators, **options)
            expected[:, top : top + side, left : left + side] = tokens.view(3, side, side)
    assert torch.equal(codes[:, 0], expected)
    assert (codes >= 0).all()


@pytest.mark.parametrize(
    ("length", "window", "starts"),
    [(8, 8, [0]), (9, 8, [0, 1]), (16, 8, [0, 4, 8]), (4, 1, [0, 1, 2, 3]), (11, 4, [0, 2, 4, 6, 7])],
)
def test_windows_cover_the_length(length, window, starts):
    assert steps(length, window) == starts


def test_windows_of_several_maps_are_at_the_same_place():
    layout = CodeLayout(((2, 2, 2), (1, 4, 4)), (5, 7))
    torch.manual_seed(0)
    prior = Prior(layout, ["a"], hidden_size=32, num_hidden_layers=1, num_attention_heads=2).eval()
    coarse, fine = sample_maps(prior, torch.zeros(3, dtype=torch.int64), (3, 5), generator=image_generators(0, 0, 3))
    assert (coarse.shape, fine.shape) == ((3, 2, 3, 5), (3, 1, 6, 10))
    assert 0 <= coarse.min() <= coarse.max() < 5
    assert 0 <= fine.min() <= fine.max() < 7


def test_sample_py_draws_larger_images_as_the_generator_does(runs, program, tmp_path):
    arguments = ["stage2/sample.py", runs / "stage2", "num_images=5", f"out={tmp_path}/out", "size=[32,48]"]
    code, _, errors = program(*arguments)
    assert code == 0, errors
    drawn = np.load(tmp_path / "out/samples.npz")["images"]
    generator = Generator.from_pretrained(runs / "stage2")
    images = generator.sample(num_images=5, size=(32, 48), batch_size=2)
    assert [image.size for image in images] == [(48, 32)] * 5
    assert np.array_equal(drawn.reshape(5, 32, 48), np.stack([np.asarray(image) for image in images]))
    same, own = generator.sample(num_images=2, size=32), generator.sample(num_images=2)
    assert all(np.array_equal(*map(np.asarray, pair)) for pair in zip(same, own, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 16}, "size=16: a prior draws images of 32 pixels and larger, in steps of "),
        ({"size": [32, 33]}, r"size=\[32,33\]: a prior draws images of 32 pixels"),
        ({"size": 64, "image": "digit", "vary": 0.5}, "size: a larger image cannot start from one"),
        ({"size": 64, "best_of": 2}, "best_of: the likelihood is that of one window"),
        ({"size": 0.5}, "size=0.5: must be a number of pixels"),
        ({"size": [48, 64], "judge": len}, "best_by: chooses among several images"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(small, digit, options, message):
    with pytest.raises(InputError, match=message):
        small.sample(**{name: digit if value == "digit" else value for name, value in options.items()})


def test_a_gan_draws_no_larger_images_and_takes_no_judge():
    gan = Generator(DCGANGenerator(16, 1, ["a", "b"], width=4).eval())
    with pytest.raises(InputError, match="size: only a prior draws larger images, and this model is a GAN"):
        gan.sample(size=64)
    with pytest.raises(InputError, match="best_of=2: only a prior draws with that"):
        gan.sample(judge=len, best_of=2)


# The best of several


def test_the_best_by_a_judge_is_kept(small, monkeypatch):
    def brightness(images: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        seen.append(class_ids)
        return images.double().mean(dim=(1, 2, 3)) * torch.where(class_ids == 0, 1, -1)

    seen: list[torch.Tensor] = []
    ids, options = torch.arange(40) % 2, {"seed": 5, "cfg_scale": 1.0}
    best = sample_images(small.model, small.tokenizer, ids, best_of=3, judge=brightness, **options)
    every = []
    for attempt in range(3):
        tokens = sample_tokens(small.model, ids, generator=image_generators(5, 0, 40, attempt))
        every.append(to_uint8(small.tokenizer.decode(small.model.layout.unflatten(tokens))))
    means = torch.stack(every).double().mean(dim=(2, 3, 4))
    expected = torch.where(ids == 0, means.amax(dim=0), means.amin(dim=0))
    torch.testing.assert_close(best.double().mean(dim=(1, 2, 3)), expected, rtol=0, atol=0.01)
    assert all(len(part) == ROWS for part in seen)
    images = small.sample(num_images=4, best_of=3, judge=lambda images, _: -images.double().mean(dim=(1, 2, 3)))
    plain = small.sample(num_images=4)
    assert all(np.asarray(a).mean() <= np.asarray(b).mean() for a, b in zip(images, plain, strict=True))


def test_sample_py_keeps_the_images_that_a_classifier_recognises(runs, program, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "LENET_STEPS", 100)
    arguments = ["stage2/sample.py", runs / "stage2", "num_images=40"]
    judged = ["best_by=class", f"cache_dir={runs}/features", "features=lenet"]
    log_p = {}  # what LeNet's own last layer says of the classes
    for name, more in {"plain": [], "best": ["best_of=4", *judged]}.items():
        code, _, errors = program(*arguments, f"out={tmp_path}/{name}", *more)
        assert code == 0, errors
        drawn = np.load(tmp_path / name / "samples.npz")
        train, _, _ = run_images(runs / "stage2", {}, 1)
        network = load_feature_network(
            "lenet", None, train, seed=0, cache=runs / "features", accelerator=evaluation_device()
        )
        logits = network(torch.from_numpy(drawn["images"]).reshape(-1, 1, 32, 32))[1]
        log_p[name] = -F.cross_entropy(logits, torch.from_numpy(drawn["class_ids"]))
    assert log_p["best"] > log_p["plain"] + 0.3
    code, _, errors = program(*arguments, *judged, f"out={tmp_path}/out")
    assert code == 2
    assert "best_by: chooses among several images; give best_of=8, say\n" in errors
    code, _, errors = program(*arguments, *judged, "best_of=2", "class_ids=[-1]", f"out={tmp_path}/out")
    assert code == 2
    assert "best_by=class: needs a class for each image, and two to tell apart" in errors
