"""The same generation by one process over the whole model: what a pipeline is compared to.

`python -m node.cli.demo.reference MODEL.gguf` reads `{"messages": [...], "max_tokens": N, "threads": N,
"ctx_size": N}` on stdin and prints `{"tokens": [...], "tokens_per_s": ...}`. Greedy, prefill in the same chunks of
32 as a stage: equal batch shapes give equal bits.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from node.pipeline.engine.batch import Slot
from node.pipeline.engine.chat import render_chat
from node.pipeline.engine.engine import Engine
from node.pipeline.engine.settings import PREFILL_CHUNK, EngineSettings
from protocol.commands.common import ChatMessage
from protocol.commands.tasks import Sampling
from protocol.structs import prepared


def generate(path: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of a chat, end-of-text not among them, and tokens/s after the first."""
    engine = Engine(EngineSettings(threads=task["threads"], ctx_size=task["ctx_size"], max_sessions=1))
    engine.load(0, path)
    vocabulary = engine.vocabulary(0)
    messages = msgspec.convert(task["messages"], prepared(tuple[ChatMessage, ...]))
    text = render_chat(vocabulary.chat_template, messages, bos_token=vocabulary.bos_text, eos_token=vocabulary.eos_text)
    prompt = vocabulary.tokenize(text, add_special=False, parse_special=True)
    sequence = engine.open_sequence()
    position, chunk = 0, np.empty(0, np.float32)
    for start in range(0, len(prompt), PREFILL_CHUNK):
        values = np.array(prompt[start : start + PREFILL_CHUNK], np.int32)
        (chunk,) = engine.forward([0], [Slot(sequence, position, values, logits_for_last=True)])
        position += len(values)
    tokens: list[int] = []
    first = time.perf_counter()
    while len(tokens) < task["max_tokens"]:
        token = engine.sample(chunk, Sampling(), position)
        if vocabulary.is_end(token):
            break
        tokens.append(token)
        if len(tokens) == task["max_tokens"]:
            break
        (chunk,) = engine.forward([0], [Slot(sequence, position, np.array([token], np.int32), logits_for_last=True)])
        position += 1
    seconds = time.perf_counter() - first
    return {"tokens": tokens, "tokens_per_s": max(0, len(tokens) - 1) / seconds if seconds else 0.0}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(generate(Path(sys.argv[1]), json.load(sys.stdin))) + "\n")
