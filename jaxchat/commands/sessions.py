"""`jaxchat sessions`: lists the conversations that were saved under a name, and removes some."""

import dataclasses
from typing import TYPE_CHECKING

from jaxchat.cli.listing import Listing, list_command

if TYPE_CHECKING:
    from jaxchat.chat.saved import SavedSession

_USAGE = """\
usage: {program} [--json | --remove NAME]

Lists the conversations that --save_session NAME or /save NAME has kept, the
newest first: when, with which model and layer plan, how long, how they begin.

  {program}
  {program} --remove talk
"""


def _listing() -> Listing["SavedSession"]:
    from jaxchat.chat import saved  # numpy and others, which --help need not wait for

    sessions = saved.listed()
    return Listing(
        entries={session.name: session for session in sessions},
        table=lambda: saved.table(sessions),
        as_json=lambda session: {**dataclasses.asdict(session), "path": str(session.path)},
        question=lambda session: f", saved {session.when}",
        remove=lambda session: session.path.unlink(),
        missing="no session is saved as {name}; `jaxchat sessions` lists those there are",
    )


COMMAND = list_command(_USAGE, "a session is removed with --remove NAME", _listing)
