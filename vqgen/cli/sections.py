"""The constructors that take the sections of stage 1's settings, for the programs that read such settings."""

from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.cli.reflect import Sections
from vqgen.quantizers import BASES, QUANTIZERS
from vqgen.tokenizers import ARCHITECTURES

STAGE1_SECTIONS: Sections = {
    "model": ARCHITECTURES,
    "model.quantizer": QUANTIZERS,
    "model.quantizer.base": BASES,
    "discriminator": PatchDiscriminator,
}
