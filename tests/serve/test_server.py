"""The line, deadlines, clients that go away, keys, limits, and the endpoints beside the two large ones."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from serve.conftest import NAME, Served, serving
from serve.synthetic import SyntheticDecoder

from jax_mono.serve.engine import PREFILL_SLICE
from jax_mono.serve.service import Limits

LONG = {"prompt": "a", "max_tokens": 3000, "temperature": 0}


@pytest.fixture
def slow() -> Iterator[Served]:
    """A decoder that takes half a minute for what is asked, and a short line."""
    with serving(SyntheticDecoder(rate=100.0), queue=2) as found:
        yield found


def wait_until(holds, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.005)


@contextlib.contextmanager
def running(served: Served, **body: object) -> Iterator[None]:
    """A client that reads a stream, and goes away when the block ends."""
    request = LONG | body | {"stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=request, timeout=60) as response:
        lines = response.iter_lines()  # kept: httpx closes the connection when nobody holds it
        next(lines)
        yield


def test_a_client_that_goes_away_frees_the_decoder(slow: Served) -> None:
    with running(slow):
        assert slow.engine.busy
        left = time.monotonic()
    wait_until(lambda: not slow.engine.busy)
    assert time.monotonic() - left < 2  # of the 30 s that it would have taken
    assert slow.post("completions", prompt="a", max_tokens=2).status_code == 200


def test_also_one_that_does_not_stream(slow: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}/v1/completions", json=LONG, timeout=0.3)
    wait_until(lambda: not slow.engine.busy, 2)


def test_one_that_waits_leaves_the_line(slow: Served) -> None:
    with running(slow):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{slow.url}/v1/completions", json=LONG, timeout=0.3)
        wait_until(lambda: len(slow.engine.queue) == 0)
        assert slow.engine.busy


def test_the_line_is_bounded(slow: Served) -> None:
    with running(slow):
        waiting = [
            threading.Thread(target=lambda: slow.post("completions", prompt="b", max_tokens=1)) for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        wait_until(lambda: len(slow.engine.queue) == 2)
        refused = slow.post("completions", prompt="c", max_tokens=1)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            slow.client.completions.create(model=NAME, prompt="c")
        health = httpx.get(f"{slow.url}/health").json()
        assert health == {"status": "ok", "busy": True, "queue": 2, "capacity": 2}
    for thread in waiting:
        thread.join(10)


def test_deadlines(slow: Served) -> None:
    started = time.monotonic()
    answer = slow.post("completions", **LONG, deadline=0.3).json()
    assert time.monotonic() - started < 5
    assert answer["timings"]["ended_by"] == "deadline" and answer["choices"][0]["finish_reason"] == "length"
    assert 10 < answer["usage"]["completion_tokens"] < 100
    with running(slow):
        late: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: late.append(slow.post("completions", **LONG, deadline=0.05)))
        thread.start()
        wait_until(lambda: len(slow.engine.queue) == 1)
        time.sleep(0.1)
    thread.join(10)
    assert late[0].status_code == 408 and late[0].json()["error"]["code"] == "deadline"


def test_the_servers_own_deadline_is_the_longest() -> None:
    with serving(SyntheticDecoder(rate=100.0), limits=Limits(deadline_s=0.2)) as served:
        assert served.post("completions", **LONG, deadline=100).json()["timings"]["ended_by"] == "deadline"


def test_a_long_prompt_is_given_up_between_slices() -> None:
    decoder = SyntheticDecoder(rate=5.0)  # every slice takes 0.2 s for its one token
    with serving(decoder, conversations=1) as served:
        prompt = [70] * (PREFILL_SLICE * 8 + 5)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json={"prompt": prompt, "max_tokens": 1}, timeout=0.7)
        wait_until(lambda: not served.engine.busy, 1.0)
        done = len([call for call in decoder.calls if call[1] == PREFILL_SLICE])
        assert 1 <= done < 6
        # What was computed is not lost.
        decoder.rate, decoder.calls = 1000.0, []
        assert served.post("completions", prompt=prompt, max_tokens=1).status_code == 200
        assert decoder.calls[0] == (done * PREFILL_SLICE, PREFILL_SLICE)
        assert decoder.calls[-1] == (8 * PREFILL_SLICE, 5)


def test_a_failure_of_the_decoder_is_one_requests_failure() -> None:
    def say(tokens):
        if tokens[-1] == 71:
            raise RuntimeError("lost")
        return [65] * 100

    with serving(SyntheticDecoder(say=say)) as served:
        failed = served.post("completions", prompt=[70, 71], max_tokens=4)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "decoder_failed")
        with pytest.raises(openai.InternalServerError):
            served.client.completions.create(model=NAME, prompt=[70, 71], stream=True)
        assert served.post("completions", prompt=[70, 72], max_tokens=4).status_code == 200


def test_keys() -> None:
    with serving(SyntheticDecoder(), api_key="secret") as served:
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert httpx.get(f"{served.url}/").status_code == 200
        for path in ("v1/models", "metrics", "openapi.json"):
            assert httpx.get(f"{served.url}/{path}").status_code == 401
            found = httpx.get(f"{served.url}/{path}", headers={"Authorization": "Bearer secret"})
            assert found.status_code == 200
        for header in ("Bearer wrong", "Basic secret", "Bearer", "Bearer sécret".encode("latin-1")):
            assert httpx.get(f"{served.url}/v1/models", headers={"Authorization": header}).status_code == 401
        with pytest.raises(openai.AuthenticationError, match="API key"):
            served.client.models.list()
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret")
        assert client.models.list().data[0].id == NAME


def test_other_sites_cannot_reach_a_server_on_this_machine() -> None:
    with serving(SyntheticDecoder(), hosts=("127.0.0.1", "localhost", "[::1]")) as served:
        port = served.url.rpartition(":")[2]
        for host, status in (("127.0.0.1", 200), (f"localhost:{port}", 200), (f"[::1]:{port}", 200), ("evil.org", 421)):
            assert httpx.get(f"{served.url}/health", headers={"Host": host}).status_code == status
        # What a page of another site may send without being asked is not taken.
        body = json.dumps({"prompt": "a"})
        for media in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = httpx.post(f"{served.url}/v1/completions", content=body, headers={"Content-Type": media})
            assert answer.status_code == 415
        assert "access-control-allow-origin" not in answer.headers


def test_bodies() -> None:
    with serving(SyntheticDecoder(), limits=Limits(body_bytes=1000)) as served:
        url, media = f"{served.url}/v1/completions", {"Content-Type": "application/json"}
        for content in (b" " * 1001, iter([b" " * 600] * 2)):
            refused = httpx.post(url, content=content, headers=media)
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        bad = (b"", b"{", b"[]", b"null", b'{"prompt": "\xff"}', b"[" * 900, b'{"prompt":"a","temperature":NaN}')
        for content in bad:
            refused = httpx.post(url, content=content, headers=media)
            assert refused.status_code == 400, content
            assert refused.json()["error"]["type"] == "invalid_request_error"


def test_models_and_what_is_not_there(served: Served) -> None:
    client = served.client
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="a")
    assert httpx.get(f"{served.url}/v1/completions").status_code == 405


def test_metrics(served: Served) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = value("jax_mono_generated_tokens_total")
    served.post("completions", prompt="a", max_tokens=7, ignore_eos=True)
    assert value("jax_mono_generated_tokens_total") == before + 7
    assert value('jax_mono_requests_total{path="/v1/completions",status="200"}') >= 1
    assert value("jax_mono_first_token_seconds_count") >= 1
    assert value("jax_mono_busy") == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(served: Served) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "--fail-with-body", "--max-time", "30", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    url, media = f"{served.url}/v1/completions", "Content-Type: application/json"
    body = {"prompt": "the quick", "max_tokens": 5, "temperature": 0}
    text = json.loads(curl(url, "-H", media, "-d", json.dumps(body)))["choices"][0]["text"]
    lines = curl("-N", url, "-H", media, "-d", json.dumps(body | {"stream": True})).splitlines()
    *events, done = [line.removeprefix("data: ") for line in lines if line]
    assert done == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text


def test_a_client_that_stops_reading_does_not_stop_the_others() -> None:
    with serving(SyntheticDecoder(rate=20_000.0)) as served:
        port = int(served.url.rpartition(":")[2])
        body = json.dumps({"prompt": "a", "max_tokens": 4000, "stream": True, "logprobs": 0}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            time.sleep(0.1)
            assert served.post("completions", prompt="b", max_tokens=3).status_code == 200


def test_shutting_down_tells_those_who_wait() -> None:
    with serving(SyntheticDecoder(rate=50.0)) as served:
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(served.post("completions", **LONG))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: served.engine.busy and len(served.engine.queue) == 1)
        served.engine.close()
        for thread in threads:
            thread.join(10)
        assert [answer.status_code for answer in answers] == [503, 503]
        assert httpx.get(f"{served.url}/health").status_code == 503
