"""A config whose every field must be read, be known not to matter, or raise an error with its name and value.

The file of an architecture reads the fields that it knows, and `finish` refuses the rest. So a field that a fork or a
later version has added is never ignored silently.
"""

from collections.abc import Collection, Mapping
from textwrap import shorten
from typing import Any

from transformers import GenerationConfig

from ..errors import UserError

REQUIRED: Any = object()
LOSSLESS = 2.0**-24  # the largest window_tolerance that leaves out no more than float32 rounds
ONE_DROPOUT = "dropout acts in training only, so a copy of the config may set both to 0"

# Fields of any config of Transformers that do not change what a causal language model computes. Transformers 4 wrote
# more of them than Transformers 5, and DeepSpeed-Chat writes end_token_id beside eos_token_id.
BOOKKEEPING = {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_from_model_config",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "dtype",
    "end_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "is_decoder",
    "model_type",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unk_token_id",
    "use_bfloat16",
}
# Fields of any config of Transformers that mean the same in ours, with their defaults.
CARRIED = {
    "id2label": None,
    "label2id": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
}
# Old configs also hold defaults for generation.
GENERATION = set(GenerationConfig().to_dict())
GENERATION -= {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", *BOOKKEEPING, *CARRIED}


class Fields:
    """The fields of a config, each of which must be read.

    Args:
        fields: What config.json holds.
        owner: The model of the config, for messages, such as "BLOOM".
        prefix: Begins the names in messages, for a config inside another: "attn_config.".
    """

    def __init__(self, fields: Mapping[str, Any], owner: str, prefix: str = "") -> None:
        self._fields = dict(fields)
        self._unread = set(fields)
        self.owner = owner
        self.prefix = prefix

    def value(self, *names: str, default: Any = REQUIRED) -> Any:
        """Returns the value of the field, which may have several names, or `default` if it is missing."""
        present = [name for name in names if name in self._fields]
        self._unread -= set(present)
        if not present:
            if default is REQUIRED:
                raise UserError(f"the config of {self.owner} has no {self.prefix}{names[0]}")
            return default
        first = self._fields[present[0]]
        for other in present[1:]:
            if self._fields[other] != first:
                raise self.refusal(other, f"but {present[0]} is {first!r}, and both mean the same")
        return first

    def size(self, *names: str, default: Any = REQUIRED) -> Any:
        """Returns a positive whole number, or the default."""
        value = self.value(*names, default=default)
        if value is not default and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self.refusal(names[0], "it must be a positive whole number")
        return value

    def number(self, *names: str, default: Any = REQUIRED, least: float = 0.0) -> Any:
        """Returns a finite number of at least `least`, or `None` if that is the default."""
        value = self.value(*names, default=default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and least <= value < float("inf")) and not (value is None and default is None):
            raise self.refusal(names[0], f"it must be a finite number of at least {least:g}")
        return value

    def flag(self, *names: str, default: Any = REQUIRED) -> bool:
        """Returns True or False."""
        value = self.value(*names, default=default)
        if not isinstance(value, bool):
            raise self.refusal(names[0], "it must be true or false")
        return value

    def choice(self, name: str, meanings: Mapping[Any, Any], default: Any = REQUIRED) -> Any:
        """Returns what the value means, according to `meanings`."""
        value = self.value(name, default=default)
        for known, meaning in meanings.items():
            if type(value) is type(known) and value == known:
                return meaning
        raise self.refusal(name, f"only {', '.join(map(repr, meanings))} can be expressed")

    def only(self, name: str, *allowed: Any, reason: str) -> None:
        """Raises an error for any value but those `allowed`. The first one is the default."""
        value = self.value(name, default=allowed[0])
        if not _is_one_of(value, allowed):
            raise self.refusal(name, reason)

    def trained_with(self, target: str, wanted: Mapping[str, Any]) -> None:
        """Raises an error that names all fields whose values `target` cannot express.

        Args:
            target: What needs the values, such as "a BLOOM".
            wanted: The value of each field, or a tuple of possible ones. The first is recommended.
        """
        allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in wanted.items()}
        misfits = [name for name, values in allowed.items() if not _is_one_of(self.value(name), values)]
        if misfits:
            here = ", ".join(f"{name}={shown(self._fields[name])}" for name in misfits)
            needed = ", ".join(f"{name}={allowed[name][0]!r}" for name in misfits)
            raise UserError(f"{self.owner}: {here} cannot be converted: {target} needs a model trained with {needed}")

    def token(self, name: str, default: Any = None) -> Any:
        """Returns a token id, a list of them, or `None`."""
        value = self.value(name, default=default)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise self.refusal(name, "it must be a token id, a list of them, or null")
        return value

    def neutral(self, name: str, *kinds: type) -> None:
        """Accepts any value of these types, because the field does not change what the model computes."""
        value = self.value(name, default=None)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise self.refusal(name, f"it must be of type {' or '.join(kind.__name__ for kind in kinds)}")

    def inner(self, name: str) -> "Fields":
        """Returns the config inside the field `name`."""
        value = self.value(name, default={})
        if not isinstance(value, dict | None):
            raise self.refusal(name, "it must be an object with fields")
        return Fields(value or {}, self.owner, f"{self.prefix}{name}.")

    def common(self, architectures: Collection[str]) -> dict[str, Any]:
        """Returns our values of the fields that any config of Transformers may have.

        Args:
            architectures: The classes that can be converted. Others raise an error.
        """
        for name in self.value("architectures", default=None) or []:
            if name not in architectures:
                raise self.refusal("architectures", f"only {' or '.join(architectures)} can be converted")
        self.only("is_encoder_decoder", False, reason="an encoder has no place here")
        self.only("add_cross_attention", False, reason="cross-attention has no place here")
        self.only("quantization_config", None, reason="convert the checkpoint that was not quantised")
        self.only("prefix", None, reason="no text is put before a prompt here")
        self.only("pruned_heads", {}, None, reason="heads that are missing have no place here")
        self._unread -= BOOKKEEPING | GENERATION
        carried = {}
        for name, default in CARRIED.items():
            value = self.value(name, default=default)
            if isinstance(default, bool) and not isinstance(value, bool):
                raise self.refusal(name, "it must be true or false")
            if value != default:
                carried[name] = value
        return carried

    def finish(self) -> None:
        """Raises an error for fields that have not been read."""
        for name in sorted(self._unread):
            raise self.refusal(name, "nothing is known of this field; remove it if it does not change the model")

    def refusal(self, name: str, reason: str) -> UserError:
        """Returns the error that refuses the field `name`."""
        return UserError(
            f"{self.owner}: {self.prefix}{name}={shown(self._fields.get(name))} cannot be converted: {reason}"
        )


def shown(value: Any) -> str:
    """Returns `value` for a message, without the rest of a long list."""
    return shorten(repr(value), 80, placeholder=" ...")


def _is_one_of(value: Any, allowed: Collection[Any]) -> bool:
    """Whether `value` is in `allowed`, where 1 is not True."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
