"""Sessions: memory that lasts between requests, belongs to one client, and never leaks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="`pip install -e '.[test]'` brings it")
pytest.importorskip("transformers", reason="the server runs the exported model")

import httpx2 as httpx  # noqa: E402 - what openai's client is made with
import torch  # noqa: E402

PIECES = ["def function_1(argument", ", value=1):\n", "    return argument"]


def say(client: Any, prompt: str, session: str | None = None, **changes: Any) -> Any:
    extra = {"ignore_eos": True} | ({"session_id": session} if session else {})
    ask = {"model": "hope", "temperature": 0, "max_tokens": 6, **changes}
    return client.completions.create(prompt=prompt, extra_body=extra, **ask)


def greedy(run: Any, ids: list[int], count: int) -> list[int]:
    """The most likely tokens behind ids, which are read anew for each."""
    whole = list(ids)
    for _ in range(count):
        with torch.no_grad():
            whole.append(int(run.model(torch.tensor([whole])).logits[0, -1].argmax()))
    return whole[len(ids) :]


def test_a_session_goes_on_where_it_stood(serve: Callable[..., Any], run: Any) -> None:
    served = serve()
    client = served.client()
    ids, sizes = [run.tokenizer.eos_id], []
    for piece in PIECES:
        answer = say(client, piece, "book")
        ids += run.tokenizer.encode(piece).tolist()
        ids += (expected := greedy(run, ids, 6))
        assert answer.choices[0].text == run.tokenizer.decode(expected), "as if all had been one text"
        sizes.append(httpx.get(f"{served.url}/v1/sessions/book").json()["bytes"])
    assert len(set(sizes)) == 1, "a memory has one size"
    assert answer.usage.prompt_tokens == len(run.tokenizer.encode(PIECES[-1])), "only what is new is read and counted"
    # nothing drawn, only read; then drawn from there with an empty prompt
    say(client, "import os\n", "reader", max_tokens=0)
    assert say(client, "", "reader").choices[0].text == say(client, "import os\n").choices[0].text


def test_sessions_never_leak(serve: Callable[..., Any]) -> None:
    """Many at once, and with requests of no session: each is as alone. Other clients do not see them."""
    from hope_megatron.serve.settings import token_digest

    tokens = {name: name * 16 for name in "ab"}
    served = serve(max_batch=3, tokens=frozenset(map(token_digest, tokens.values())))
    clients = {name: served.client(token) for name, token in tokens.items()}
    alone = {n: say(clients["a"], f"secret = {n}; print(").choices[0].text for n in range(6)}
    assert len(set(alone.values())) > 1
    found: dict[tuple[str, int], str] = {}

    def ask(name: str, n: int) -> None:
        say(clients[name], f"secret = {n}; ", f"s{n}", max_tokens=0)
        found[name, n] = say(clients[name], "print(", f"s{n}").choices[0].text

    threads = [threading.Thread(target=ask, args=(name, n)) for name in "ab" for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(name, n): alone[n] for name in "ab" for n in range(6)}
    headers = {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}
    say(clients["a"], "mine", "private")
    assert httpx.get(f"{served.url}/v1/sessions/private", headers=headers["b"]).status_code == 404
    assert httpx.delete(f"{served.url}/v1/sessions/private", headers=headers["b"]).status_code == 404
    listed = httpx.get(f"{served.url}/v1/sessions", headers=headers["b"]).json()["data"]
    assert sorted(session["id"] for session in listed) == [f"s{n}" for n in range(6)]
    # the same name is another session for another client
    assert say(clients["b"], "mine", "private").choices[0].text == say(clients["a"], "mine").choices[0].text


def test_forks_go_their_own_ways(serve: Callable[..., Any]) -> None:
    served = serve()
    client = served.client()
    say(client, PIECES[0], "trunk", max_tokens=0)
    url = f"{served.url}/v1/sessions/trunk"
    assert httpx.post(f"{url}/fork", json={"to": "branch"}).json()["id"] == "branch"
    assert httpx.post(f"{url}/fork", json={"to": "branch"}).status_code == 409
    branch = say(client, ", other=2", "branch").choices[0].text
    assert branch == say(client, PIECES[0] + ", other=2").choices[0].text
    assert say(client, PIECES[1], "trunk").choices[0].text == say(client, PIECES[0] + PIECES[1]).choices[0].text
    assert httpx.delete(url).json()["deleted"] and httpx.get(url).status_code == 404
    assert httpx.get(f"{served.url}/v1/sessions/branch").status_code == 200


def test_what_memory_does_not_hold_goes_to_disk_and_outlives_the_server(
    serve: Callable[..., Any], session_dir: Path
) -> None:
    first = serve(session_dir=session_dir, session_bytes=1)
    client = first.client()
    for n in range(3):
        say(client, f"secret = {n}; ", f"s{n}", max_tokens=0)
    places = {s["id"]: s["place"] for s in httpx.get(f"{first.url}/v1/sessions").json()["data"]}
    assert places == {"s0": "disk", "s1": "disk", "s2": "disk"}
    expected = say(client, "secret = 1; print(").choices[0].text
    assert say(client, "print(", "s1").choices[0].text == expected, "read back"
    first.stop()
    second = serve(session_dir=session_dir)
    client = second.client()
    assert say(client, "print(", "s0").choices[0].text == say(client, "secret = 0; print(").choices[0].text
    files = sorted(session_dir.glob("*.session"))
    assert len(files) == 3 and all(path.stat().st_mode & 0o077 == 0 for path in files)
    # a damaged file is never gone on with
    damaged = second.service.sessions._file(("anyone", "s2"))
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(openai.InternalServerError, match="damaged"):
        say(client, "print(", "s2")
    assert httpx.delete(f"{second.url}/v1/sessions/s2").status_code == 200 and not damaged.exists()


def test_without_a_directory_the_oldest_are_forgotten(serve: Callable[..., Any]) -> None:
    served = serve(session_bytes=1)
    say(served.client(), "a", "one")
    assert httpx.get(f"{served.url}/v1/sessions").json()["data"] == []
    kept = serve(max_client_sessions=1)
    say(kept.client(), "a", "one")
    with pytest.raises(openai.RateLimitError, match="1 sessions, the most"):
        say(kept.client(), "a", "two")
    kept.service.sessions.idle_s = 0.0
    say(kept.client(), "a", "two")
    kept.service.sessions.idle_s = 1000.0
    assert httpx.get(f"{kept.url}/v1/sessions/one").status_code == 404, "expired"
    assert httpx.post(f"{kept.url}/v1/sessions/two/save").status_code == 400


def test_a_request_that_fails_or_is_left_changes_nothing(serve: Callable[..., Any], wait_until: Callable) -> None:
    served = serve()
    client = served.client()
    say(client, PIECES[0], "book", max_tokens=0)
    stream = client.completions.create(
        model="hope", prompt="x", max_tokens=3000, stream=True, extra_body={"session_id": "book", "ignore_eos": True}
    )
    next(iter(stream))
    with pytest.raises(openai.ConflictError, match="used by another request"):
        say(client, "y", "book")
    stream.close()
    wait_until(lambda: not httpx.get(f"{served.url}/v1/sessions/book").json()["busy"])
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        say(client, [100000], "book")  # type: ignore[arg-type]
    assert say(client, PIECES[1], "book").choices[0].text == say(client, PIECES[0] + PIECES[1]).choices[0].text


def test_a_chat_remembers(serve: Callable[..., Any], run: Any) -> None:
    client = serve().client()
    ask: dict[str, Any] = {"model": "hope", "temperature": 0, "max_tokens": 5}

    def chat(text: str, **changes: Any) -> str:
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(messages=messages, **ask, **changes).choices[0].message.content

    session = {"extra_body": {"session_id": "talk", "ignore_eos": True}}
    ids = [run.tokenizer.eos_id]
    for text, turn in (("Hi", "User: Hi\nAssistant:"), ("And?", "\nUser: And?\nAssistant:")):
        ids += run.tokenizer.encode(turn).tolist()
        ids += (expected := greedy(run, ids, 5))
        assert chat(text, **session) == run.tokenizer.decode(expected)


def test_running_requests_end_before_the_server_does(serve: Callable[..., Any]) -> None:
    served = serve()
    client = served.client()
    stream = client.completions.create(
        model="hope", prompt="a", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = [next(iter(stream))]
    served.server.should_exit = True
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    served.thread.join(90)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
