"""OpenAI's own client against the server, over a socket."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="`pip install -e '.[test]'` brings it")
pytest.importorskip("transformers", reason="the server runs the exported model")

import httpx2 as httpx  # noqa: E402 - what openai's client is made with
import torch  # noqa: E402

PROMPT = "def function_1("


def reference(run: Any, text: str, count: int) -> list[int]:
    """The most likely tokens, by the whole text read anew for each."""
    ids = [run.tokenizer.eos_id, *run.tokenizer.encode(text).tolist()]
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(run.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_completions(serve: Callable[..., Any], run: Any) -> None:
    served = serve(model_name="tiny")
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    greedy: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(prompt=PROMPT, logprobs=2, **greedy)
    expected = reference(run, PROMPT, 12)
    (choice,) = answer.choices
    assert choice.text == run.tokenizer.decode(expected) and choice.finish_reason == "length"
    prompt_tokens = len(run.tokenizer.encode(PROMPT)) + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 12)
    with torch.no_grad():
        ids = torch.tensor([[run.tokenizer.eos_id, *run.tokenizer.encode(PROMPT).tolist()]])
        logprobs = run.model(ids).logits[0, -1].log_softmax(-1)
    assert choice.logprobs.token_logprobs[0] == pytest.approx(float(logprobs.max()), abs=1e-5)
    assert len(choice.logprobs.top_logprobs[0]) >= 1 and len(choice.logprobs.tokens) == 12
    # streamed, the same text and usage
    chunks = list(
        client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **greedy)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text
    assert chunks[-1].usage == answer.usage and chunks[-2].choices[0].finish_reason == "length"
    # a stop string is not said, wherever tokens end; and the text before it is
    stop = choice.text[3:6]
    stopped = client.completions.create(prompt=PROMPT, stop=[stop, "never"], **greedy).choices[0]
    assert stopped.text == choice.text[: choice.text.index(stop)] and stopped.finish_reason == "stop"
    pieces = [
        chunk.choices[0].text for chunk in client.completions.create(prompt=PROMPT, stop=stop, stream=True, **greedy)
    ]
    assert "".join(pieces) == stopped.text
    # token ids, several prompts, several choices
    ids_of = run.tokenizer.encode(PROMPT).tolist()
    several = client.completions.create(prompt=[ids_of, ids_of], **greedy)
    assert [other.text for other in several.choices] == [choice.text] * 2


def test_seeds_and_choices(serve: Callable[..., Any]) -> None:
    client = serve().client()
    ask = {
        "model": "hope",
        "prompt": PROMPT,
        "max_tokens": 8,
        "temperature": 1.5,
        "n": 3,
        "extra_body": {"ignore_eos": True},
    }
    one, again, other = (client.completions.create(seed=seed, **ask) for seed in (5, 5, 6))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in again.choices] != [choice.text for choice in other.choices]
    assert len(set(texts)) > 1
    free = [client.completions.create(**ask).choices[0].text for _ in range(3)]
    assert len(set(free)) > 1, "without a seed every request draws its own"


def test_chat(serve: Callable[..., Any], run: Any) -> None:
    client = serve().client()
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    ask: dict[str, Any] = {"model": "hope", "messages": messages, "temperature": 0, "max_completion_tokens": 8}
    ask["extra_body"] = {"ignore_eos": True}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **ask)
    text = run.tokenizer.decode(reference(run, "System: Be short.\nUser: Hi\nAssistant:", 8))
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content == text
    assert len(answer.choices[0].logprobs.content) == 8 and len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(stream=True, **ask))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


@pytest.mark.parametrize("kind", ["run", "attention_run"])
def test_requests_that_run_together_do_not_touch_each_other(
    kind: str, serve: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    """More streams than rows of the batch, of other lengths, some with sampling: each as if alone."""
    client = serve(request.getfixturevalue(kind), max_batch=3).client()
    asks = [
        {"prompt": PROMPT * (1 + i % 4), "max_tokens": 3 + 2 * i, "seed": i, "temperature": float(i % 2), "model": "hope",
         "extra_body": {"ignore_eos": True}} for i in range(7)
    ]  # fmt: skip
    alone = [client.completions.create(**ask).choices[0].text for ask in asks]
    found: list[str | None] = [None] * len(asks)

    def ask(i: int) -> None:
        found[i] = client.completions.create(**asks[i]).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": "a", "frequency_penalty": 1}, 400, "frequency_penalty is not supported"),
        ({"prompt": "a", "temperature": 3}, 400, "temperature"),
        ({"prompt": "a", "max_tokens": 100000}, 400, "at most 4096"),
        ({"prompt": [5, 100000]}, 400, "token 100000 is outside the vocabulary"),
        ({"prompt": "a", "modle": "x"}, 400, "modle"),
        ({"prompt": "a", "model": "other"}, 404, "is not here"),
        ({"prompt": [], "model": "hope"}, 400, "0 prompts"),
        ({"prompt": ["a", "b"], "session_id": "s"}, 400, "a session is one stream"),
        ({"prompt": "a", "session_id": "../x"}, 400, "is no name"),
        ({"prompt": "a" * 3000}, 413, "more than 2000 bytes"),
    ],
)
def test_what_is_wrong_is_said(served_once: Any, body: dict, status: int, says: str) -> None:
    answer = httpx.post(f"{served_once.url}/v1/completions", json=body)
    assert answer.status_code == status and says in answer.json()["error"]["message"]


def test_tokens_limits_and_status(serve: Callable[..., Any], wait_until: Callable) -> None:
    from hope_megatron.serve.settings import token_digest

    served = serve(tokens=frozenset({token_digest("a" * 16)}), max_client_requests=1)
    with pytest.raises(openai.AuthenticationError, match="give a token"):
        served.client("wrong").models.list()
    client = served.client("a" * 16)
    stream = client.completions.create(
        model="hope", prompt=PROMPT, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="1 requests running"):
        client.completions.create(model="hope", prompt=PROMPT)
    stream.close()  # a client that leaves frees its row
    wait_until(lambda: served.service.engine.num_active == 0)
    assert client.completions.create(model="hope", prompt=PROMPT, max_tokens=2).usage.completion_tokens <= 2
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{served.url}/metrics").text
    assert 'hope_requests_total{endpoint="/v1/completions",status="429"} 1.0' in metrics
    assert 'hope_tokens_total{kind="completion"}' in metrics and PROMPT not in metrics
    missing = httpx.get(f"{served.url}/v1/nothing")
    assert missing.status_code == 404 and "error" in missing.json()


def test_what_takes_too_long_is_given_up_and_what_is_too_much_must_wait(
    serve: Callable[..., Any], wait_until: Callable
) -> None:
    served = serve(request_timeout_s=0.3, max_batch=1, max_waiting=1)
    client, ask = (
        served.client(),
        {"model": "hope", "prompt": PROMPT, "max_tokens": 4000, "extra_body": {"ignore_eos": True}},
    )
    with pytest.raises(openai.InternalServerError, match=r"no answer within 0\.3 s") as late:
        client.completions.create(**ask)
    assert late.value.status_code == 504
    with pytest.raises(openai.APIError, match=r"no answer within 0\.3 s"):
        list(client.completions.create(stream=True, **ask))
    wait_until(lambda: served.service.engine.num_active == 0)
    with pytest.raises(openai.RateLimitError, match="requests wait already") as full:
        client.completions.create(n=2, **ask)
    assert full.value.response.headers["retry-after"] == "1"
