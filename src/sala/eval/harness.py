"""General suites through lm-evaluation-harness: a reader as its model, and tasks of our table as its tasks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sala.errors import InputError
from sala.eval.reader import Answer, Reader, Request
from sala.eval.task import Predictions, Prompt, Setting, Task, Window, ask, without_thoughts

try:
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise InputError(
        "general suites need lm-evaluation-harness; expected pip install 'lm_eval>=0.4.13,<0.5'"
    ) from error

# the paper's general suites, by the harness's names
SUITES = ("cmmlu", "mmlu_pro", "bbh", "ifeval", "aime24", "aime25")
DEFAULT_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """A reader as a model of lm-evaluation-harness.

    A request without an answer ends the evaluation: the harness knows no errors of single samples.

    on_answer: called after each request.
    """

    def __init__(self, reader: Reader, setting: Setting, on_answer: Callable[[], None] = lambda: None):
        super().__init__()
        self.reader, self.setting, self.on_answer = reader, setting, on_answer
        self.tokenizer = setting.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.setting.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.setting.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.setting.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.setting.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return ids, with the tokenizer's start token unless the text has it."""
        begin = self.setting.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = begin is None or not string.startswith(begin)
        return list(self.setting.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        windows = [
            Window(np.array([*context, *continued], np.int64), len(context) + np.arange(len(continued)))
            for _, context, continued in requests
        ]
        return [(float(row.log_probs.sum()), bool(row.right.all())) for row in self._predicted(windows)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for request in requests:
            tokens = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            windows.append(Window(np.array(tokens, np.int64), np.arange(1, len(tokens))))
        return [float(row.log_probs.sum()) for row in self._predicted(windows)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [self._request(i, *request.args) for i, request in enumerate(requests)]
        answers = dict(self._told(self.reader.generate(asked)))
        return [_cut(without_thoughts(answers[i].text), request.args[1]) for i, request in enumerate(requests)]

    def _request(self, key: int, text: str, options: Mapping[str, Any]) -> Request:
        new_tokens = int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        return Request(key, Prompt(ask(text), (), new_tokens), tuple(self.tok_encode(text)))

    def _predicted(self, windows: Sequence[Window]) -> list[Predictions]:
        found = dict(self._told(self.reader.predict(enumerate(windows))))
        return [found[i] for i in range(len(windows))]

    def _told(self, answers: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
        for key, answer in answers:
            if isinstance(answer, Answer) and answer.error is not None:
                raise InputError(f"request {key} has no answer: {answer.error}")
            self.on_answer()
            yield key, answer


def _cut(text: str, options: Mapping[str, Any]) -> str:
    """Return the answer up to the first of the task's stop strings."""
    until = options.get("until", [])
    ends = [text.find(stop) for stop in ([until] if isinstance(until, str) else until) if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def harness_task(task: Task, setting: Setting, length: int, samples: int) -> dict[str, Any]:
    """Return a task of our table that answers prompts as a task of the harness.

    Raises:
        InputError: the task predicts tokens instead.
    """
    if task.predicts:
        raise InputError(
            f"task {task.name!r} predicts tokens; expected one that answers prompts, such as niah_single_1"
        )
    made = [task.make(setting, length, index) for index in range(samples)]
    prompts = [sample for sample in made if isinstance(sample, Prompt)]

    def rows(**kwargs: Any) -> dict[str, Any]:
        texts = [{"index": i, "text": setting.text(prompt)} for i, prompt in enumerate(prompts)]
        return {"test": Dataset.from_list(texts)}

    def process(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {"score": task.score(prompts[doc["index"]], without_thoughts(results[0]), setting.style)}

    return {
        "task": f"{task.name}_{length}",
        "dataset_path": "",
        "custom_dataset": rows,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "process_results": process,
        "generation_kwargs": {"until": [], "max_gen_toks": max(p.max_new_tokens for p in prompts)},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": task.higher_is_better}],
    }


def run_suites(
    reader: Reader,
    setting: Setting,
    tasks: Sequence[str | dict[str, Any]],
    *,
    include: Path | None = None,
    limit: int | None = None,
    on_answer: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the harness's results, the samples left out.

    include: a folder of task files, taken before the harness's own of the same name. limit: samples of each task.

    Raises:
        InputError: no such task, its data is not there, or a request has no answer.
    """
    manager = TaskManager(
        include_path=None if include is None else str(include),
        include_defaults=any(isinstance(task, str) for task in tasks),
    )
    known = set(manager.all_tasks)
    for task in tasks:
        if isinstance(task, str) and task not in known:
            raise InputError(
                f"task {task!r} is none of lm-evaluation-harness's; expected one such as {', '.join(SUITES)}"
            )
    model = HarnessModel(reader, replace(setting), on_answer)
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=setting.chat,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        raise InputError(
            f"the data of {tasks} cannot be loaded ({error}); expected the hub within reach, or --include with task files "
            "that name local data"
        ) from error
    assert found is not None
    return {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
