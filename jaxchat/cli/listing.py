"""What the commands share that list something of the user's and remove some of it."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

from jaxchat.cli.command_line import Command, Conflict, Need, agreed
from jaxchat.errors import UsageError
from jaxchat.options import Flag
from jaxchat.visible import visible

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListRequest:
    """What to do with the list."""

    remove: Annotated[
        tuple[str, ...],
        Flag(
            help="Remove what has this name, after a question; may be given more than once",
            example="--remove NAME",
            value="NAME",
            many=True,
        ),
    ] = ()
    yes: Annotated[bool, Flag(help="Remove without a question", example="--remove NAME --yes")] = False
    json: Annotated[
        bool, Flag(help="Print a JSON list of objects, with the path of each", example="--json")
    ] = False


class Listing(NamedTuple, Generic[T]):
    """A list.

    Attributes:
      entries: by name, in order.
      table: all of it as text.
      as_json: an entry as JSON takes it.
      question: what to ask before one is removed, `remove` and its name left out: `, saved today`.
      remove: does it.
      missing: the error about a name that is not in it; `{name}` stands for that.
    """

    entries: Mapping[str, T]
    table: Callable[[], str]
    as_json: Callable[[T], Any]
    question: Callable[[T], str]
    remove: Callable[[T], None]
    missing: str


def list_command(usage: str, stray: str, listing: Callable[[], Listing[Any]]) -> Command[ListRequest]:
    """The command over a list, which is made when it runs."""

    def run(request: ListRequest, given: frozenset[str]) -> int:
        found = listing()
        if request.json:
            entries = [found.as_json(entry) for entry in found.entries.values()]
            print(json.dumps(entries, ensure_ascii=False, indent=2))
            return 0
        if not request.remove:
            table = found.table()
            print(visible(table) if sys.stdout.isatty() else table)
            return 0
        for name in request.remove:
            if name not in found.entries:
                raise UsageError(found.missing.format(name=name))
        for name in dict.fromkeys(request.remove):
            entry = found.entries[name]
            if request.yes or agreed(f"remove {name}{found.question(entry)}?"):
                found.remove(entry)
                print(f"removed {name}")
        return 0

    return Command(
        usage=usage,
        request=ListRequest,
        run=run,
        stray=stray,
        conflicts=(Conflict("json", "remove", "one lists, the other removes"),),
        needs=(Need("yes", ("remove",), "it answers the question before removing"),),
    )
