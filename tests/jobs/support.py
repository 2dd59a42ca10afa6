"""Lines of jobs, and files of them."""

import json


def openai(key, url, **body):
    """A line of OpenAI's batch format."""
    return {"custom_id": key, "method": "POST", "url": f"/v1/{url}", "body": body}


def chat(key, text, **body):
    return openai(key, "chat/completions", messages=[{"role": "user", "content": text}], **body)


def write_lines(path, lines):
    """Lines that are objects or bytes."""
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]
