"""Every task by its name, and groups of them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from sala.errors import InputError, nearest
from sala.eval.code import TASKS as CODE
from sala.eval.language import TASKS as LANGUAGE
from sala.eval.mrcr import TASKS as MRCR
from sala.eval.nolima import TASKS as NOLIMA
from sala.eval.programs import TASKS as PROGRAMS
from sala.eval.retrieval import TASKS as RETRIEVAL
from sala.eval.ruler import TASKS as RULER
from sala.eval.task import Task

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for tasks in (RULER, MRCR, NOLIMA, CODE, LANGUAGE, RETRIEVAL, PROGRAMS) for task in tasks}
)
GROUPS = tuple(dict.fromkeys(task.group for task in TASKS.values()))


def tasks_named(names: Sequence[str], files: Mapping[str, object]) -> tuple[list[Task], list[Task]]:
    """Return the tasks of names and groups in order, and those that a group has but that need a file which is not there.

    Raises:
        InputError: a name is unknown, or a task asked for by its own name needs a file.
    """
    chosen: dict[str, Task] = {}
    left_out: dict[str, Task] = {}
    for name in names:
        if name in TASKS:
            task = TASKS[name]
            if task.needs is not None and task.needs not in files:
                raise InputError(f"task {name!r} needs a file; expected --file {task.needs}=PATH")
            chosen[name] = task
        elif name in GROUPS:
            for task in TASKS.values():
                if task.group == name:
                    missing = task.needs is not None and task.needs not in files
                    (left_out if missing else chosen)[task.name] = task
        else:
            known = (*GROUPS, *TASKS)
            raise InputError(f"task {name!r}; expected any of {', '.join(known)}{nearest(name, known)}")
    if not chosen:
        raise InputError("no task; expected names or groups such as ruler,ppl")
    return list(chosen.values()), list(left_out.values())
