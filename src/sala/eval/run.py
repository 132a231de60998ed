"""An evaluation that can be interrupted anywhere: every sample is a line in a file, and a second run asks for the rest."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from sala.errors import InputError, writing
from sala.eval.plots import write_plots
from sala.eval.reader import Answer, Reader, Request
from sala.eval.summary import Row, as_mapping, as_markdown, summarize
from sala.eval.task import (
    THOUGHTS_RULE,
    Predictions,
    Prompt,
    Sample,
    Setting,
    Task,
    TooShortError,
    prompt_hash,
    without_thoughts,
)

SAMPLES, SETTINGS, SUMMARY, TABLE = "samples.jsonl", "settings.json", "summary.json", "summary.md"

Key = tuple[str, int, int]  # task, length, index


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: every task at every length, so many samples of each. about: what else a record of the run says."""

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    samples: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def asked(self) -> Iterator[Key]:
        for task in self.tasks:
            for length in self.lengths:
                for index in range(self.samples):
                    yield task.name, length, index


def run(
    plan: Plan,
    reader: Reader,
    setting: Setting,
    out: Path,
    on_sample: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[Row]:
    """Ask `reader` everything in `plan` and return a row a task and length, written to the folder `out` too.

    `out` holds `settings.json`, `samples.jsonl` (one line a sample), `summary.json`, `summary.md` and pictures. Where `out` has
    samples of the same settings already, only the others are asked, and those that ended with an error. The files are
    then those of a run that nothing interrupted.

    Raises:
        InputError: `out` belongs to a run with other settings; a task's length or file does not do.
        DiskError: `out` cannot be written.
    """
    if plan.samples < 1:
        raise InputError(f"{plan.samples} samples; expected 1 or above")
    settings = _settings(plan, setting)
    with writing(out / SAMPLES):
        out.mkdir(parents=True, exist_ok=True)
        _require_same(out / SETTINGS, settings)
        records = {key_of(record): record for record in read_samples(out) if "error" not in record}
        _replace(out / SAMPLES, _lines(records.values()))
        tasks = {task.name: task for task in plan.tasks}
        with (out / SAMPLES).open("a", encoding="utf-8") as file:
            for task in plan.tasks:
                missing = [key for key in plan.asked() if key[0] == task.name and key not in records]
                for record in _answers(tasks[task.name], missing, reader, setting):
                    file.write(_line(record))
                    file.flush()
                    records[key_of(record)] = record
                    on_sample(record)
        wanted = list(plan.asked())
        ordered = [records[key] for key in wanted]
        _replace(out / SAMPLES, _lines(ordered))
        rows = summarize(ordered, tasks)
        write_summary(out, rows, settings)
        write_plots(rows, ordered, out, str(plan.about.get("model", reader.name)))
    return rows


def key_of(record: Mapping[str, Any]) -> Key:
    return record["task"], record["length"], record["index"]


def read_samples(out: Path) -> list[dict[str, Any]]:
    """Return the records in a folder; a last line that was cut off is no record.

    Raises:
        InputError: a line in the middle is no record.
    """
    if not (out / SAMPLES).exists():
        return []
    lines = (out / SAMPLES).read_text("utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key_of(record)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"line {number} of {str(out / SAMPLES)!r} is no sample; expected a JSON object") from error
        records.append(record)
    return records


def read_rows(out: Path) -> tuple[str, list[Row]]:
    """Return the model's name and the rows of a finished run.

    Raises:
        InputError: there is none.
    """
    try:
        summary = json.loads((out / SUMMARY).read_text("utf-8"))
        return str(summary["settings"].get("model", out.name)), [Row(**row) for row in summary["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(out)!r} has no {SUMMARY} of a run; expected the --out of `sala eval run`") from error


def write_summary(out: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:

    summary = {"settings": dict(settings), "rows": [as_mapping(row) for row in rows]}
    _replace(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _replace(out / TABLE, as_markdown(rows))


def _settings(plan: Plan, setting: Setting) -> dict[str, Any]:
    return {
        **plan.about,
        "tasks": [task.name for task in plan.tasks],
        "lengths": list(plan.lengths),
        "samples": plan.samples,
        "seed": setting.seed,
        "style": setting.style,
        "chat": setting.chat,
        "files": {name: str(path) for name, path in setting.files.items()},
        "thoughts": THOUGHTS_RULE,
    }


def _require_same(path: Path, settings: Mapping[str, Any]) -> None:
    written = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        for name in dict.fromkeys((*before, *settings)):
            ours, theirs = json.loads(written).get(name), before.get(name)
            if ours != theirs:
                raise InputError(
                    f"{str(path.parent)!r} holds a run with {name} = {theirs!r}, not {ours!r}; expected the same settings, "
                    "or another folder"
                )
    else:
        _replace(path, written)


def _answers(task: Task, keys: Sequence[Key], reader: Reader, setting: Setting) -> Iterator[dict[str, Any]]:
    """Yield a record for every key, in the order in which the reader answers."""
    asked: dict[Key, tuple[Sample, dict[str, Any]]] = {}
    impossible: list[dict[str, Any]] = []

    def made() -> Iterator[tuple[Key, Any, list[int]]]:
        for key in keys:
            try:
                sample = task.make(setting, key[1], key[2])
            except TooShortError as error:
                impossible.append({**_named(key), "error": str(error)})
                continue
            if isinstance(sample, Prompt):
                tokens, places = setting.written(sample)
            else:
                tokens, places = sample.tokens.tolist(), sample.places
            asked[key] = sample, _facts(key, sample, tokens, places, setting)
            yield key, sample, tokens

    answers: Iterator[tuple[Key, Any]]
    if task.predicts:
        answers = reader.predict((key, window) for key, window, _ in made())
    else:
        answers = reader.generate(Request(key, prompt, tuple(tokens)) for key, prompt, tokens in made())
    for key, answer in answers:
        sample, facts = asked.pop(key)
        yield facts | _scored(task, sample, answer, setting, facts)
    yield from impossible


def _named(key: Key) -> dict[str, Any]:
    return dict(zip(("task", "length", "index"), key, strict=True))


def _facts(key: Key, sample: Sample, tokens: list[int], places: Sequence[int], setting: Setting) -> dict[str, Any]:
    begin = setting.tokenizer.bos_token_id
    # in a row at the start: some templates begin every turn with the same token
    started = list(takewhile(lambda token: token == begin, tokens))
    return {
        **_named(key),
        "prompt": prompt_hash(sample),
        "tokens": len(tokens),
        "new_tokens": sample.max_new_tokens if isinstance(sample, Prompt) else 0,
        "bos": len(started),
        "places": list(places),
        **sample.facts,
    }


def _scored(task: Task, sample: Sample, answer: Any, setting: Setting, facts: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(answer, Predictions):
        return {"score": task.score(sample, answer, setting.style), **task.note(sample, answer)}
    assert isinstance(answer, Answer)
    if answer.error is not None:
        return {"error": answer.error}
    said = {"answer": answer.text, "finish": answer.finish, "read_tokens": answer.read_tokens}
    if facts["tokens"] + facts["new_tokens"] > facts["length"]:
        total = facts["tokens"] + facts["new_tokens"]
        return {"error": f"prompt and answer take {total:,} tokens; expected at most {facts['length']:,}"}
    text = without_thoughts(answer.text)
    return said | {"score": task.score(sample, text, setting.style), **task.note(sample, text)}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _lines(records: Any) -> str:
    return "".join(map(_line, records))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
