"""Bad input: whatever is read, only an error of the package's own comes out, or what was read says what stood there."""

import json
import random
import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from field_tokenizers import MAKERS
from hf_apar.config import AparConfig
from hf_apar.data.extraction.markdown import extraction
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.records.chats import chat_answers
from hf_apar.data.records.files import open_records, record_of
from hf_apar.data.records.json_array import array_items
from hf_apar.data.records.rejections import UNUSABLE, Rejected
from hf_apar.errors import AparError, ConfigurationError
from hf_apar.serving.proxy.app import _parsed
from hf_apar.serving.proxy.asked import parse
from hf_apar.serving.proxy.errors import ApiError
from hf_apar.serving.proxy.served import Served
from hf_apar.training.recipe import EXAMPLE, read_recipe
from hf_apar.tree.threads import ParagraphTree, Thread
from storm.mutation import MARKS, mutated, spoilt
from storm.storms import Scenario, Storm

ANSWER = (
    "Three trees:\n\n1. **Oak**: it grows slowly and lives very long.\n2. **Ash**: it burns well, even when it is green.\n"
    "   - **Wood**: it is light and it bends before it breaks.\n"
    "3. **Elm**:\n\nIt is rare now because of a fungus.\n\nPlant one."
)
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
RECORDS: tuple[Any, ...] = (
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Trees?"},
                  {"role": "assistant", "content": ANSWER, "tree": [ANSWER[:20], [ANSWER[20:40]], ANSWER[40:]]}]},
    {"conversations": [{"from": "human", "value": "Trees?"}, {"from": "gpt", "value": ANSWER}], "system": "Hm"},
    {"instruction": "Name trees.", "input": "three", "output": ANSWER, "history": [["Hi", "Hello"]]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Trees?"}]}],
     "completion": [{"role": "assistant", "content": ANSWER}]},
    {"messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "content": "no", "tool_call_id": "c1"}, {"role": "assistant", "content": "No."}],
     "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]},
)  # fmt: skip


def _text(draw: random.Random) -> str:
    """Return a text of marks, or an answer that was spoilt."""
    if draw.random() < 0.5:
        return "".join(draw.choice(MARKS) for _ in range(draw.randint(0, 60)))
    return spoilt(draw, ANSWER, draw.randint(1, 12))


def draw_record(draw: random.Random) -> Scenario:
    return {"record": mutated(draw, draw.choice(RECORDS), draw.randint(1, 4))}


def check_record(record: Any) -> None:
    """A record gives answers whose trees hold their text, or cannot be used and can be written aside."""
    try:
        for answer in chat_answers(record):
            assert answer.tree.text.strip()
    except UNUSABLE as error:
        line = Rejected.by(error, 1, record).to_json()
        assert json.loads(line)["reason"] and len(line) < 2 * len(json.dumps(record)) + 1000


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of the file that is read; a new one each time would take as long as the reading."""
    return tempfile.TemporaryDirectory()


def draw_file(draw: random.Random) -> Scenario:
    records = [mutated(draw, draw.choice(RECORDS), draw.randint(0, 2)) for _ in range(draw.randint(1, 4))]
    text = json.dumps(records) if draw.random() < 0.6 else "\n".join(map(json.dumps, records))
    return {"text": spoilt(draw, text, draw.randint(0, 3)), "chunk": draw.choice((1, 7, 64, 4096))}


def check_file(text: str, chunk: int) -> None:
    """A whole array is read whole; what is broken comes as an error of ours; the size of a chunk changes nothing."""
    data = text.encode("utf-8", "surrogatepass")
    path = Path(_folder().name) / "records.jsonl"
    path.write_bytes(data)
    for _, row in open_records(path).rows:
        try:
            record_of(row)
        except UNUSABLE:
            continue
    if text.lstrip().startswith("["):
        read = [str(item) for item in array_items(BytesIO(data), max(chunk, 1))]
        assert read == [str(item) for item in array_items(BytesIO(data), 1 << 20)], "a chunk changes what is read"
        try:
            whole = json.loads(data, strict=False)
        except (ValueError, RecursionError):
            return
        assert read == [str(item) for item in whole], "a whole array is read whole"


def draw_markdown(draw: random.Random) -> Scenario:
    return {"text": _text(draw), "max_depth": draw.randint(1, 4), "max_forks": draw.choice((1, 3, 16, 999))}


def check_markdown(text: str, max_depth: int, max_forks: int) -> None:
    """The tree of a text holds the text, and is no larger than it may be."""
    found = extraction(text, max_depth=max(max_depth, 1), max_forks=max(max_forks, 1))
    assert found.tree.text == text, "text is lost"
    assert found.tree.depth <= max(max_depth, 1) and found.tree.fork_count <= max(max_forks, 1)
    assert (found.refused_by is None) or not found.tree.is_structured
    assert TextThread.from_json(found.tree.to_json()) == found.tree


KEYS = (
    "__class__", "__init__", "self", '""', "'a\x1b[2J'", "a" * 3000, '"' + "é" * 3000 + '"', "model.x", "train.train",
    "extract", "loading", "1", "-", "[train", "[[train]]", "[heads.x]", "seed.a.b", '"seed"', "'train'.epochs",
)  # fmt: skip
VALUES = (
    "nan", "inf", "-1", "1e400", "''", "[]", "[1, {}]", "{}", "true", "2020-01-01", "[['a']]", "9" * 400, "9" * 5000,
    "[" * 3000, "{a = " * 300, "'" + "b" * 5000 + "'", "1979-05-27T07:32:00Z",
)  # fmt: skip


def draw_recipe(draw: random.Random) -> Scenario:
    text = EXAMPLE.read_text(encoding="utf-8")
    lines = [line.removeprefix("#") for line in text.splitlines() if "=" in line or line.startswith("[")]
    draw.shuffle(lines) if draw.random() < 0.2 else None
    kept = "\n".join(line for line in lines if draw.random() < 0.5)
    if draw.random() < 0.5:
        line = draw.choice([one for one in lines if "=" in one])
        value = draw.choice(VALUES)
        if draw.random() < 0.4:
            key = draw.choice(KEYS)
            return {"text": f"{key}{'' if key.startswith('[') else f' = {value}'}\n{spoilt(draw, kept, 0)}"}
        return {"text": f"{line.split('=')[0]} = {value}\n{spoilt(draw, kept, 0)}"}
    return {"text": spoilt(draw, kept, draw.randint(0, 4))}


def check_recipe(text: str) -> None:
    """A recipe says what to do in values of the right kinds, or is refused in a short sentence."""
    path = Path(_folder().name) / "recipe.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        recipe = read_recipe(path)
    except ConfigurationError as error:
        assert len(str(error)) < 2000, "a refusal that nobody reads"
        return
    json.dumps(vars(recipe), default=lambda one: vars(one) if hasattr(one, "__dict__") else one, allow_nan=False)
    assert all(isinstance(name, str) for name in recipe.extract.without)


SETTINGS = {"fork_token_id": 5, "child_token_id": 6, "max_threads": 8, "max_depth": 3, "fork_bias": 0.5, "joint": "\n"}


def draw_settings(draw: random.Random) -> Scenario:
    return {"settings": mutated(draw, SETTINGS, draw.randint(1, 3))}


def check_settings(settings: Any) -> None:
    """Settings of a checkpoint are of their kinds, or refused."""
    try:
        config = AparConfig.from_dict(settings)
    except AparError:
        return
    given = config.to_dict()
    assert all(type(given.get(name, 0)) is int for name in SETTINGS if name.endswith(("_id", "threads", "depth"))), given
    assert isinstance(given.get("fork_bias", 0.0), float | int) and isinstance(given.get("joint", ""), str)
    assert AparConfig.from_dict(given) == config


TREE = ParagraphTree(
    [Thread(0, None, 0, 1, [1, 2, 3, 9, 4], [3, 4], start=2, finish_reason="eos", eos_token_id=0),
     Thread(1, 0, 1, 2, [1, 2, 3, 9, 10, 7], [7], start=5, unread=[3, 4], finish_reason="length"),
     Thread(2, 1, 0, 3, [1, 2, 3, 9, 10, 9, 10, 8], [8], start=7, finish_reason="eos", eos_token_id=0)],
    stopped_by=1, joint="/",
).to_dict()  # fmt: skip


def draw_tree(draw: random.Random) -> Scenario:
    return {"tree": mutated(draw, TREE, draw.randint(0, 3))}


def check_tree(tree: Any) -> None:
    """A tree that was written down reads, writes and counts as one, or is refused."""
    try:
        read = ParagraphTree.from_dict(tree)
    except AparError:
        return
    written = read.to_dict()
    assert ParagraphTree.from_dict(written).to_dict() == written
    assert sum(len(tokens) for _, tokens in read.reading_order()) == len(read.token_ids)
    assert {thread.index for thread, _, _ in read.segments()} <= set(range(len(read.threads)))
    assert all(isinstance(token, int) for token in [*read.token_ids, *read.closing_ids])


REQUESTS = (
    {"model": "m", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Trees?"}],
     "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 20, "stop": ["\n\n"], "logit_bias": {"5": 1.5},
     "n": 2, "seed": 7, "logprobs": True, "top_logprobs": 3, "apar": True, "apar_max_threads": 4, "temperature": 0.5},
    {"model": "m", "prompt": ["Trees?", "Rain?"], "max_tokens": 9, "logprobs": 2, "vllm_xargs": {"apar_fork_bias": 1}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "Oak"}],
     "continue_final_message": True, "add_generation_prompt": False, "tools": [CALL], "tool_choice": "none",
     "chat_template_kwargs": {"enable_thinking": False}, "documents": [{"text": "a"}], "response_format": {"type": "text"}},
)  # fmt: skip
_SERVED: dict[str, Served] = {}


def served(name: str) -> Served:
    """Return a model of that tokenizer, as the proxy knows it."""
    if name not in _SERVED:
        tokenizer = MAKERS[name]()
        tokenizer.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
        fork, child = tokenizer.convert_tokens_to_ids(["[Fork]", "[Child]"])
        _SERVED[name] = Served(name, tokenizer, AparConfig(fork_token_id=fork, child_token_id=child), 512)
    return _SERVED[name]


def draw_request(draw: random.Random) -> Scenario:
    body = mutated(draw, draw.choice(REQUESTS), draw.randint(1, 4))
    text = json.dumps(body)
    return {"text": text if draw.random() < 0.8 else spoilt(draw, text, 2), "chat": draw.random() < 0.7,
            "tokenizer": draw.choice(list(MAKERS))}  # fmt: skip


def check_request(text: str, chat: bool, tokenizer: str) -> None:
    """A body of a request is understood or refused with a status; no text in it is a control token."""
    one = served(tokenizer)
    try:
        asked = parse(_parsed(text.encode("utf-8", "surrogatepass")), chat=chat)
        _ = asked.model, asked.prompts, asked.cannot_fork
        if not asked.cannot_fork:
            prompts = one.prompts(asked)
            assert not one.control_ids & {token for ids in prompts for token in ids}
    except ApiError as error:
        assert 400 <= error.status < 500 and len(str(error)) < 2 * len(text) + 500


STORMS = (
    Storm("records", draw_record, check_record),
    Storm("record_files", draw_file, check_file),
    Storm("markdown", draw_markdown, check_markdown),
    Storm("recipes", draw_recipe, check_recipe),
    Storm("settings", draw_settings, check_settings, share=0.3),
    Storm("trees", draw_tree, check_tree, share=0.3),
    Storm("requests", draw_request, check_request),
)
