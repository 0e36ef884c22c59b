"""Answers with APAR from an engine in this process: ``vllm.LLM`` with children as requests of its own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_apar.config import AparConfig
from hf_apar.errors import ConfigurationError
from hf_apar.serving.admission import AdmissionPolicy, Load
from hf_apar.serving.driver import Driver, Made, ThreadRequest
from hf_apar.text.chat import encode_chat

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before vLLM is imported: one process, whose load can be seen

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from hf_apar.serving.vllm.engine import AnswerOutput, Call, load_in_process, made_by, model_settings
from hf_apar.serving.vllm.parameters import cannot_fork, check_bias

Message = Mapping[str, object]
Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, or vLLM's dicts of either


class AparLLM:
    """vLLM's ``LLM`` whose answers are written in parallel threads.

    Args:
        model: a folder that ``hf-apar merge`` wrote, or any checkpoint with control tokens.
        apar: settings that differ from the checkpoint's.
        policy: decides when a child starts; by default at once.
        vllm_arguments: those of ``vllm.LLM``. Threads share whole blocks of the KV cache alone: ``block_size`` is 32 unless
            you set it, since vLLM's own 128 on CPUs would share nothing of a short prompt.

    Attributes:
        llm: the engine, for all else that it can do.

    Raises:
        ControlTokenError: if the model has no control tokens.
        ConfigurationError: for a fork bias beside vLLM's own speculation.
    """

    def __init__(
        self,
        model: str,
        *,
        apar: AparConfig | None = None,
        policy: AdmissionPolicy | None = None,
        **vllm_arguments: Any,
    ) -> None:
        self.llm = LLM(model, **({"block_size": 32, "enable_prefix_caching": True} | vllm_arguments))
        self._engine = LocalEngine(self.llm.llm_engine)
        self._driver = Driver(self._engine, policy)
        self._tokenizer = self.llm.get_tokenizer()
        known = model_settings(self.llm.llm_engine.model_config, self._tokenizer)
        self.config = (apar or AparConfig()).filled_from(known)
        check_bias(self.config, self.llm.llm_engine.vllm_config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: Any = None,
    ) -> list[RequestOutput]:
        """Answer ``prompts``, texts or token ids, all at once.

        Returns:
            For each prompt vLLM's ``RequestOutput``; each of its ``outputs`` has the answer in reading order and its
            ``tree``, an :class:`~hf_apar.tree.threads.ParagraphTree`.

        Raises:
            ConfigurationError: for parameters that threads cannot follow, or of another number than the prompts.
        """
        several: Any = prompts
        one_prompt = isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int))
        given: list[Prompt] = [several] if one_prompt else list(several)
        params = sampling_params or self.llm.get_default_sampling_params()
        each = [params] * len(given) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(given):
            raise ConfigurationError(f"{len(given)} prompts and {len(each)} sampling_params; give one for all, or one each")
        for one in each:
            if reason := cannot_fork(one):
                raise ConfigurationError(f"APAR cannot follow these sampling_params, since {reason}; use llm.generate")
        calls = [self._call(prompt, one, lora_request) for prompt, one in zip(given, each, strict=True)]
        answers = [one for call in calls for one in call.answers]
        try:
            for one in answers:
                self._driver.add(one.answer, one)
            self._driver.run(self._engine.step)
        finally:
            for one in answers:
                self._driver.remove(one.answer)
        return [output for call in calls for output in call.outputs()]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: Any = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer one chat, or several: as :meth:`generate`. What users typed cannot act as a special token.

        ``chat_template_kwargs`` are those of :func:`~hf_apar.text.chat.encode_chat`.
        """
        several: Any = messages
        chats = [several] if messages and isinstance(messages[0], Mapping) else several
        prompts = [encode_chat(self._tokenizer, chat, chat_template_kwargs=chat_template_kwargs) for chat in chats]
        return self.generate(prompts, sampling_params, lora_request=lora_request)

    def _ids(self, prompt: Prompt) -> list[int]:
        given: Any = prompt
        if isinstance(prompt, Mapping):
            given = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        return list(self._tokenizer.encode(given) if isinstance(given, str) else given)

    def _call(self, prompt: Prompt, params: SamplingParams, lora_request: Any) -> Call:
        own = params.clone()
        own.output_kind = RequestOutputKind.FINAL_ONLY
        given, model_config = {"prompt_token_ids": self._ids(prompt)}, self.llm.llm_engine.model_config
        return Call(given, own, self.config, self._tokenizer, model_config, {"lora_request": lora_request})


class LocalEngine:
    """vLLM's ``LLMEngine`` as an engine of threads: each step is one of its own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._requests: dict[str, ThreadRequest] = {}  # by vLLM's name for them

    def start(self, request: ThreadRequest) -> None:
        asked: AnswerOutput = request.options
        name, prompt = self._name(request), TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        self._requests[name] = request
        self._engine.add_request(name, prompt, asked.request_params(request), **asked.call.passed_on)

    def cancel(self, request: ThreadRequest) -> None:
        self._engine.abort_request([self._name(request)])
        self._requests.pop(self._name(request), None)

    def step(self) -> Iterator[Made]:
        """Let all requests make a token or more."""
        for output in self._engine.step():
            if (request := self._requests.get(output.request_id)) is None:
                continue  # cancelled before this step
            call: Call = request.options.call
            call.first = call.first or output
            if output.finished:
                del self._requests[output.request_id]
            yield made_by(request, output.outputs[0])

    def load(self) -> Load:
        return load_in_process(self._engine) or Load(running=len(self._requests))

    @staticmethod
    def _name(request: ThreadRequest) -> str:
        return f"apar-{request.number}"
