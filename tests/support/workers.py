"""The processes of Ray's workers, so that one can be killed."""

from pathlib import Path


def workers_of(process):
    """The processes of Ray's workers that a process has begun."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:  # has ended
                continue

    def descends(number):
        while number not in (0, process.pid):
            number = parents.get(number, 0)
        return number != 0

    return [number for number, name in names.items() if name.startswith(b"ray::_Worker") and descends(number)]
