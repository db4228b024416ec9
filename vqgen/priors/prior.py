"""The prior: an autoregressive transformer over code tokens, around any causal language model of transformers."""

import dataclasses
import difflib
import functools
import inspect
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import vqgen
from vqgen.codes import ORDERS, CodeLayout
from vqgen.errors import InputError, expanded, require, require_size
from vqgen.priors.decoder import EVERYWHERE, PLAIN, Places
from vqgen.priors.objective import CodeHeads, token_losses

# transformers raises these for settings that contradict each other.
MISFITS = (ArithmeticError, RuntimeError, TypeError, ValueError, StrictDataclassError)
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # the sizes that every prior is given
LOGITS_AT_ONCE = 2**26  # of a loss; in float32 they are 256 MB, and their softmax and gradient as much each
# Model types whose logits are their output embeddings' product with the last hidden state, and nothing more.
LINEAR_HEADS = (*PLAIN, "qwen2", "gpt2")
PLACES = "places.safetensors"  # beside transformers' files
BOOKKEEPING = ("architectures", "dtype", "transformers_version", "vqgen", "_name_or_path")  # items that are no options


class NothingKept(DynamicCache):
    """A cache that keeps no keys and values, for passes over whole sequences.

    Without any cache, transformers looks for packed sequences at each pass, by a branch on a tensor. On a GPU the CPU
    would wait there for all earlier work.
    """

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of this pass alone."""
        return keys, values


def attends_only(lm: Any) -> bool:
    """Whether all layers of the model are attention, which `NothingKept` serves."""
    if "past_key_values" not in inspect.signature(lm.forward).parameters:
        return False
    kinds = {type(layer) for layer in DynamicCache(config=lm.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}  # whose subclasses have states besides


class PlaceEmbeddings(nn.Module):
    """What tells a prior of any order which place each token is of, and which place comes next (Yu et al. 2024, RAR).

    Args:
        count: number of places.
        width: width of the transformer.
    """

    def __init__(self, count: int, width: int):
        super().__init__()
        self.current, self.next = nn.Embedding(count, width), nn.Embedding(count, width)
        for table in (self.current, self.next):
            nn.init.normal_(table.weight, std=0.02)  # as transformers' token embeddings

    def forward(self, order: Tensor) -> Tensor:
        """What is added to the embeddings (B, N, width) of the class token and all tokens but the last.

        Args:
            order: (B, N), the place of each token.
        """
        current = self.current(order[:, :-1])
        return self.next(order) + F.pad(current, (0, 0, 1, 0))  # the class token has no place


class Prior(nn.Module):
    """Models p(tokens | class), one token after the other.

    The sequence starts with a class token: id vocab_size means no class, and vocab_size + 1 + c means class c. The
    model is saved as a plain transformers checkpoint, with the layout and the class names in its config.json, under
    `vqgen`. What a prior of any order has besides, `places`, is in a file of its own there.

    Args:
        layout: the code tokens' layout.
        class_names: the classes in the order of their ids; empty for an unconditional prior.
        model_type: any causal language model of transformers: llama, gpt2, qwen3, mistral, ...
        hidden_size: width of the transformer.
        num_hidden_layers: depth of the transformer.
        num_attention_heads: heads of each attention layer.
        options: further items of that model's transformers configuration, such as intermediate_size.

    Raises:
        InputError: transformers has no such model, the model has no such option, or the options contradict each other.
    """

    layout: CodeLayout
    class_names: list[str]
    lm: Any  # a causal language model of transformers
    illegal: Tensor | None  # (R, vocab_size) bool: one row per codebook's range of ids, True outside the range
    illegal_row: Tensor | None  # (N,) int64: each position's row; both are None if every token is legal everywhere
    places: PlaceEmbeddings | None  # None if the tokens always come in the layout's order
    heads: CodeHeads | None  # for training alone, and not saved with the model

    def __init__(
        self,
        layout: CodeLayout,
        class_names: list[str],
        model_type: str = "llama",
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        **options: Any,
    ):
        super().__init__()
        sizes = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
        }
        for name, most in zip(SIZES, (1 << 16, 1000, 1 << 16), strict=True):
            require_size(name, sizes[name], most)
        config = _language_model_config(model_type, sizes | options, **_fixed(layout, class_names))
        config.vqgen = {**dataclasses.asdict(layout), "class_names": class_names}
        try:
            lm = AutoModelForCausalLM.from_config(config)
            # A forward pass finds contradicting sizes. Sampling needs a causal model: the 2nd token must not change the
            # first token's logits.
            if lm.device.type != "meta":  # where a plan is made, and no tensor has values
                with torch.no_grad():
                    first = [lm.eval()(input_ids=torch.tensor([[0, second]])).logits[:, 0] for second in (0, 1)]
                require(torch.equal(*first), f"model_type={config.model_type}: is not causal; use llama, for example")
                lm.train()
        except InputError:
            raise
        except MISFITS as error:
            raise InputError(_misfit(config.model_type, sizes | options, error)) from error
        self._set_up(lm)

    def _set_up(self, lm: Any) -> None:
        self.lm, self._attends_only = lm, attends_only(lm)
        self._no_split_modules = lm._no_split_modules  # FSDP gathers these layers one by one
        facts = lm.config.vqgen
        shapes, sizes = tuple(tuple(shape) for shape in facts["shapes"]), tuple(facts["codebook_sizes"])
        order = facts.get("order", "raster")  # older versions had no other order
        require(order in ORDERS, f"the order of its tokens, {order}, is not known to vqgen {vqgen.__version__}")
        self.layout = CodeLayout(shapes, sizes, order)
        self.class_names = list(facts["class_names"])
        # DDP may broadcast buffers at every pass, so these have a row for each range, not for each of the N positions.
        with torch.device("cpu"):
            ids = torch.arange(self.layout.vocab_size)
            ranges, row = self.layout.token_ranges().unique(dim=0, return_inverse=True)  # (R, 2), (N,)
        illegal = (ids < ranges[:, :1]) | (ids >= ranges[:, 1:])  # (R, vocab_size)
        everything = not illegal.any()
        self.register_buffer("illegal", None if everything else illegal.to(lm.device), persistent=False)
        self.register_buffer("illegal_row", None if everything else row.to(lm.device), persistent=False)
        self.places = self.heads = None
        if self.random_orders is not None:
            self.add_places(self.random_orders)
        # Without this, transformers' generate() would draw class tokens too. It is saved in generation_config.json.
        first_class_token = self.layout.vocab_size
        lm.generation_config.suppress_tokens = list(
            range(first_class_token, first_class_token + 1 + len(self.class_names))
        )

    def forward(
        self,
        tokens: Tensor,
        class_ids: Tensor,
        order: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        smoothed: bool = False,
        with_states: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits (B, N, vocab_size) of each of the tokens (B, N), given the class (-1 for none) and the earlier tokens.

        Tokens that are illegal at their place have the logit -inf.

        Args:
            tokens: (B, N).
            class_ids: (B,).
            order: (B, N), the place of each of the tokens in the layout's order, if they come in another one.
            targets: (B, N); return their losses, (1,) or (2,), instead of logits. Logits that are more than
                LOGITS_AT_ONCE are then never all in memory, if the model is one of LINEAR_HEADS.
            smoothed: the second loss is `uniform_loss`.
            with_states: return also the hidden states (B, N, width) after the first layer, and after three quarters of
                the layers.
        """
        inputs = torch.cat([self.class_tokens(class_ids), tokens[:, :-1]], dim=1)
        if self.places is None:
            assert order is None, "the prior knows no other order; add_places gives it what it needs"
            given = {"input_ids": inputs}
        else:
            in_turn = torch.arange(tokens.shape[1], device=tokens.device)[None]
            embedded = self.lm.get_input_embeddings()(inputs)
            given = {"inputs_embeds": embedded + self.places(in_turn if order is None else order)}
        many = tokens.numel() * self.lm.config.vocab_size > LOGITS_AT_ONCE
        in_blocks = targets is not None and many and self.lm.config.model_type in LINEAR_HEADS
        x, *states = self._pass(given, to_logits=not in_blocks, with_states=with_states)
        if targets is not None and in_blocks:
            x = self._losses_in_blocks(x, targets, order, smoothed)
        else:
            x = self.legal(x, EVERYWHERE if order is None else order)
            x = x if targets is None else token_losses(x, targets, smoothed)
        return (x, *states) if with_states else x

    def _pass(self, given: dict[str, Tensor], *, to_logits: bool, with_states: bool = False) -> list[Tensor]:
        """The model's logits (B, N, its vocabulary) for whole sequences, or its last hidden states; and `forward`'s."""
        model = self.lm if to_logits else self.lm.base_model
        cache = {"past_key_values": NothingKept()} if self._attends_only else {}
        output = model(**given, use_cache=False, output_hidden_states=with_states, **cache)
        x = output.logits if to_logits else output.last_hidden_state
        if not with_states:
            return [x]
        layers = output.hidden_states  # the embeddings, and the output of each layer
        return [x, layers[1], layers[max(1, round(0.75 * (len(layers) - 1)))]]

    def _losses_in_blocks(self, x: Tensor, targets: Tensor, order: Tensor | None, smoothed: bool) -> Tensor:
        """`token_losses` from the last hidden states (B, N, width); the backward pass computes the logits again."""
        head, count = self.lm.get_output_embeddings(), len(targets)
        rows = max(1, LOGITS_AT_ONCE // (targets.shape[1] * self.lm.config.vocab_size))

        def losses(x: Tensor, targets: Tensor, *places: Tensor) -> Tensor:
            logits = self.legal(head(x), *places)
            return token_losses(logits, targets, smoothed) * (len(targets) / count)

        blocks = zip(*(part.split(rows) for part in (x, targets, order) if part is not None), strict=True)
        again = functools.partial(checkpoint, losses, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([again(*block) for block in blocks]).sum(dim=0)

    def class_tokens(self, class_ids: Tensor) -> Tensor:
        """The first tokens (B, 1) of the sequences, from class ids (B,), -1 for no class."""
        return self.layout.vocab_size + 1 + class_ids[:, None]

    def legal(self, logits: Tensor, places: Places = EVERYWHERE) -> Tensor:
        """The model's logits (B, n, ...) at n places of the layout's order, (n,) or (B, n), with -inf where illegal."""
        logits = logits[..., : self.layout.vocab_size]
        if self.illegal is not None and self.illegal_row is not None:
            logits = logits.masked_fill(self.illegal[self.illegal_row[places]], -torch.inf)
        return logits

    @property
    def class_dropout(self) -> float | None:
        """The share of training examples without a class, saved with the model; None if that is not known."""
        return self.lm.config.vqgen.get("class_dropout")

    @class_dropout.setter
    def class_dropout(self, share: float) -> None:
        self.lm.config.vqgen["class_dropout"] = share

    @property
    def random_orders(self) -> float | None:
        """The share of training examples in random orders at the end, saved with the model; None if none ever were."""
        return self.lm.config.vqgen.get("random_orders")

    def add_places(self, random_orders: float) -> None:
        """Adds what a prior of any order needs, before it is trained.

        Raises:
            InputError: the model takes tokens alone.
        """
        self.lm.config.vqgen["random_orders"] = random_orders
        width = self.lm.get_input_embeddings().weight.shape[1]
        try:
            with torch.no_grad():
                self._pass(
                    {"inputs_embeds": self.lm.get_input_embeddings().weight.new_zeros(1, 1, width)}, to_logits=True
                )
        except MISFITS as error:
            name = self.lm.config.model_type
            raise InputError(
                f"random_orders: {name} takes no embeddings of tokens; use model.model_type=llama"
            ) from error
        self.places = PlaceEmbeddings(self.layout.num_tokens, width)

    def add_heads(self, vectors: Tensor) -> None:
        """Adds heads that predict the tokens' code vectors (V, D), for a loss in training."""
        self.heads = CodeHeads(self.lm.get_input_embeddings().weight.shape[1], vectors)

    def checkpoint_activations(self) -> None:
        """Makes training compute the activations inside layers a second time instead of keeping them.

        Raises:
            InputError: transformers does not offer that for the model.
        """
        layers = [layer for layer in self.lm.modules() if isinstance(layer, GradientCheckpointingLayer)]
        remedy = f"transformers has none for {self.lm.config.model_type}; use model.model_type=llama, or set false"
        require(bool(layers), f"activation_checkpointing=true: {remedy}")
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            layer._can_checkpoint_with_cache = True  # in a second pass, too, `NothingKept` keeps nothing

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's options: the model's type, the sizes, and those whose values do not follow from these."""
        every, fixed = self.all_options, _fixed(self.layout, self.class_names)
        options = {key: every.get(key, 1) for key in SIZES}  # some models have no heads
        follow = _language_model_config(every["model_type"], options, **fixed).to_dict()
        own = self.lm.config.to_dict()
        more = {key: x for key, x in own.items() if key not in BOOKKEEPING and (key not in follow or follow[key] != x)}
        return {"model_type": every["model_type"], **options, **more}

    @property
    def all_options(self) -> dict[str, Any]:
        """All items of the transformers configuration, also under the names that all models share."""
        config = self.lm.config
        return config.to_dict() | {name: getattr(config, name) for name in config.attribute_map}

    @property
    def token_tables(self) -> list[str]:
        """Names of the tensors that have a row for each token, the class tokens included."""
        tables = (self.lm.get_input_embeddings(), self.lm.get_output_embeddings())
        own = {id(p) for table in tables if table is not None for p in table.parameters()}
        return [name for name, p in self.named_parameters(remove_duplicate=False) if id(p) in own]

    @property
    def tables_and_scales(self) -> list[nn.Parameter]:
        """The parameters that are no matrix between hidden features, for which Muon is not."""
        tables = {*self.token_tables}
        maps = {id(part.weight) for part in self.modules() if isinstance(part, nn.Linear | Conv1D)}
        return [p for name, p in self.named_parameters() if name in tables or id(p) not in maps]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a transformers checkpoint, which `AutoModelForCausalLM.from_pretrained` can load too.

        A prior of any order also writes places.safetensors, without which its transformers checkpoint is of no use.
        """
        self.lm.save_pretrained(folder)
        if self.places is not None:
            save_model(self.places, str(Path(folder) / PLACES))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Prior":
        """The prior of a stage-2 run, in eval mode.

        Args:
            folder: the run's folder, its `model/`, or its `model/prior/`.

        Raises:
            InputError: there is no prior in the folder, or it does not load.
        """
        given = expanded(folder)
        places = [given, given / "prior", given / "model" / "prior"]
        found = next((place for place in places if (place / "config.json").is_file()), None)
        if found is None:
            raise InputError(f"{given}: no prior there; give the folder of a stage-2 run")
        folder = found
        prior = cls.__new__(cls)
        nn.Module.__init__(prior)
        try:
            # These two options keep transformers from running code or pickles from the folder.
            lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
            if not hasattr(lm.config, "vqgen"):
                raise InputError(f"{folder}: a language model, but not one that vqgen trained; give a stage-2 run")
            prior._set_up(lm)
            if prior.places is not None:
                load_model(prior.places, folder / PLACES)
        except InputError:
            raise
        except (OSError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} does not load as a prior: {_one_line(error)}") from error
        return prior.eval()


def _fixed(layout: CodeLayout, class_names: list[str]) -> dict[str, Any]:
    """The items of a prior's transformers configuration that follow from the tokens and the classes."""
    return {
        "vocab_size": layout.vocab_size + 1 + len(class_names),
        "max_position_embeddings": 1 + layout.num_tokens,
        "bos_token_id": layout.vocab_size,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _language_model_config(model_type: str, options: dict[str, Any], **fixed: Any) -> PreTrainedConfig:
    """The checked transformers configuration of a model type; missing sizes follow from the given ones."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1) or ["llama"]
        raise InputError(f"model_type={model_type}: transformers has no such causal LM; the nearest is {near[0]}")
    config_class = CONFIG_MAPPING[model_type]
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for key in options.keys() - {*SIZES}:  # Prior's own
        if key in fixed:
            raise InputError(f"{key}: follows from the tokenizer and the data; leave it out")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = "" if near else f"; see transformers' {config_class.__name__}"
            raise InputError(f"{key}: {model_type} has no such option{hint}", *near)
    # transformers' own defaults are no use here: they are the sizes of one large published model.
    width, heads = options["hidden_size"], options["num_attention_heads"]
    gated = 8 * math.ceil(width / 3)  # Llama's 8/3: its three matrices then cost as much as the classic two of 4
    derived = {"intermediate_size": gated, "num_key_value_heads": heads, "head_dim": width // max(1, heads)}
    options = {k: v for k, v in (options | derived | options).items() if k in known}  # messages name the given first
    try:
        return AutoConfig.for_model(model_type, **options, **fixed)
    except MISFITS as error:
        raise InputError(_misfit(model_type, options, error)) from error


def _misfit(model_type: str, options: dict[str, Any], error: Exception) -> str:
    asked = " ".join(f"{key}={value}" for key, value in options.items())
    return f"{asked}: transformers cannot build {model_type} from these: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
