"""Answers that are kept on disk: whole ones outlive anything, cut ones do not count, others' are refused."""

import pytest

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.jobs.answers import Finished
from jaxchat.jobs.input_file import MAX_LINE_BYTES, InputFile
from jaxchat.jobs.record import Record, described, path_for
from tests.jobs.support import write_lines

OF = {"--input": "1f", "--seed": "0"}
ANSWERS = [Finished(3, b'{"c": 3}', False, 5, 7), Finished(1, '{"a": "ü"}'.encode(), True)]


def opened(output, of=OF, *, resume=True, created=10):
    return Record(output, of, created=created, last=9, resume=resume)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "answers.jsonl"


@pytest.fixture
def begun(output):
    """A record with two answers, left as a killed process leaves it."""
    with opened(output) as record:
        for finished in ANSWERS:
            record.add(finished)
    return path_for(output)


def test_answers_are_written_in_order_and_the_record_is_gone(output, begun):
    with opened(output, created=99) as record:
        assert [number for number in range(10) if number in record] == [1, 3]
        assert (len(record), record.errors, record.prompt_tokens, record.completion_tokens) == (2, 1, 5, 7)
        assert record.created == 10  # that of the beginning
        record.add(Finished(2, b"{}", False))
        record.add(Finished(2, b"[]", False))  # a second answer changes nothing
        record.assemble(output)
    assert output.read_bytes() == '{"a": "ü"}\n{}\n{"c": 3}\n'.encode()
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]


def test_whatever_is_cut_off_the_answers_before_it_stay(output, begun):
    whole = begun.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(ends[0], len(whole)):
        begun.write_bytes(whole[:length])
        with opened(output) as record:
            assert len(record) == sum(end <= length for end in ends[1:])
            record.add(Finished(5, b"5", False))
        with opened(output) as record:
            assert 5 in record


@pytest.mark.parametrize("junk", [b"\0" * 50, b"3 0 1 1 00000000 {}\n", b"x\n", b"9" * 40 + b"\n"])
def test_what_is_no_answer_ends_the_record(output, begun, junk):
    begun.write_bytes(begun.read_bytes() + junk)
    with opened(output) as record:
        assert len(record) == 2
        record.add(Finished(5, b"5", False))
    with opened(output) as record:
        assert len(record) == 3


def test_a_changed_bit_is_seen(output, begun):
    begun.write_bytes(begun.read_bytes().replace(b'{"c": 3}', b'{"c": 4}'))
    with opened(output) as record:
        assert len(record) == 0


def test_without_resume_it_begins_anew(output, begun):
    with opened(output, {"--input": "2f"}, resume=False) as record:
        assert len(record) == 0
    assert described(begun).of == {"--input": "2f"}


def test_answers_of_another_job_are_refused_by_what_differs(output, begun):
    before = begun.read_bytes()
    with pytest.raises(UsageError, match=r"--seed was 0 and is 1 now; give what it was, or --overwrite"):
        opened(output, OF | {"--seed": "1"})
    assert begun.read_bytes() == before


def test_two_jobs_do_not_write_to_one_record(output, begun):
    with opened(output), pytest.raises(UsageError, match="another job is writing to"):
        opened(output)


@pytest.mark.parametrize(
    "line", [b"\xff\n", b"[]\n", b'{"of": 1}\n', b'{"of": {"a": 1}, "created": 1}\n', b"{" * 10_000 + b"\n"]
)
def test_what_is_no_record_is_refused(output, line):
    path_for(output).write_bytes(line)
    for read in (lambda: opened(output), lambda: described(path_for(output))):
        with pytest.raises(JaxchatError, match="delete it, or give another --output"):
            read()
    assert path_for(output).read_bytes() == line


# --- the input


def test_lines_are_found_whatever_is_between_them(tmp_path):
    data = b'\xef\xbb\xbf{"id": 1}\r\n\n  \t\n{"id": 2}\n' + b"x" * (MAX_LINE_BYTES + 1) + b'\nlast, "id": 1'
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    source = InputFile(path)
    lines = [source.line(place) for place in range(len(source))]
    source.close()
    assert [line.number for line in lines] == [1, 4, 5, 6]
    assert [line.data for line in lines] == [b'{"id": 1}\r\n', b'{"id": 2}\n', None, b'last, "id": 1']
    assert source.total == 6


def test_two_lines_of_one_name_are_refused_with_their_numbers(tmp_path):
    lines = [{"id": "a"}, {"custom_id": "a"}, {"id": 1}, b"", {"id": "1"}, {"id": "a"}, {}]
    with pytest.raises(UsageError, match=r"lines 1 and 6 have the same id 'a'; give each its own"):
        InputFile(write_lines(tmp_path / "in.jsonl", lines))
    assert len(InputFile(write_lines(tmp_path / "in.jsonl", lines[:5]))) == 4


def test_a_file_that_changes_on_the_way_is_noticed(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"id": 1}, {"id": 2}])
    source = InputFile(path)
    write_lines(path, [{"id": 1}, {"id": 3}, {}])
    with pytest.raises(JaxchatError, match="has changed while it was read"):
        source.line(1)


def test_a_long_file_is_held_by_its_places_only(tmp_path):
    """100,000 lines of 100 bytes: 24 bytes each and some for their names, not their texts."""
    import tracemalloc

    path = write_lines(tmp_path / "in.jsonl", ({"id": n, "prompt": "x" * 80} for n in range(100_000)))
    tracemalloc.start()
    try:
        source = InputFile(path)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 100_000
    assert held < 4_000_000
    assert most < 8_000_000
