"""Options become quantizers, or errors with the reason."""

import inspect
import re

import pytest

from vqgen.errors import InputError
from vqgen.quantizers import BASES, QUANTIZERS, EMAQuantizer, build_quantizer, quantizer_options


def test_build_quantizer_gives_what_is_named():
    quantizer = build_quantizer(name="ema", codebook_size=32, decay=0.5)
    assert isinstance(quantizer, EMAQuantizer)
    assert (quantizer.codebook_size, quantizer.decay, quantizer.code_dim) == (32, 0.5, EMAQuantizer().code_dim)
    assert isinstance(build_quantizer(), EMAQuantizer)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_options_are_completed_by_the_constructors_defaults(name):
    options = quantizer_options(name=name)
    assert options.pop("name") == name
    assert list(options) == list(inspect.signature(QUANTIZERS[name]).parameters)
    assert type(build_quantizer(name=name, **options)) is QUANTIZERS[name]


def test_options_of_a_residual_quantizers_levels_are_completed_too():
    options = quantizer_options(name="residual", base={"name": "vq", "code_dim": 3})
    assert options["base"] == quantizer_options(name="vq", code_dim=3)
    assert quantizer_options(**options) == options


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_a_quantizer_refuses_it_does_not_take(name):
    assert not QUANTIZERS[name].refused.keys() & inspect.signature(QUANTIZERS[name]).parameters.keys()


REFUSED = {
    "no such quantizer": ({"name": "emma"}, "name=emma: no such quantizer; there is ema, vq, simvq, "),
    "a mistyped option": ({"codebok_size": 3}, "codebok_size: ema has no such option; did you mean codebook_size?"),
    "the wrong type": ({"codebook_size": "large"}, "codebook_size=large: must be a whole number"),
    "no code": ({"codebook_size": 0}, "codebook_size=0: must be at least 1"),
    "too many codes": ({"codebook_size": 10**10}, "codebook_size=10000000000: must be at most"),
    "too many codes of all levels": ({"name": "fsq", "levels": [8] * 20}, "their product is above 2^31"),
    "too many levels": ({"name": "residual", "num_quantizers": 10**6}, "num_quantizers=1000000: must be at most 1000"),
    "no dimension": ({"name": "ibq", "code_dim": 0}, "code_dim=0: must be at least 1"),
    "no such lookup": ({"lookup": "manhattan"}, "lookup=manhattan: no such lookup; there is euclidean, cosine"),
    "no such gradient": (
        {"name": "simvq", "gradient": "zero"},
        "gradient=zero: no such gradient; there is straight-through",
    ),
    "another quantizer's option": (
        {"name": "vq", "levels": [4]},
        "levels: vq has no such option; it takes codebook_size, ",
    ),
    "decay of one": ({"decay": 1.0}, "decay=1.0: must be above 0 and below 1"),
    "revival of the average code": ({"name": "vq", "revive_below": 1.0}, "revive_below=1.0: must be"),
    "negative temperature": ({"temperature": -1.0}, "temperature=-1.0: must be 0"),
    "negative weight": ({"commitment_weight": -1.0}, "commitment_weight=-1.0: must be 0 or more"),
    "no entropy temperature": ({"entropy_weight": 1.0, "entropy_temperature": 0.0}, "entropy_temperature=0.0: must be"),
    "drawn codes with the rotation": (
        {"name": "vq", "temperature": 0.5, "gradient": "rotation"},
        "temperature=0.5 with gradient=rotation: a drawn code may lie on any side",
    ),
    "directions on a line": ({"code_dim": 1, "lookup": "cosine"}, "code_dim=1 with lookup=cosine"),
    "rotation on a line": ({"name": "vq", "code_dim": 1, "gradient": "rotation"}, "a line has only two directions"),
    "rotation of simvq on a line": ({"name": "simvq", "code_dim": 1, "gradient": "rotation"}, "only two directions"),
    "rotation of levels on a line": (
        {"name": "residual", "gradient": "rotation", "base": {"code_dim": 1}},
        "a line has only two directions",
    ),
    "rotation of drawn levels": (
        {"name": "residual", "gradient": "rotation", "base": {"temperature": 0.5}},
        "a drawn code may lie on any side",
    ),
    "entropy of fsq": ({"name": "fsq", "entropy_weight": 0.1}, "fsq has no such option: rounding needs no loss"),
    "commitment of fsq": ({"name": "fsq", "commitment_weight": 0.1}, "fsq has no such option: rounding needs no loss"),
    "size of fsq": ({"name": "fsq", "codebook_size": 512}, "it is the product of the levels; set levels"),
    "levels of fsq": ({"name": "fsq", "levels": [8, 1]}, "levels=[8, 1]: must be one or more numbers above 2; for"),
    "size of lfq": ({"name": "lfq", "codebook_size": 500}, "lfq needs a power of two; use 256 or 512"),
    "dimension of lfq": ({"name": "lfq", "code_dim": 8}, "it is log2 of the codebook_size"),
    "revival of simvq": ({"name": "simvq", "revive_below": 0.1}, "the linear map moves all codes at once"),
    "gradient of ibq": ({"name": "ibq", "gradient": "rotation"}, "index backpropagation has its own"),
    "no temperature of gumbel": ({"name": "gumbel", "temperature": 0.0}, "temperature=0.0: must be above 0"),
    "negative divergence": ({"name": "gumbel", "kl_weight": -1.0}, "kl_weight=-1.0: must be 0 or more"),
    "commitment of gumbel": (
        {"name": "gumbel", "commitment_weight": 0.1},
        "gumbel has no such option: no vector has a distance to its code; set kl_weight",
    ),
    "beta of no term": ({"legacy_beta": True}, "legacy_beta=True: ema's codebook has no term in the loss"),
    "level of gumbel": ({"name": "residual", "base": {"name": "gumbel"}}, "base.name=gumbel: no such quantizer"),
    "residual of residual": ({"name": "residual", "base": {"name": "residual"}}, "base.name=residual: no such"),
    "size of residual": ({"name": "residual", "codebook_size": 8}, "set base.codebook_size"),
    "an option of the base": (
        {"name": "residual", "base": {"codebok_size": 8}},
        "base.codebok_size: ema has no such option; did you mean base.codebook_size?",
    ),
    "a value of the base": ({"name": "residual", "base": {"decay": 2.0}}, "base.decay=2.0: must be"),
    "residual of directions": ({"name": "residual", "base": {"lookup": "cosine"}}, "the residual needs it"),
    "residual on the sphere": (
        {"name": "residual", "base": {"name": "lfq", "spherical": True}},
        "the residual needs it",
    ),
    "rotation within levels": (
        {"name": "residual", "base": {"gradient": "rotation"}},
        "base.gradient=rotation: the decoder's gradient passes all levels at once; set gradient=rotation instead",
    ),
    "dropout of the only level": ({"name": "residual", "num_quantizers": 1, "dropout": 0.5}, "nothing to drop"),
    "no level": ({"name": "residual", "num_quantizers": 0}, "num_quantizers=0: must be at least 1"),
    "dropout above one": ({"name": "residual", "dropout": 1.5}, "dropout=1.5: must be between 0 and 1"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_combinations_that_mean_nothing_are_refused_with_the_reason(options, message):
    with pytest.raises(InputError) as caught:
        build_quantizer(**options)
    said = str(caught.value)
    assert re.match(r"(base\.)?\w+[=:]", said)  # the option's name in its constructor
    assert message in said
    assert "\n" not in said


def test_every_level_can_be_any_other_quantizer():
    for name in BASES:
        assert build_quantizer(name="residual", base={"name": name}).num_codebooks == 4
