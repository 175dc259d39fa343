"""Laws of the guard: who may ask, and what every answer says to a browser; the security table's lines."""

from __future__ import annotations

import base64
import logging
import secrets
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stable_diffusion.generation.request import LOADING
from stable_diffusion.serve import app
from stable_diffusion.serve.guard import HEADERS, MAX_BODY, OPEN, SECRET
from tests.serve.served import Running, data_uri, received, send, serving, until
from tests.tiny import tiny_model

KEY = "a-key-that-nobody-guesses"
FRIEND = "https://friend.example"


async def fail(request: Request) -> Response:
    raise ValueError("a fault of ours")


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    """With a key, and an origin whose pages may ask."""
    with serving({"tiny": tiny_model()}, key=KEY, origins=frozenset({FRIEND})) as running:
        yield running


WATCHED: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHED is not None and event in ("open", "socket.connect", "socket.getaddrinfo"):
        WATCHED.append((event, arguments))


@pytest.fixture
def touched() -> Iterator[list[tuple[str, Any]]]:
    """The files that are opened and the addresses that are connected to, whoever does it."""
    global WATCHED
    if not hasattr(sys, "_served_audit"):
        sys.addaudithook(_audit)
        sys._served_audit = True  # type: ignore[attr-defined]
    WATCHED = []
    yield WATCHED
    WATCHED = None


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str, user: str = "") -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{key}'.encode()).decode()}"}


CALLS = [(route.path, method) for route in app.ROUTES for method in sorted(route.methods or ())]


@pytest.mark.parametrize(("path", "method"), CALLS, ids=[f"{method} {path}" for path, method in CALLS])
def test_every_route_wants_the_key(keyed: Running, path: str, method: str) -> None:
    path = path.replace("{", "").replace("}", "")
    answer = keyed.ask(method, path)
    if path in OPEN or path.startswith(SECRET):
        assert answer.status == (200 if path in OPEN else 404)
        return
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="minisd"'
    assert keyed.ask(method, path, headers=bearer(KEY)).status != 401


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(""),
        bearer(KEY.upper()),
        basic(""),
        basic("x", KEY),
        {"Authorization": "Basic !!!"},
        {"Authorization": f"Digest {KEY}"},
        {"Authorization": KEY},
    ],
    ids=str,
)
def test_other_keys_open_nothing(keyed: Running, headers: dict[str, str]) -> None:
    assert keyed.ask("GET", "/api/models", headers=headers).status == 401


def test_the_key_opens(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a token or a password, and compared in a time that tells nothing of it."""
    compared = []
    compare = secrets.compare_digest
    monkeypatch.setattr(secrets, "compare_digest", lambda *both: compared.append(both) or compare(*both))
    for headers in (bearer(KEY), basic(KEY), basic(KEY, "anybody"), {"Authorization": f"bearer  {KEY}"}):
        assert keyed.ask("GET", "/api/models", headers=headers).status == 200
    assert compared == [(KEY.encode(), KEY.encode())] * 4


def test_only_its_own_names_reach_it(tiny: Running) -> None:
    """Against DNS rebinding: a name of another's that leads here."""
    for host in (
        "evil.example",
        f"evil.example:{tiny.port}",
        "localhost.evil.example",
        "",
        "[::1",
        "10.0.0.1",
    ):
        assert tiny.get("/health", Host=host).status == 400, host
        assert tiny.post("/api/jobs", {"prompt": "a"}, Host=host).status == 400, host
    for host in ("localhost", f"localhost:{tiny.port}", "LOCALHOST", f"127.0.0.1:{tiny.port}"):
        assert tiny.get("/health", Host=host).status == 200, host
    with socket.create_connection(("127.0.0.1", tiny.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_the_address_of_the_connection_is_a_name() -> None:
    """Of a server that listens everywhere, too; what a browser calls by a number nobody can rebind."""
    with serving({"tiny": tiny_model()}, hosts=frozenset({"a.name"})) as running:
        assert running.get("/health").status == 200
        assert running.get("/health", Host="127.0.0.2").status == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9"},
        {"Origin": "http://localhost"},
        {"Origin": "file://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": FRIEND},
    ],
    ids=str,
)
def test_a_page_from_elsewhere_starts_nothing(tiny: Running, headers: dict[str, str]) -> None:
    """Not a job, nor an end to one; and its script reads no answer."""
    id = tiny.job(prompt="a", num_inference_steps=1)
    known = len(tiny.jobs._known)
    for method, path in (("POST", "/api/jobs"), ("POST", "/api/live"), ("DELETE", f"/api/jobs/{id}")):
        answer = tiny.ask(method, path, {"prompt": "a"}, headers)
        assert answer.status == 403, (method, path)
        assert "Access-Control-Allow-Origin" not in answer.headers
    preflight = {**headers, "Access-Control-Request-Method": "POST"}
    assert tiny.ask("OPTIONS", "/api/jobs", headers=preflight).status in (403, 405)
    assert "Access-Control-Allow-Origin" not in tiny.get("/api/models", **headers).headers
    assert len(tiny.jobs._known) == known


def test_its_own_page_may_ask(tiny: Running) -> None:
    own = f"http://127.0.0.1:{tiny.port}"
    body = {"prompt": "a", "num_inference_steps": 1}
    for headers in (
        {"Origin": own, "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://localhost", "Host": "localhost"},  # behind a proxy that speaks TLS
    ):
        assert tiny.post("/api/jobs", body, **headers).status == 202, headers


def test_json_is_asked_for(tiny: Running) -> None:
    """What a form of another page can send without a preflight is no JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert tiny.post("/api/jobs", b'{"prompt": "a"}', **{"Content-Type": kind}).status == 415


def test_allowed_origins_may_ask(keyed: Running) -> None:
    """After a preflight that needs no key; what they ask for does."""
    preflight = keyed.ask(
        "OPTIONS",
        "/api/jobs",
        headers={
            "Origin": FRIEND,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        },
    )
    assert preflight.status == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == FRIEND
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    asked = {"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}
    body = {"prompt": "a", "num_inference_steps": 1}
    for headers, status in (({}, 401), (bearer(KEY), 202)):
        answer = keyed.post("/api/jobs", body, **asked, **headers)
        assert answer.status == status and answer.headers["Access-Control-Allow-Origin"] == FRIEND
        assert answer.headers["Vary"] == "Origin"
    other = {"Origin": "https://friend.example.evil", "Access-Control-Request-Method": "POST"}
    refused = keyed.ask("OPTIONS", "/api/jobs", headers=other)
    assert refused.status == 403 and "Access-Control-Allow-Origin" not in refused.headers
    assert keyed.get("/health").headers["Vary"] == "Origin"


def test_every_answer_tells_browsers_what_they_may_do(
    keyed: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors too, and those that Starlette makes."""
    with serving({"tiny": tiny_model()}, more=[Route("/fail", fail)]) as running:
        large = {"Content-Length": str(MAX_BODY + 1)}
        answers = {
            200: running.get("/api/models"),
            400: running.get("/health", Host="evil.example"),
            401: keyed.get("/api/models"),
            403: running.ask("DELETE", "/api/jobs/x", headers={"Origin": "null"}),
            404: running.get("/nothing"),
            405: running.get("/api/live"),
            413: running.ask("POST", "/api/jobs", headers=large),
            415: running.post("/api/jobs", b"x"),
            500: running.get("/fail"),
        }
    for status, answer in answers.items():
        assert answer.status == status
        for name, value in HEADERS.items():
            assert answer.headers[name] == value, (status, name)
        if status != 200:
            assert answer.json["error"]["message"]
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert "a fault of ours" in caplog.text and "a fault of ours" not in answers[500].body.decode()


def test_no_path_reaches_the_disk(tiny: Running, touched: list[tuple[str, Any]]) -> None:
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/static/../jobs.py",
        "/jobs.py",
        "/..\\..\\etc\\passwd",
        "/C:/Windows/win.ini",
        "//etc/passwd",
        "/api/jobs/..%2f..%2fetc%2fpasswd",
        "/%00",
        "/api/jobs/%ff",
    ):
        assert tiny.get(path).status == 404, path
    assert not [each for each in touched if each[0] == "open"]


def test_settings_are_no_paths_and_no_addresses(
    tiny: Running, touched: list[tuple[str, Any]], tmp_path: Path
) -> None:
    """Such as those of a crafted picture: nothing is opened, nobody is asked, nothing is loaded."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        address = f"http://127.0.0.1:{other.getsockname()[1]}/x.png"
        touched.clear()
        paths = (str(secret), f"file://{secret}", "/etc/passwd", "../secret.png")
        for value in (*paths, address, "//127.0.0.1/x"):
            for name in ("image", "mask_image", "model", *LOADING):
                fields = {"prompt": "a", name: value if name != "ema" else True}
                assert tiny.post("/api/jobs", fields).status in (400, 404), (name, value)
            assert tiny.post("/api/jobs", {"prompt": "a", "lora": {value: 1.0}}).status == 400
            assert tiny.post("/api/jobs", {"prompt": "a", "lora": [value]}).status == 400
        with pytest.raises(TimeoutError):
            other.accept()
    opened = [arguments[0] for event, arguments in touched if event == "open"]
    assert not [path for path in opened if "secret" in str(path) or "passwd" in str(path)]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(side: int) -> bytes:
    """A black and white PNG of so many pixels in a few bytes."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)]
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    content = b"".join([*rows, packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_small_file_of_many_pixels_takes_no_memory(tiny: Running) -> None:
    """Each is refused by its header, before a pixel of it is decoded."""
    content = bomb(13_000)
    assert len(content) < 40_000
    tiny.post("/api/jobs", {"prompt": "a", "image": base64.b64encode(bomb(100)).decode()})
    before = resident()
    for name in ("image", "mask_image"):
        answer = tiny.post("/api/jobs", {"prompt": "a", name: base64.b64encode(content).decode()})
        assert answer.status == 400 and "16,000,000 are the most" in answer.json["error"]["message"]
    assert resident() - before < 20 << 20


def test_other_formats_are_not_decoded(tiny: Running) -> None:
    for content in (
        b"GIF89a" + bytes(100),
        b"%!PS-Adobe",
        b"<svg/>",
        b"II*\0" + bytes(50),
        b"",
        bomb(50)[:-30],
    ):
        answer = tiny.post("/api/jobs", {"prompt": "a", "image": base64.b64encode(content).decode()})
        assert answer.status == 400 and answer.json["error"]["field"] == "image"


def test_large_bodies_are_refused(tiny: Running) -> None:
    """By what they say, and where they say nothing, by what they are."""
    said = {"Content-Length": str(MAX_BODY + 1), "Content-Type": "application/json"}
    assert tiny.ask("POST", "/api/jobs", headers=said).status == 413

    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(MAX_BODY // (1 << 20) + 2):
            yield b"a" * (1 << 20)

    connection = tiny.connect()
    try:
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        connection.request("POST", "/api/jobs", pieces(), headers, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it heard enough
    else:
        answer = received(connection)
        assert answer.status == 413 and answer.json["error"]["message"]
    finally:
        connection.close()
    assert tiny.get("/health").status == 200


def test_the_65th_job_is_asked_to_come_again(packaged: Running) -> None:
    """A live one too; those that wait are not touched."""
    ids = [packaged.job(prompt="a fox", num_inference_steps=150, client="flood") for _ in range(65)]
    try:
        for path in ("/api/jobs", "/api/live"):
            answer = packaged.post(path, {"prompt": "a fox", "client": "another"})
            assert answer.status == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 600
        assert packaged.get("/health").json["waiting"] == 64
    finally:
        for id in reversed(ids):
            packaged.ask("DELETE", f"/api/jobs/{id}")
    until(lambda: packaged.jobs.running is None)


def test_a_prompt_is_text(tiny: Running) -> None:
    """In JSON, which no browser takes for a page."""
    prompt = "<img src=x onerror=alert(1)>"
    id = tiny.job(prompt=prompt, num_inference_steps=1)
    tiny.over(id)
    answer = tiny.get(f"/api/jobs/{id}")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.json["pictures"][0]["settings"]["prompt"] == prompt


def test_no_log_holds_a_prompt(tiny: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Nor a picture, whatever becomes of the request."""
    image = Image.effect_noise((32, 32), 60)
    with caplog.at_level(logging.DEBUG):
        for fields in ({}, {"image": data_uri(image)}, {"sampler": "none"}, {"seed": "x"}):
            answer = tiny.post("/api/jobs", {"prompt": "a secret wish", "num_inference_steps": 1, **fields})
            if answer.status == 202:
                tiny.over(answer.json["id"])
        tiny.get("/api/jobs?prompt=a%20secret%20wish")
    assert "secret" not in caplog.text and data_uri(image)[30:80] not in caplog.text


def test_one_connection_can_ask_again(tiny: Running) -> None:
    """Also after a refusal."""
    connection = tiny.connect()
    for _ in range(3):
        send(connection, "POST", "/api/jobs", {"prompt": "a"}, {"Origin": "null"})
        assert received(connection).status == 403
        send(connection, "GET", "/health")
        assert received(connection).status == 200
    connection.close()
