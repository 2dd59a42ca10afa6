"""`jaxchat sessions`: lists the conversations that were saved under a name, and removes some."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

from jaxchat.cli.command_line import Command, Conflict, Need, agreed
from jaxchat.errors import UsageError
from jaxchat.options import Flag

if TYPE_CHECKING:
    from jaxchat.chat.saved import SavedSession

_USAGE = """\
usage: {program} [--json | --remove NAME]

Lists the conversations that --save_session NAME or /save NAME has kept, the
newest first: when, with which model and layer plan, how long, how they begin.

  {program}
  {program} --remove talk
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionsRequest:
    """What to do with the list."""

    remove: Annotated[
        tuple[str, ...],
        Flag(
            help="Remove the session of this name, after a question; may be given more than once",
            example="--remove talk",
            value="NAME",
            many=True,
        ),
    ] = ()
    yes: Annotated[bool, Flag(help="Remove without a question", example="--remove talk --yes")] = False
    json: Annotated[
        bool, Flag(help="Print a JSON list of objects, with the path of each file", example="--json")
    ] = False


def _run(request: SessionsRequest, given: frozenset[str]) -> int:
    from jaxchat.chat import saved  # numpy and others, which --help need not wait for
    from jaxchat.visible import visible

    sessions = saved.listed()
    if request.json:
        print(json.dumps([_as_json(session) for session in sessions], ensure_ascii=False, indent=2))
        return 0
    if not request.remove:
        table = saved.table(sessions)
        print(visible(table) if sys.stdout.isatty() else table)
        return 0
    known = {session.name: session for session in sessions}
    if missing := [name for name in request.remove if name not in known]:
        raise UsageError(f"no session is saved as {missing[0]}; `jaxchat sessions` lists those there are")
    for name in dict.fromkeys(request.remove):
        if request.yes or agreed(f"remove {name}, saved {known[name].when}?"):
            known[name].path.unlink()
            print(f"removed {name}")
    return 0


def _as_json(session: "SavedSession") -> dict[str, Any]:
    return {**dataclasses.asdict(session), "path": str(session.path)}


COMMAND = Command(
    usage=_USAGE,
    request=SessionsRequest,
    run=_run,
    stray="a session is removed with --remove NAME",
    conflicts=(Conflict("json", "remove", "one lists, the other removes"),),
    needs=(Need("yes", ("remove",), "it answers the question before removing"),),
)
