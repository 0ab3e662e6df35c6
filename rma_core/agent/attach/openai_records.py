"""What a request of OpenAI's API says, as far as Ollama could make something of it; other members are left unread."""

from __future__ import annotations

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct):
    """How a stream is to be."""

    include_usage: bool | None = None


class TemplateOptions(msgspec.Struct):
    """What a model's template is told."""

    enable_thinking: Any = None


class Schema(msgspec.Struct):
    """A form by its schema."""

    schema: msgspec.Raw = msgspec.Raw()


class Form(msgspec.Struct):
    """How an answer is to be written."""

    type: str = "text"
    json_schema: Schema | None = None
    #: Where llama.cpp takes a schema.
    schema: msgspec.Raw = msgspec.Raw()


class URL(msgspec.Struct):
    """Where a picture is."""

    url: str


class Audio(msgspec.Struct):
    """A sound."""

    data: str


class Part(msgspec.Struct):
    """A part of a message."""

    type: str
    text: str = ""
    image_url: URL | str | None = None
    input_audio: Audio | None = None


class CalledFunction(msgspec.Struct):
    """A tool that was called."""

    name: str
    arguments: str | None = None


class Call(msgspec.Struct):
    """One call of a tool."""

    function: CalledFunction
    id: str | None = None


class Message(msgspec.Struct):
    """One message of a chat."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class NamedFunction(msgspec.Struct):
    """A tool's name."""

    name: str


class Named(msgspec.Struct):
    """A tool by its name."""

    function: NamedFunction


class Asked(msgspec.Struct):
    """What both kinds of completions may say."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    top_k: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most, if it is limited."""
        return self.max_tokens


class Chat(Asked):
    """A request for a chat."""

    messages: list[Message] = []
    max_completion_tokens: int | None = None
    response_format: Form | None = None
    tools: list[msgspec.Raw] | None = None
    tool_choice: str | Named | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most, if it is limited."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Completion(Asked):
    """A request to go on with a text."""

    prompt: str | list[Any] = ""
    suffix: str | None = None
    logprobs: int | None = None


class Embedding(msgspec.Struct):
    """A request for embeddings."""

    model: str
    input: str | list[Any] = ""
    dimensions: int | None = None
    encoding_format: str | None = None
