"""Messages name the library's own option, and callers add where it stands."""

import pytest

from vqgen.errors import InputError, section
from vqgen.quantizers import build_quantizer


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("levels=[2]: each above 2", "a.b.levels=[2]: each above 2"),
        ("base.levels: no such option", "a.b.base.levels: no such option"),
        ("size=7 is not divisible; use 8", "other.size=7 is not divisible; use 8"),
        ("code_dim=3: it is log2 of the size; set that", "a.b.code_dim=3: it is log2 of the size; set that"),
        ("decay=3: each has its own; set base.decay", "a.b.decay=3: each has its own; set a.b.base.decay"),
        (
            "decay=3: nothing to do; raise weight, or set it to 0",
            "a.b.decay=3: nothing to do; raise a.b.weight, or set it to 0",
        ),
        ("none of 5 images loads; repair them or give others", "none of 5 images loads; repair them or give others"),
        ("photos/a=b is not there", "photos/a=b is not there"),
    ],
)
def test_a_section_is_added_to_the_options_of_a_message(message, expected):
    with pytest.raises(InputError) as caught, section("a.b", size="other.size"):
        raise InputError(message)
    assert str(caught.value) == expected


def test_the_library_names_its_own_option():
    with pytest.raises(InputError, match=r"^codebook_size=500: lfq needs a power of two; use 256 or 512$"):
        build_quantizer(name="lfq", codebook_size=500)
