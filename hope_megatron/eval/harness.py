"""Our models under lm-evaluation-harness: likelihoods of continuations and documents, greedy or sampled continuations.

A document begins from the initial state after an end mark, as in training, and is read to its end with the state carried on:
nothing is ever truncated, whatever the training length. Requests are split over processes by the harness.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from hope_megatron.eval.perplexity import IGNORE
from hope_megatron.eval.task_data import TASK_DATA, HarnessError, definition_folders, opened_tasks
from hope_megatron.generation.complete import TextTokenizer, new_document
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.model import LanguageModel
from hope_megatron.parallel.control import ControlGroup

_MAX_NEW_TOKENS = 256  # where a task does not say


class HarnessModel(TemplateLM):
    """One replica of the model; rank and world size are those of the default process group."""

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, *, window_tokens: int, batch_size: int = 8
    ) -> None:
        super().__init__()
        self.model, self._tokenizer = model.eval(), tokenizer
        self.window_tokens, self.batch_size = window_tokens, batch_size
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            self._control = ControlGroup()
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which also stands before each."""
        return self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; no special tokens are added here."""
        return self._tokenizer.encode(string).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations after their contexts, and whether greedy decoding gives them.

        Raises:
            HarnessError: a continuation without a token; it would always be the likeliest.
        """
        for context, continuation in (request.args for request in requests):
            if not self.tok_encode(continuation):
                raise HarnessError(
                    f"a task asks for the likelihood of {continuation!r} after {context[-60:]!r}: that is no token, and no text is "
                    "always the likeliest; mend the task's choices or its doc_to_target"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it. Spaces at the context's end belong to the continuation, as in the harness.

        Both together are tokenized as one text. Where that merges the continuation with the context's last token, there is no
        place to cut: then the continuation is tokenized alone.
        """
        moved = len(context) - len(context.rstrip())
        text = context[len(context) - moved :] + continuation
        head = self.tok_encode(context[: len(context) - moved])
        whole = self.tok_encode(context + continuation)
        if whole[: len(head)] == head and len(whole) > len(head):
            return head, whole[len(head) :]
        return head, self._encode_inside(text)

    def _encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that does not begin a document: some tokenizers put a space before the first word."""
        for mark in ("\n", "\0"):
            head, whole = self.tok_encode(mark), self.tok_encode(mark + text)
            if head and whole[: len(head)] == head:
                return whole[len(head) :]
        return self.tok_encode(text)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents."""
        documents = [self.tok_encode(request.args[0]) for request in requests]
        return [total for total, _ in self._score([([], document) for document in documents])]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is what greedy decoding gives.

        Rows of a batch have different lengths and are padded at the end, where a recurrent model does not see it. A document
        without a token has likelihood 1.
        """
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        scored_pairs = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        order = sorted(scored_pairs, key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            inputs, targets = self._rows([pairs[i] for i in rows])
            totals, greedy, state = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows)).bool(), None
            for x, y in zip(inputs.split(self.window_tokens, 1), targets.split(self.window_tokens, 1)):
                output = self.model(x, state=state, return_state=True)
                state, scored = output.state, y != IGNORE
                picked = output.logits.log_softmax(-1).gather(2, y.clamp(min=0).unsqueeze(2)).squeeze(2)
                totals += torch.where(scored, picked, 0.0).double().sum(1).cpu()
                greedy &= ((output.logits.argmax(-1) == y) | ~scored).all(1).cpu()
            for row, total, is_greedy in zip(rows, totals.tolist(), greedy.tolist()):
                results[row] = (total, is_greedy)
        return results

    def _rows(self, pairs: Iterable[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [B, T]; only the continuations have targets."""
        rows = []
        for context, continuation in pairs:
            head = context if context[:1] == [self.eot_token_id] else [self.eot_token_id, *context]
            rows.append((head, continuation))
        length = max(len(head) + len(continuation) for head, continuation in rows) - 1
        inputs, targets = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), IGNORE, np.int64)
        for row, (head, continuation) in enumerate(rows):
            ids = head + continuation
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(head) - 1 : len(ids) - 1] = continuation
        return torch.from_numpy(inputs).to(self._device), torch.from_numpy(targets).to(self._device)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop string, the end of the document, or the task's limit."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(settings.get("max_gen_toks", settings.get("max_new_tokens", _MAX_NEW_TOKENS)))
        greedy = not settings.get("do_sample", False)
        options = SamplingOptions(
            temperature=0.0 if greedy else float(settings.get("temperature", 1.0)),
            top_k=settings.get("top_k"),
            top_p=float(settings.get("top_p", 1.0)),
        )
        rng = torch.Generator(self._device).manual_seed(0)
        decoder = new_document(self.model, self._tokenizer)
        decoder.append(torch.tensor([self.tok_encode(context)], dtype=torch.int64))
        ids: list[int] = []
        for token in decoder.generate(limit, options, rng):
            if int(token) == self.eot_token_id:
                break
            ids.append(int(token))
            if any(stop in self._tokenizer.decode(ids[-64:]) for stop in stops):
                break
        text = self._tokenizer.decode(ids)
        return text[: min([len(text), *(text.index(stop) for stop in stops if stop in text)])]

    # -- what the harness asks of processes side by side ------------------------------------------------------------------

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors of all ranks, one after the other."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What the harness has counted on all ranks, on `dst`. As typed messages, where the harness's own models send pickles.

        Raises:
            HarnessError: a task counts in something other than numbers, texts, lists, tuples and mappings.
        """
        gathered = self._control.gather(as_plain(obj))
        return [from_plain(found) for found in gathered] if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


def as_plain(value: Any) -> list[Any]:
    """A value of tuples, mappings with any keys and NumPy's numbers as nested lists, each with its kind in front."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["value", value]
    if isinstance(value, (list, tuple)):
        return ["tuple" if isinstance(value, tuple) else "list", *map(as_plain, value)]
    if isinstance(value, Mapping):
        return ["map", *([as_plain(key), as_plain(item)] for key, item in value.items())]
    raise HarnessError(
        f"a task counts in values of {type(value).__name__}, which one process can, and several cannot; use --nproc 1"
    )


def from_plain(plain: list[Any]) -> Any:
    """The inverse."""
    kind, *items = plain
    if kind == "value":
        return items[0]
    if kind == "map":
        return {from_plain(key): from_plain(item) for key, item in items}
    return tuple(map(from_plain, items)) if kind == "tuple" else list(map(from_plain, items))


def evaluate_tasks(
    model: HarnessModel,
    tasks: list[str],
    *,
    task_directory: str | None = None,
    data_dir: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any] | None:
    """Run tasks of the harness.

    Args:
        tasks: names.
        task_directory: YAML files of further tasks.
        data_dir: files of the paper's tasks (see task_data.py).
        num_fewshot: examples before each question; None leaves it to the task.
        limit: documents per task, for a quick look.
        say: told what happens.

    Returns:
        On rank 0: `tasks` (metric by name, with its standard error) and `versions`. None on the others.

    Raises:
        HarnessError: an unknown task, or data that are not to be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = definition_folders() if any(task in TASK_DATA for task in tasks) else []
    paths = [*folders, *([] if task_directory is None else [task_directory])]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if any(task not in manager.all_tasks for task in tasks):
        say("reading the harness's list of tasks")
        manager = TaskManager(include_path=paths)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise HarnessError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, and "
            "--include DIR adds a directory of YAML files"
        )
    with opened_tasks(manager, tasks, data_dir, few_shot=bool(num_fewshot)) as specs:
        found = simple_evaluate(
            model=model, tasks=specs, num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False,
            bootstrap_iters=1000,
        )  # fmt: skip
    if found is None:
        return None
    return {
        "tasks": {task: _figures(figures) for task, figures in found["results"].items()},
        "versions": found["versions"],
        "num_documents": {task: count["effective"] for task, count in found.get("n-samples", {}).items()},
    }


def _figures(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1} -> {"acc": {"value": 0.5, "stderr": 0.1}}; other filters keep their name."""
    figures: dict[str, dict[str, float | None]] = {}
    for key, value in found.items():
        metric, _, chosen = key.partition(",")
        if metric.endswith("_stderr") or not chosen or not isinstance(value, (int, float)):
            continue
        error = found.get(f"{metric}_stderr,{chosen}")
        name = metric if chosen == "none" else f"{metric},{chosen}"
        figures[name] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return figures
