"""Ask a running server the questions of lm-eval's tasks. lm-eval makes the prompts and scores the answers.

Reads: task files of lm-eval and of a folder of the user's, and their data sets (of the hub, or local).

Requests are ours: every one has a seed of its own, a reply that was cut is marked, and the thoughts before an answer
are not scored. A task's stop strings end the answer and not the request, since they may occur in thoughts.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval import __version__ as LM_EVAL_VERSION
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from bench.requests import REQUEST_TIMEOUT_S, Served, send_concurrently
from common.errors import IncompleteError, UserError
from common.files import hash_bytes
from common.progress import Progress
from recipe.bench import AccuracySection
from serve.client import AnswerError, Client

__all__ = ["LM_EVAL_VERSION", "Asking", "ask_questions", "load_task", "open_tasks"]

FEWSHOT_SEED = 1234  # lm-eval's own default


@dataclass(frozen=True)
class Asking:
    """How questions are asked: body of each request without its messages, and the tags around thoughts.

    `seed` begins the text from which the seed of a sampled request follows; None: greedy, no seed is sent.
    """

    body: Mapping[str, Any]
    seed: str | None
    thinking_tags: tuple[str, str] | None
    concurrency: int
    title: str


@dataclass(frozen=True)
class Reply:
    """A server's whole reply, and whether it was cut at max_tokens or at the end of the context."""

    text: str
    is_cut: bool


def open_tasks(section: AccuracySection) -> TaskManager:
    """Find the section's tasks. Raises UserError for a name that is in neither its folder nor lm-eval."""
    folder = section.include_path
    if folder is not None:
        if not folder.is_dir():
            raise UserError(
                "bench.accuracy.include_path", found=f"no folder {folder}", expected="one", fix="Correct it."
            )
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(section.tasks) <= set(own.all_tasks):
            return own  # reading lm-eval's own 13,000 files takes seconds
    manager = TaskManager(include_path=str(folder) if folder else None)
    for name in section.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise UserError(
                "bench.accuracy.tasks",
                found=name,
                expected=f"a task of lm-eval {LM_EVAL_VERSION}" + (f" or of {folder}" if folder else ""),
                fix=f"Did you mean {near[0]!r}?" if near else "Correct it.",
            )
    return manager


def load_task(manager: TaskManager, name: str, section: AccuracySection) -> dict[str, Any]:
    """Load a task or group with its data. Raises UserError if it is not answered in text, or its data is not here."""
    try:
        loaded: dict[str, Any] = manager.load([name])
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"task {name}",
            found=f"no data set ({type(error).__name__}: {str(error)[:300]})",
            expected="one on the hub or on this machine",
            fix="Make it reachable, or name local data in a task file of your own (docs/accuracy.md).",
        ) from None
    for leaf, task in loaded["tasks"].items():
        is_text = task.OUTPUT_TYPE == "generate_until" and not getattr(task, "MULTIMODAL", False)
        if not is_text or getattr(task, "UNSAFE_CODE", False):
            found = "generated code that is run" if is_text else f"{task.OUTPUT_TYPE} with other inputs or outputs"
            raise UserError(
                f"task {leaf}", found=found, expected="text answers (generate_until)", fix="Choose another task."
            )
        if section.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 is part of such a task
            task.set_config(key="num_fewshot", value=section.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def ask_questions(loaded: dict[str, Any], server: Served, asking: Asking, limit: int | None) -> dict[str, Any]:
    """Ask all questions of a task or group once; return them by task, with their replies and metrics.

    Raises IncompleteError if the server does not answer.
    """
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples in the same order every time
    model = ServedModel(server, asking)
    found = evaluate(
        lm=model,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    return {
        name: _read_questions(samples, {doc: replies for (task, doc), replies in model.replies.items() if task == name})
        for name, samples in found["samples"].items()
    }


def _read_questions(samples: Sequence[Mapping[str, Any]], replies: Mapping[int, list[Reply]]) -> list[dict[str, Any]]:
    """Return a task's questions from lm-eval's samples, of which each filter has one per question.

    A metric that is no number per question (such as BLEU, of a whole corpus) is None.
    """
    questions: dict[int, dict[str, Any]] = {}
    for sample in samples:
        number = int(sample["doc_id"])
        question = questions.setdefault(
            number,
            {
                "id": number,
                "prompt": sample["prompt_hash"],
                "target": str(sample["target"]),
                "replies": [reply.text for reply in replies[number]],
                "cut": sum(reply.is_cut for reply in replies[number]),
                "metrics": {},
            },
        )
        for metric in sample["metrics"]:
            question["metrics"][f"{metric},{sample['filter']}"] = _to_number(sample[metric])
    return [questions[number] for number in sorted(questions)]


def _to_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


class ServedModel(LM):
    """The target behind a server, for lm-eval; keeps the replies by task and question."""

    tokenizer_name = ""

    def __init__(self, server: Served, asking: Asking) -> None:
        super().__init__()
        self.replies: dict[tuple[str, int], list[Reply]] = {}
        self._server, self._asking = server, asking

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the messages as JSON, since the server applies its template; `generate_until` reads them back."""
        extra = {} if add_generation_prompt else {"add_generation_prompt": False, "continue_final_message": True}
        return json.dumps({"messages": chat_history, **extra}, ensure_ascii=False)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the answers, in order."""
        replies = asyncio.run(self._send_all(requests))
        answers = []
        for request, reply in zip(requests, replies, strict=True):
            self.replies.setdefault((request.task_name, request.doc_id), []).append(reply)
            answers.append(find_answer(reply.text, self._asking.thinking_tags, request.args[1].get("until")))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise AssertionError(f"load_task refuses tasks such as {requests[0].task_name}")

    loglikelihood_rolling = loglikelihood

    async def _send_all(self, requests: Sequence[Any]) -> list[Reply]:
        asking, replies = self._asking, dict[int, Reply]()
        asked = Counter[str]()

        async def send(client: Client, item: tuple[int, Any, int]) -> None:
            number, request, copy = item
            replies[number] = await self._send(client, request, copy)

        items = []
        for number, request in enumerate(requests):
            asked[request.args[0]] += 1
            items.append((number, request, asked[request.args[0]]))
        with Progress(len(items), asking.title, "question") as progress:
            await send_concurrently(items, send, asking.concurrency, progress)
        return [replies[number] for number in range(len(requests))]

    async def _send(self, client: Client, request: Any, copy: int) -> Reply:
        """Send one request; `copy` counts those with the same prompt, from 1."""
        url, seed = f"{self._server.url}/v1", self._asking.seed
        prompt = request.args[0]
        body = {"model": self._server.model, **self._asking.body, **json.loads(prompt)}
        if seed is not None:  # one seed for all questions would make their draws alike
            body["seed"] = int(hash_bytes(f"{seed}/{copy}/{prompt}".encode())[:8], 16) >> 1
        try:
            answer = await client.chat(url, body, REQUEST_TIMEOUT_S)
        except AnswerError as error:
            raise IncompleteError(
                f"{url} ({request.task_name}, question {request.doc_id}): found {error}, expected an answer. Look at "
                "the server's log beside the answers, then run again: finished tasks are kept."
            ) from None
        choice = answer["choices"][0]
        message = choice["message"]
        thoughts = message.get("reasoning") or message.get("reasoning_content")
        opening, closing = self._asking.thinking_tags or ("", "")
        before = f"{opening}{thoughts}{closing}" if thoughts and closing else ""
        return Reply(before + (message.get("content") or ""), choice["finish_reason"] == "length")


def find_answer(text: str, thinking_tags: tuple[str, str] | None, until: str | Sequence[str] | None) -> str:
    """Return what is scored of a reply: the text after its thoughts, up to the first of the task's stop strings.

    Thoughts that were opened and never closed hold no answer.
    """
    if thinking_tags is not None:
        opening, closing = thinking_tags
        if closing in text:
            text = text.rpartition(closing)[2].lstrip()
        elif text.lstrip().startswith(opening):
            return ""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.partition(stop)[0]
    return text
