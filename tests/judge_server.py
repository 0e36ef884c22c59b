"""A server that stands in for a judge: it speaks OpenAI's API, and its verdicts have a bias that was planted."""

import asyncio
import random
import re

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tiny_server import InThread

SHOWN = re.compile(r"^(\w+) (REQUEST|ANSWER A|ANSWER B) \1\n(.*?)\n\1 END OF \2 \1$", re.DOTALL | re.MULTILINE)


class JudgeStandIn(InThread):
    """A judge that replies what ``verdict(prompt, first, second)`` says.

    Attributes:
        asked: the bodies of all requests, those that were refused included.
        keys: what came as ``Authorization``.
        fault: told of each request's number, from 1: a status to refuse it with, or ``None``.
        silent: say nothing, ever.
        finish: why a reply ends, as OpenAI's API names it.
    """

    def __init__(self, verdict, fault=lambda number: None, silent=False, finish="stop"):
        super().__init__(self.make)
        self.verdict, self.fault, self.silent, self.finish = verdict, fault, silent, finish
        self.asked, self.keys = [], []

    async def make(self):
        return Starlette(routes=[Route("/v1/chat/completions", self.completion, methods=["POST"])])

    async def completion(self, request):
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        number = len(self.asked)
        if self.silent:
            await asyncio.sleep(60)
        if (status := self.fault(number)) is not None:
            return Response("not now", status, headers={"retry-after": "0"})
        (message,) = body["messages"]
        shown = {name: text for _, name, text in SHOWN.findall(message["content"])}
        reply = self.verdict(shown["REQUEST"], shown["ANSWER A"], shown["ANSWER B"])
        message = {"role": "assistant", "content": reply}
        return JSONResponse({"choices": [{"message": message, "finish_reason": self.finish}]})


def toss(chance, *words):
    """Return true with a chance, and the same for the same words."""
    return random.Random(repr(words)).random() < chance


def prefers_first_place(chance):
    """Each verdict is for the first place with that chance, whatever stands there."""
    return lambda prompt, first, second: "[[A]]" if toss(chance, prompt, first, second) else "[[B]]"


def prefers_longer(prompt, first, second):
    """The longer answer wins."""
    return "They differ.\n[[A]]" if len(first) > len(second) else "They differ.\n[[B]]"


def prefers_arm(name, chance):
    """The answer that begins with ``name`` wins a prompt with that chance, in either order."""
    return lambda prompt, first, second: "[[A]]" if toss(chance, prompt) is first.startswith(name) else "[[B]]"
