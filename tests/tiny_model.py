"""Tiny language models with random weights, as GGUF files that llama.cpp really loads: a token is a byte, or a space.

Text and tokens round-trip, so a text cut anywhere can be continued exactly. The same seed gives the same file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

#: Words of the vocabulary: unknown, begin, end, space (which would be three bytes otherwise), then the 256 bytes.
UNKNOWN, BEGIN, END, SPACE, FIRST_BYTE = range(5)
WORDS = FIRST_BYTE + 256
#: The bytes a model may choose, beside the space: printable ASCII, so that every cut of a text is a text.
PRINTABLE = range(0x21, 0x7F)
#: Each message as `role: content`, a line each; llama.cpp leaves the last one open where it is the assistant's.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: The same with tools: what is offered, and calls as Hermes' and Qwen's models write them, which llama.cpp reads.
TOOLS_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] or '' }}"
    "{% if m['tool_calls'] %}{% for c in m['tool_calls'] %}<tool_call>"
    "{\"name\": \"{{ c['function']['name'] }}\", \"arguments\": {{ c['function']['arguments'] | tojson }}}"
    "</tool_call>{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: One more word, of a model with tools: what a call begins with. Random weights never think of calling; a request with
#: this bias and without parallel calls does, and llama.cpp's grammar writes the rest.
CALL = WORDS
CALLS = {str(CALL): 90, str(END): 100}
#: What every token holds in the first place of its embedding, where no layer writes; the output reads it to keep
#: tokens that are not to be chosen out of reach.
MARK, NEVER = 4.0, -40.0


def write_chat_model(
    path: Path, *, seed: int = 1, layers: int = 2, width: int = 64, heads: int = 4, kv_heads: int = 2,
    context: int = 2048, ends: bool = False, tools: bool = False,
) -> Path:  # fmt: skip
    """Write a model of the llama architecture, which never ends by itself unless ``ends``; returns ``path``.

    ``width`` is the embedding's, shared by ``heads``; ``context`` the length it says it was trained for. One with
    ``tools`` calls them when it is asked with the bias CALLS.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    hidden, head = 2 * width, width // heads
    _facts(writer, name=f"tiny-chat-{seed}", width=width, layers=layers, hidden=hidden, context=context)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_chat_template(TOOLS_TEMPLATE if tools else CHAT_TEMPLATE)
    _vocabulary(writer, more=("<tool_call>",) if tools else ())
    words = WORDS + tools
    embedding = random.normal(0, 1.0, (words, width))
    embedding[:, 0] = MARK
    _tensor(writer, "token_embd.weight", embedding)
    _tensor(writer, "output.weight", _output(random, words, width, ends=ends or tools))
    _tensor(writer, "output_norm.weight", np.ones(width))
    for layer in range(layers):
        shapes = {
            "attn_q": (width, width), "attn_k": (kv_heads * head, width), "attn_v": (kv_heads * head, width),
            "attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width),
            "ffn_down": (width, hidden),
        }  # fmt: skip
        for name, shape in shapes.items():
            weights = random.normal(0, 1.5 / np.sqrt(shape[1]), shape)
            if name in {"attn_output", "ffn_down"}:
                weights[0] = 0
            _tensor(writer, f"blk.{layer}.{name}.weight", weights)
        for name in ("attn_norm", "ffn_norm"):
            _tensor(writer, f"blk.{layer}.{name}.weight", np.ones(width))
    return _written(writer, path)


def write_embedding_model(path: Path, *, seed: int = 1, layers: int = 1, width: int = 32, heads: int = 2) -> Path:
    """Write a model of the bert architecture that turns a text into ``width`` numbers; returns ``path``."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "bert")
    hidden, context = 2 * width, 512
    _facts(writer, name=f"tiny-embedding-{seed}", width=width, layers=layers, hidden=hidden, context=context)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _vocabulary(writer)
    writer.add_token_type_count(2)
    _tensor(writer, "token_embd.weight", random.normal(0, 1.0, (WORDS, width)))
    _tensor(writer, "token_types.weight", random.normal(0, 0.1, (2, width)))
    _tensor(writer, "position_embd.weight", random.normal(0, 0.1, (context, width)))
    _scale_and_shift(writer, "token_embd_norm", width)
    for layer in range(layers):
        shapes = {
            "attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width),
            "attn_output": (width, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden),
        }  # fmt: skip
        for name, shape in shapes.items():
            _tensor(writer, f"blk.{layer}.{name}.weight", random.normal(0, 1.0 / np.sqrt(shape[1]), shape))
            _tensor(writer, f"blk.{layer}.{name}.bias", np.zeros(shape[0]))
        for name in ("attn_output_norm", "layer_output_norm"):
            _scale_and_shift(writer, f"blk.{layer}.{name}", width)
    return _written(writer, path)


def _facts(writer: gguf.GGUFWriter, *, name: str, width: int, layers: int, hidden: int, context: int) -> None:
    writer.add_name(name)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _vocabulary(writer: gguf.GGUFWriter, *, more: tuple[str, ...] = ()) -> None:
    """One token for each byte and one for each of ``more``, and nothing put before a text that was not in it."""
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    writer.add_token_list(["<unk>", "<s>", "</s>", space, *(f"<0x{byte:02X}>" for byte in range(256)), *more])
    writer.add_token_scores([0.0] * (WORDS + len(more)))
    usual = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.NORMAL, *([kinds.BYTE] * 256)]
    writer.add_token_types([*usual, *([kinds.USER_DEFINED] * len(more))])
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _output(random: np.random.Generator, words: int, width: int, *, ends: bool) -> np.ndarray:
    """Rows that score tokens, those not to be chosen by the mark that every state holds."""
    rows = random.normal(0, 1.0, (words, width))
    chosen = {FIRST_BYTE + byte for byte in PRINTABLE} | {SPACE, CALL} | ({END} if ends else set())
    rows[:, 0] = [0.0 if word in chosen else NEVER for word in range(words)]
    return rows


def _scale_and_shift(writer: gguf.GGUFWriter, name: str, width: int) -> None:
    _tensor(writer, f"{name}.weight", np.ones(width))
    _tensor(writer, f"{name}.bias", np.zeros(width))


def _tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    writer.add_tensor(name, values.astype(np.float32))


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
