"""llama.cpp itself, through the C interface that the library inside the wheel `xllamacpp` exports."""

import ctypes
import importlib.util
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_byte, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

F32, F16 = 0, 1  # `ggml_type`


class ModelParams(Structure):
    """`llama_model_params`, of which only the defaults are used; larger than it is in any version."""

    _fields_ = [("bytes", c_byte * 512)]


class ContextParams(Structure):
    """`llama_context_params` up to the last field that is set here; the rest is larger than in any version."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("kinds", c_int32 * 4),
        ("flash_attn_type", c_int32),
        ("rope", c_float * 8),
        ("cb_eval", c_void_p * 2),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("rest", c_byte * 256),
    ]


class Batch(Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


@cache
def library() -> Any:
    """The library, with the functions that are used here declared, and without its messages."""
    found = importlib.util.find_spec("xllamacpp")
    assert found is not None, "run scripts/test_llama_cpp.sh, which installs xllamacpp"
    (path,) = Path(str(found.origin)).parent.glob("*.so")
    lib = ctypes.CDLL(str(path))
    for name, result, *arguments in [
        ("llama_model_default_params", ModelParams),
        ("llama_context_default_params", ContextParams),
        ("llama_model_load_from_file", c_void_p, c_char_p, ModelParams),
        ("llama_init_from_model", c_void_p, c_void_p, ContextParams),
        ("llama_model_get_vocab", c_void_p, c_void_p),
        ("llama_vocab_n_tokens", c_int32, c_void_p),
        ("llama_vocab_is_eog", c_bool, c_void_p, c_int32),
        ("llama_tokenize", c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
        ("llama_token_to_piece", c_int32, c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool),
        ("llama_batch_init", Batch, c_int32, c_int32, c_int32),
        ("llama_batch_free", None, Batch),
        ("llama_decode", c_int32, c_void_p, Batch),
        ("llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32),
        ("llama_get_memory", c_void_p, c_void_p),
        ("llama_memory_clear", None, c_void_p, c_bool),
        ("llama_free", None, c_void_p),
        ("llama_model_free", None, c_void_p),
        ("llama_log_set", None, c_void_p, c_void_p),
    ]:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(ctypes.cast(_silent, c_void_p), None)
    lib.llama_backend_init()
    defaults = lib.llama_context_default_params()
    assert (defaults.n_ctx, defaults.flash_attn_type, defaults.type_k, defaults.type_v) == (512, -1, F16, F16), (
        "llama_context_params has another layout in this version; see llama.h"
    )
    return lib


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _silent(level: int, text: bytes, data: int) -> None:
    pass


class LlamaCpp:
    """A GGUF file, loaded by llama.cpp.

    Args:
        path: The file.
        length: Tokens in the context at most.
        cache: `ggml_type` of keys and values.
        flash: Whether the kernel that has the distances of ALiBi in half precision is used.
    """

    def __init__(self, path: Path, length: int = 2048, cache: int = F32, flash: bool = False) -> None:
        self.lib = library()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_outputs_max = params.n_outputs_max_per_seq = length
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = cache
        params.flash_attn_type = int(flash)
        self.context = self.lib.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp makes no context for {path}"
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.position = 0

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def tokens(self, text: str) -> list[int]:
        """The tokens of `text`, special ones among it understood, as its server and its programs read a prompt."""
        encoded = text.encode()
        ids = (c_int32 * (len(encoded) + 2))()
        count = self.lib.llama_tokenize(self.vocab, encoded, len(encoded), ids, len(ids), True, True)
        assert count >= 0
        return list(ids[:count])

    def text(self, tokens: Sequence[int]) -> str:
        """What the programs print for these tokens."""
        pieces, buffer = [], ctypes.create_string_buffer(256)
        for token in tokens:
            size = self.lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            assert size >= 0
            pieces.append(buffer.raw[:size])
        return b"".join(pieces).decode(errors="replace")

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits `[length, vocab_size]` after each of further tokens."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, self.position + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        assert self.lib.llama_decode(self.context, batch) == 0
        self.position += len(tokens)
        size = self.lib.llama_vocab_n_tokens(self.vocab)
        rows = [
            np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, index), (size,)).copy()
            for index in range(len(tokens))
        ]
        self.lib.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def generate(self, prompt: str, count: int) -> str:
        """What greedy decoding appends to `prompt`: `count` tokens, or fewer if the text ends."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.position = 0
        new: list[int] = []
        following = self.tokens(prompt)
        while len(new) < count:
            token = int(self.logits(following)[-1].argmax())
            if self.lib.llama_vocab_is_eog(self.vocab, token):
                break
            new.append(token)
            following = [token]
        return self.text(new)
